"""Population-based training: who copies whom, what is copied and perturbed, and resuming."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import hydra
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

import eqx_q
from eqx_q.agents import Batches, Rollouts
from eqx_q.errors import UnknownNameError, UsageError
from eqx_q.loops.callbacks import Checkpoint, restore
from eqx_q.loops.evolution import PopulationBasedTraining, scale, spread
from eqx_q.run import read_settings, training

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["learning_rate", "lambda_"]


@pytest.fixture(scope="module")
def env():
    return eqx_q.make("gymnax/CartPole-v1", num_envs=16)


@pytest.fixture(scope="module")
def population(env):
    @eqx.filter_vmap
    def create(key, learning_rate):
        return eqx_q.PQN.create(
            env.observation_space,
            env.action_space,
            key=key,
            network_options={"hidden_sizes": [8]},
            rollout_length=8,
            num_epochs=1,
            num_minibatches=1,
            learning_rate=learning_rate,
        )

    keys = jax.random.split(jax.random.key(0), 8)
    return eqx_q.Population(create(keys, jnp.linspace(1e-3, 8e-3, 8)))


def assert_same(ours, theirs):
    assert eqx.tree_equal(ours, theirs)


def without(agent):
    """All of it but what is perturbed."""
    changed = [*NAMES, "learning_rate_end"]
    return eqx.tree_at(lambda a: [getattr(a, name) for name in changed], agent, [0.0] * 3)


def test_the_worst_copy_the_best_whole_and_perturb_what_they_copied(env, population):
    state = eqx_q.start(population, env, key=jax.random.key(1))
    state, _ = eqx.filter_jit(eqx_q.advance)(state, env, 2)
    fitness = np.array([5.0, 1.0, 9.0, 4.0, 3.0, np.nan, 8.0, 6.0])  # of one nothing is known
    parents = set()
    for seed in range(8):
        callback = PopulationBasedTraining(NAMES, every=1, seed=seed)
        metrics = {"episode_return": fitness, "done": False}
        new = callback(state, metrics)
        parent = metrics["pbt/parent"].tolist()
        for member in (0, 2, 3, 5, 6, 7):
            assert parent[member] == member
            assert_same(new.agent.member(member), state.agent.member(member))
        for member in (1, 4):  # the worst two
            assert parent[member] in (2, 6)  # the best two
            ours, theirs = new.agent.member(member), state.agent.member(parent[member])
            assert_same(without(ours), without(theirs))
            factors = [float(getattr(ours, n) / getattr(theirs, n)) for n in NAMES]
            assert all(min(abs(f - 0.8), abs(f - 1.2)) < 1e-5 for f in factors)
            parents.add((member, int(parent[member]), *np.round(factors, 1)))
        np.testing.assert_array_equal(metrics["pbt/lambda_"], new.agent.members.lambda_)
        assert_same(new.env_state, state.env_state)
        assert_same(callback(state, {"episode_return": fitness, "done": False}), new)
        assert callback(state, {"episode_return": fitness, "done": True}) is None
        alone = np.where(np.arange(8) == 3, 1.0, np.nan)
        assert callback(state, {"episode_return": alone, "done": False}) is None
    assert {p[1] for p in parents} == {2, 6} and len({p[2:] for p in parents}) == 4


def test_hyperparameters_stay_where_they_make_sense(population):
    scaled = scale(population, {"lambda_": np.full(8, 10.0), "reward_scale": np.arange(8.0)})
    np.testing.assert_array_equal(scaled.members.lambda_, np.ones(8))
    np.testing.assert_array_equal(scaled.members.reward_scale, np.arange(8.0))
    rates = spread(population, ["learning_rate"], 3.0, seed=0).members.learning_rate
    factors = np.asarray(rates / population.members.learning_rate)
    assert len(set(factors)) == 8 and 1 / 3 <= factors.min() < 1 < factors.max() <= 3
    assert_same(spread(population, ["learning_rate"], 1.0, seed=0), population)


def test_the_end_of_the_learning_rate_follows_it_unless_it_is_named(population):
    population = population.with_hyperparameters({"learning_rate_end": 0.25e-3})
    rates = population.members
    factors = np.arange(1.0, 9.0)
    both = scale(population, {"learning_rate": factors}).members
    np.testing.assert_allclose(both.learning_rate, rates.learning_rate * factors, rtol=1e-6)
    np.testing.assert_allclose(both.learning_rate_end, 0.25e-3 * factors, rtol=1e-6)
    named = scale(population, {"learning_rate": factors, "learning_rate_end": np.ones(8)}).members
    np.testing.assert_allclose(named.learning_rate_end, 0.25e-3, rtol=1e-6)
    other = scale(population, {"lambda_": np.ones(8)}).members
    np.testing.assert_array_equal(other.learning_rate_end, rates.learning_rate_end)


def test_bad_input(env, population):
    state = eqx_q.start(population, env, key=jax.random.key(1))
    metrics = {"episode_return": np.ones(8), "done": False}
    with pytest.raises(UnknownNameError, match="'lamda': the nearest are lambda_"):
        PopulationBasedTraining(["lamda"], every=1)(state, metrics)
    with pytest.raises(UnknownNameError, match="'episode_retrun': the nearest are episode_return"):
        PopulationBasedTraining(NAMES, every=1, fitness="episode_retrun")(state, metrics)
    with pytest.raises(UsageError, match=r"fraction=0.1 replaces none of 8 members"):
        PopulationBasedTraining(NAMES, every=1, fraction=0.1)(state, metrics)
    for factors in ([], [0.8, -1.2]):
        with pytest.raises(UsageError, match=r"factors=\[.*give positive numbers"):
            PopulationBasedTraining(NAMES, every=1, factors=factors)
    with pytest.raises(UsageError, match=r"of at most 0.5"):
        PopulationBasedTraining(NAMES, every=1, fraction=0.6)


def test_a_resumed_run_is_the_same(env, population, tmp_path):
    def train(total_steps, callbacks, **options):
        evolution = PopulationBasedTraining(NAMES, every=64)
        return eqx_q.train(
            population,
            env,
            total_steps=total_steps,
            key=jax.random.key(1),
            callbacks=[evolution, *callbacks],
            log_every=4,
            **options,
        )[0]

    whole = train(320, [Checkpoint(tmp_path, every=192, keep=9)])
    (tmp_path / "000000000320.ckpt").unlink()
    run_state = restore(tmp_path, env)
    assert int(run_state.num_updates) == 12
    again = train(320, [], run_state=run_state)
    assert_same(again, whole)
    ours, theirs = whole.members.learning_rate, population.members.learning_rate
    assert not np.array_equal(ours, theirs)


def test_nothing_cuts_a_round_of_which_members_are_judged():
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["pbt.every=100", "num_envs=4", "total_steps=10_000"]
        told = hydra.compose("config", [*overrides, "eval.every=300", "video.every=0"])
        config = OmegaConf.to_container(told, resolve=True)
    agent = SimpleNamespace(learns_from=Rollouts(16))

    def in_rounds(agent, **changes):
        settings = dataclasses.replace(read_settings(config), **changes)
        return training._in_rounds(settings, settings.pbt, agent)

    settings, evolution = in_rounds(agent)
    assert (evolution.every, settings.log_every) == (128, 2)  # updates make 64 steps
    assert (settings.eval.every, settings.video.every) == (384, 0)
    assert settings.eval.time_fraction == 0.1
    config["pbt"]["fitness"], config["log_every"] = "eval/return", 1
    settings, _ = in_rounds(agent)
    assert (settings.eval.every, settings.eval.time_fraction) == (128, None)
    assert settings.log_every == 1
    from_data = SimpleNamespace(learns_from=Batches(8))
    assert in_rounds(from_data)[1].every == 100


def test_from_the_command_line(script, tmp_path):
    options = ["tracker=jsonl", "num_envs=4", "agent.rollout_length=16", "agent.num_minibatches=4"]
    options += ["agent.num_epochs=1", "agent.network_options.hidden_sizes=[8]", "eval.every=0"]
    options += ["video.every=0", "num_seeds=4", "hydra.run.dir=run", "total_steps=768"]
    evolution = ["pbt.every=256", "pbt.hyperparameters=[learning_rate,lambda_]", "pbt.spread=2"]
    status, _, err = script("train", *options, *evolution)
    assert status == 0, err

    def rows():
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    before = rows()
    assert [row["env_steps"] for row in before] == [256, 512, 768]  # a chunk a round
    assert [sum(np.not_equal(row["pbt/parent"], range(4))) for row in before[:2]] == [1, 1]
    rates = before[1]["pbt/learning_rate"]
    assert len(set(rates)) == 4 and all(5e-5 / 1.5 < rate < 2e-4 * 1.5 for rate in rates)

    # What has evolved goes on evolving.
    status, _, err = script("train", "resume=run", "total_steps=1280")
    assert status == 0, err
    later = rows()[3]
    copied = np.not_equal(later["pbt/parent"], range(4))
    factors = np.array(later["pbt/learning_rate"]) / np.array(rates)[later["pbt/parent"]]
    np.testing.assert_allclose(factors[~copied], 1)
    assert np.isclose(factors[copied], [0.8, 1.2]).any()
    status, _, err = script("train", *options[:-2], *evolution, "num_seeds=1", "hydra.run.dir=b")
    assert status == 1 and "fraction=0.25 replaces none of 1 members" in err
    status, _, err = script("train", "resume=run", "pbt.every=1")
    assert status == 1 and "leave out 'pbt.every=1'" in err
