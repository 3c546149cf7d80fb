"""Every shipped configuration composes, is consistent and builds."""

import dataclasses
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import envpool
import equinox as eqx
import gymnasium
import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf

import eqx_q
from eqx_q.data import Sampling
from eqx_q.nets.registry import ENCODERS, make_network
from eqx_q.run import make_agent, make_env
from eqx_q.run.parts import KINDS
from eqx_q.wrappers import custom

CONF = Path(__file__).resolve().parent.parent / "conf"
SOURCES: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).parent / "sources.yaml"))


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides, name="config"):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(name, list(overrides))
    return OmegaConf.to_container(config, resolve=True)


@functools.lru_cache(maxsize=1)
def lanes(env):
    """Two lanes of the environment that a configuration, as JSON, chooses."""
    return make_env(json.loads(env), 2)


def check_builds(config):
    agent = config["agent"]
    if "rollout_length" in agent:
        has_memory = agent["network_options"]["memory"] not in (None, "none")
        items = config["num_envs"] * (1 if has_memory else agent["rollout_length"])
        assert items % agent["num_minibatches"] == 0
    of_env = {key: config[key] for key in ("env", "protocol", "on_env_error", "env_timeout")}
    eqx.filter_eval_shape(make_agent, config, lanes(json.dumps(of_env | {"seed": 0})))


PAIRS = {f"{agent}_{env}" for agent in choices("agent") for env in choices("env")}


@pytest.mark.parametrize(("number", "env"), list(enumerate(choices("env"))))
def test_agents_and_environments_with_what_is_tuned_for_them(number, env, monkeypatch):
    """Where nothing is, one agent: its own values are the same in every such environment."""
    monkeypatch.setitem(custom._registered, "mine/Env", lambda: gymnasium.make("CartPole-v1"))
    agents = choices("agent")
    tuned = {agent for agent in agents if f"{agent}_{env}" in choices("tuned")}
    for agent in tuned | {agents[number % len(agents)]}:
        check_builds(composed(f"agent={agent}", f"env={env}"))


@pytest.mark.parametrize("tuned", sorted(set(choices("tuned")) - PAIRS))
def test_every_tuned_file_that_is_chosen_by_name(tuned):
    env = next((env for env in choices("env") if env in tuned), "cartpole")
    agents = [agent for agent in choices("agent") if tuned.startswith(f"{agent}_")]
    agent = max(agents, key=len, default="pqn")
    check_builds(composed(f"tuned={tuned}", f"env={env}", f"agent={agent}"))


@pytest.mark.parametrize("protocol", choices("protocol"))
def test_every_protocol_is_made_of_options_that_atari_has(protocol):
    config = composed("env=atari", f"protocol={protocol}")
    env = make_env(config, 1)
    other = env.replicate(1, seed=1, **config["protocol"])
    assert all(other.pool.options[name] == value for name, value in config["protocol"].items())
    other.close()
    env.close()


def starts(game, protocol):
    """The first frames of lanes of two pools, and lives after a second without an action."""
    config = composed("env=atari", f"env.name={game}-v5", f"protocol={protocol}")
    env = make_env(config, 1)
    frames, lives = [], []
    for seed in (1, 2):
        pool = env.replicate(2, seed=seed, **config["protocol"])
        frames += list(pool.pool.envpool.reset()[0][:, -1])
        for _ in range(60):
            _, _, _, _, info = pool.pool.envpool.step(np.zeros(2, int))
        lives += info["lives"].tolist()
        pool.close()
    env.close()
    return frames, lives


def test_games_begin_with_nothing_done_where_dopamines_do():
    frames, _ = starts("Seaquest", "dopamine")
    assert all(np.array_equal(one, frames[0]) for one in frames)  # no numbers of no-ops
    frames, _ = starts("Seaquest", "sticky")
    assert not all(np.array_equal(one, frames[0]) for one in frames)
    _, lives = starts("Breakout", "dopamine")
    assert lives == [5] * 4  # no FIRE: no ball to lose
    _, lives = starts("Breakout", "sticky")
    assert 4 in lives


def test_tuned_values_follow_the_choice_and_yield_to_the_command_line():
    assert composed("env=minatar")["agent"]["lambda_"] == 0.65
    assert composed("env=cartpole")["agent"]["lambda_"] == 0.95
    config = composed("env=minatar", "agent.lambda_=0.5", "total_steps=5e4", "num_envs=16")
    assert config["agent"]["lambda_"] == 0.5
    assert (config["total_steps"], config["num_envs"]) == (50_000, 16)
    assert config["agent"]["learning_rate"] == 5e-4


def leaves(tree, path=""):
    """What is in nested mappings, by dotted keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


@pytest.mark.parametrize("entry", SOURCES["sources"], ids=lambda x: f"{x['tuned']}-{x['source']}")
def test_tuned_values_are_those_of_their_source(entry):
    choices = [f"{group}={entry[group]}" for group in ("agent", "env", "tuned")]
    config, differs = dict(leaves(composed(*choices))), entry.get("differs", [])
    expected = dict(leaves(entry["values"])) | {x["key"]: x["here"] for x in differs}
    assert {key: config[key] for key in expected} == expected
    assert all(x["source"] != x["here"] and x["why"] for x in differs)


def test_every_source_that_a_tuned_file_names_is_compared():
    named = set()
    for path in (CONF / "tuned").glob("*.yaml"):
        comments = " ".join(line.partition("#")[2] for line in path.read_text().splitlines())
        named |= {(path.stem, source) for source in SOURCES["repositories"] if source in comments}
    assert named == {(entry["tuned"], entry["source"]) for entry in SOURCES["sources"]}


def test_options_that_are_null_are_left_to_the_library():
    assert make_agent(composed("num_envs=2"), make_env(composed(), 2)).reward_scale == 0.1
    config = composed("agent.learning_rate_end=null", "agent.schedule_steps=1000")
    agent = make_agent(config, make_env(config, 2))
    assert agent.learning_rate_end == agent.learning_rate
    assert agent.schedule_steps == 1000


@pytest.mark.parametrize(
    "overrides",
    [
        ("env=smax", "env.name=SMAX", "env.attack_mode=null"),
        ("env=overcooked", "env.team_reward=mean"),
        ("env=mpe", "env.name=MPE_simple_speaker_listener_v4"),
        ("env=jaxmarl", "env.name=MPE_simple_speaker_listener_v4"),
    ],
)
def test_agents_that_differ_are_padded_as_the_error_says(overrides):
    assert make_env(composed(*overrides, "env.pad=true"), 2).num_agents > 1


def test_every_argument_of_the_library_is_in_the_configuration():
    of_networks = set(inspect.signature(make_network).parameters)
    for encoder in ENCODERS.values():
        of_networks |= set(inspect.signature(encoder).parameters)
    of_networks |= {"embedding_size"}
    of_networks -= {
        "name", "observation_space", "choices", "num_values", "num_agents", "key", "options",
        "shape",
    }  # fmt: skip
    for name in ("pqn", "dqn"):
        config = composed("tuned=none", f"agent={name}")["agent"]
        cls = getattr(eqx_q, name.upper())
        arguments = inspect.signature(cls.create).parameters.values()
        defaults = {x.name: x.default for x in arguments if x.default is not x.empty}
        for of_env in ("num_agents", "state_size"):  # the environment says those
            del defaults[of_env]
        if name == "dqn":  # whose weights are those of the class
            defaults |= {"alpha": cls.defaults.alpha, "td_weight": cls.defaults.td_weight}
        assert set(config["network_options"]) == of_networks
        for kind, known in KINDS.items():
            part, default = config.pop(kind), defaults.pop(kind)
            assert part.pop("name") == default
            assert not any(part.values())  # null: the part's own default
            listed = set().union(*(inspect.signature(make).parameters for make in known.values()))
            listed -= {"num_agents", "state_size", "key"}
            assert set(part) == listed if kind != "optimizer" else set(part) <= listed
        assert {**config, "network_options": None} == {
            **defaults,
            "_target_": f"eqx_q.{cls.__name__}",
        }
    sampling = {field.name: field.default for field in dataclasses.fields(Sampling)}
    assert {**composed()["sampling"], "seed": 0, "reward_clip": False} == sampling
    emulator = set(envpool.make_spec("Pong-v5").config._fields)
    fixed = {"num_envs", "batch_size", "seed", "env_seed", "base_path", "task", "max_num_players"}
    fixed |= {"gym_reset_return_info"}
    ours = {"suite", "name", "double_buffered"}
    assert set(composed("env=atari")["env"]) - ours == emulator - fixed
