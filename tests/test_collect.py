"""`scripts/collect.py`: what it records, its continuation, and what it refuses."""

import json
import os
import shutil
import signal
from pathlib import Path

import equinox as eqx
import hydra
import jax
import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

import eqx_q
from eqx_q import run as runs
from eqx_q.data import Dataset, Writer
from eqx_q.loops.callbacks import Progress
from eqx_q.run import make_agent, make_env
from eqx_q.saving.checkpoint import save, save_checkpoint
from eqx_q.types import Count

CONF = Path(__file__).resolve().parent.parent / "conf"
SMALL = ["agent.rollout_length=16", "agent.network_options.hidden_sizes=[8]", "num_envs=2"]
SHORT = "+env.max_steps_in_episode=30"


def leave_run(directory, *overrides):
    """A run directory as training leaves it behind, with two checkpoints, after no training."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", [*SMALL, *overrides])
    config = OmegaConf.to_container(composed, resolve=True)
    env = make_env(config, 2 * config["num_seeds"])
    agent = make_agent(config, env)
    for step in (100, 200):
        many = agent.num_members is not None
        agent = eqx.tree_at(
            lambda agent, many=many: (agent.members if many else agent).env_steps,
            agent,
            Count.of(agent.learnt.low * 0 + step),
        )
        if not env.num_agents:
            state = eqx_q.start(agent, env, key=jax.random.key(0))
            save_checkpoint(directory / "checkpoints", state, step)
    save(directory / "agent.eqx", agent)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    env.close()


def returns(dataset, shard):
    rows = slice(shard.start, shard.start + shard.rows)
    starts = np.flatnonzero(dataset.rows.first[rows])
    return np.add.reduceat(dataset.rows.reward[rows], starts)


def test_a_trained_run_becomes_a_data_set(script, tmp_path):
    options = ["tracker=jsonl", "eval.every=0", "video.every=0", "total_steps=500", *SMALL, SHORT]
    assert script("train", *options, "agent.num_minibatches=2", "hydra.run.dir=run")[0] == 0
    status, out, err = script("collect", "run=run", "steps=1e3", "out=data/expert", "num_envs=3")
    assert status == 0, err
    dataset = Dataset(tmp_path / "data" / "expert")
    dataset.verify()
    (shard,) = dataset.shards
    assert dataset.num_transitions == 1000 and shard.name == "0000-run0-step512-eps0"
    assert dataset.description.env == "gymnax/CartPole-v1"
    source = dataset.description.source
    assert (
        source["runs"] == [str(tmp_path / "run")]
        and source["num_envs"] == 3
        and source["epsilons"] == [0.0]
    )
    assert source["env_options"]["max_steps_in_episode"] == 30
    assert shard.source["env_steps"] == 512 and shard.source["epsilon"] == 0
    whole = returns(dataset, shard)[: shard.source["episodes"]]
    assert shard.source["return_mean"] == pytest.approx(whole.mean())
    assert f"{whole.mean():.2f}" in out and "1,000 transitions" in out and "MB" in out
    assert "1,000/1,000 steps (100%)" in err


def test_a_mixture_of_runs_seeds_checkpoints_and_epsilons(script, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.collecting, "_STEPS_PER_SHARD", 60)
    leave_run(tmp_path / "a", "num_seeds=2", SHORT)
    leave_run(tmp_path / "b", "seed=7", SHORT)
    status, out, err = script(
        "collect", "run=[a,b]", "checkpoints=all", "epsilon=[0.1,1.0]", "steps=1201", "out=mixed"
    )
    assert status == 0, err
    dataset = Dataset(tmp_path / "mixed")
    # 3 agents x 2 checkpoints x 2 epsilons: 101 steps for the first of them, 100 for the others.
    made = [shard.source["transitions"] for shard in dataset.shards]
    assert made == [51, 50] + 11 * [50, 50] and dataset.num_transitions == 1201
    assert [shard.run for shard in dataset.shards] == [0] * 8 + [1] * 8 + [2] * 8
    sources = [shard.source for shard in dataset.shards[::2]]
    assert [source["member"] for source in sources] == [0] * 4 + [1] * 4 + [None] * 4
    assert [source["env_steps"] for source in sources] == [100, 100, 200, 200] * 3
    assert [source["epsilon"] for source in sources] == [0.1, 1.0] * 6
    assert sources[-1]["agent"] == str(tmp_path / "b" / "checkpoints" / "000000000200.ckpt")
    assert len({shard.name for shard in dataset.shards}) == 24 and dataset.shards[3].name in out


def test_every_member_plays_with_its_own_parameters(script, tmp_path):
    leave_run(tmp_path / "both", "num_seeds=2", SHORT)
    leave_run(tmp_path / "second", "seed=1", SHORT)
    assert script("collect", "run=both", "steps=200", "out=x", "seed=3")[0] == 0
    both = Dataset(tmp_path / "x")
    assert script("collect", "run=[second,both]", "steps=300", "out=y", "seed=3")[0] == 0
    alone = Dataset(tmp_path / "y")
    second = eqx_q.load(tmp_path / "second" / "agent.eqx")
    member = eqx_q.load(tmp_path / "both" / "agent.eqx").member(1)
    for dataset, shard, agent in (
        (alone, alone.shards[0], second),
        (both, both.shards[1], member),
    ):
        rows = slice(shard.start, shard.start + shard.rows)
        acted = dataset.rows.action[rows] >= 0
        greedy = agent.act(dataset.rows.obs[rows]).action
        np.testing.assert_array_equal(greedy[acted], dataset.rows.action[rows][acted])
    other = both.rows.action[: both.shards[0].rows]
    acted = other >= 0
    greedy = np.asarray(member.act(both.rows.obs[: both.shards[0].rows]).action)
    assert np.any(greedy[acted] != other[acted])


def test_what_was_interrupted_goes_on(script, tmp_path, monkeypatch):
    leave_run(tmp_path / "run", SHORT)
    command = ["collect", "run=run", "epsilon=[0.0,0.5,1.0]", "steps=900"]
    shows = []
    show = Progress.__call__

    def interrupt(self, run_state, metrics):
        show(self, run_state, metrics)
        shows.append(metrics["env_steps"])
        if 300 < metrics["env_steps"] < 600:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "__call__", interrupt)
        status, _, err = script(*command, "out=data")
    assert status == 1
    assert "stopped: 1 of 3 shards are kept next to 'data'; the same command continues" in err
    assert not (tmp_path / "data").exists() and shows[-1] < 600
    status, _, err = script(*command, "steps=901", "out=data")
    assert status == 1 and "the beginning of another data set" in err
    status, _, err = script(*command, "out=data")
    assert status == 0, err
    assert script(*command, "out=at_once")[0] == 0
    resumed, at_once = Dataset(tmp_path / "data"), Dataset(tmp_path / "at_once")
    assert resumed.shards == at_once.shards and resumed.description == at_once.description
    jax.tree.map(np.testing.assert_array_equal, resumed.rows, at_once.rows)


def test_a_team_is_recorded(script, tmp_path):
    leave_run(tmp_path / "team", "agent=pqn_vdn", "env=mpe")
    status, _, err = script("collect", "run=team", "steps=60", "out=data", "num_envs=2")
    assert status == 0, err
    dataset = Dataset(tmp_path / "data")
    agent = eqx_q.load(tmp_path / "team" / "agent.eqx")
    rows, acted = dataset.rows, dataset.rows.acted
    assert dataset.description.num_agents == 3 and rows.obs.shape[1] == rows.action.shape[1] == 3
    np.testing.assert_array_equal(agent.act(rows.obs).action[acted], rows.action[acted])


def test_an_agent_with_memory_is_recorded(script, tmp_path):
    """As it acts, episode by episode."""
    leave_run(tmp_path / "run", "agent=pqn_rnn", SHORT)
    status, _, err = script("collect", "run=run", "steps=60", "out=data", "num_envs=2")
    assert status == 0, err
    agent = eqx_q.load(tmp_path / "run" / "agent.eqx")
    for episode in Dataset(tmp_path / "data").episodes():
        memory, reward = agent.initial_memory(1), np.zeros(1, np.float32)
        for t in range(len(episode.action) - 1):
            first = episode.first[t : t + 1]
            decision = agent.act(episode.obs[t : t + 1], memory, first=first, reward=reward)
            memory, reward = decision.memory, episode.reward[t : t + 1]
            assert decision.action[0] == episode.action[t]


def test_games_of_atari_are_whole_and_unclipped(script, tmp_path):
    atari = ["env=atari", "env.name=Breakout-v5", "env.num_threads=1"]
    leave_run(tmp_path / "run", "num_seeds=2", *atari)
    command = ["collect", "run=run", "steps=60", "epsilon=1", "num_envs=2", "protocol=sticky"]
    status, _, err = script(*command, "out=data")
    assert status == 0, err
    dataset = Dataset(tmp_path / "data")
    assert dataset.rows.obs.shape[1:] == (84, 84) and dataset.rows.obs.dtype == np.uint8
    options = dataset.description.source["env_options"]
    assert not options["episodic_life"] and not options["reward_clip"]
    assert options["repeat_action_probability"] == 0.25
    assert dataset.description.preprocessing["repeat_action_probability"] == 0.25
    assert [shard.run for shard in dataset.shards] == [0, 1]


def test_bad_input_is_one_line_before_anything_is_played(script, tmp_path, monkeypatch):
    leave_run(tmp_path / "run", SHORT)
    leave_run(tmp_path / "other", "env=acrobot")
    leave_run(tmp_path / "begun", SHORT)
    (tmp_path / "begun" / "agent.eqx").unlink()
    (tmp_path / "there").mkdir()

    def check(message, *arguments):
        status, out, err = script("collect", *arguments)
        assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, (out, err)
        assert message in err
        assert not list(tmp_path.glob("*.partial"))

    check("there is no run to record: give run=DIR", "out=data")
    check("there is no directory for the data set: give out=DIR", "run=run")
    check("'nowhere' is not a run directory", "run=nowhere", "out=data")
    check("finish it with", "run=begun", "out=data")
    check("'there' exists already", "run=run", "out=there")
    check("epsilon=1.5: give a number from 0 to 1", "run=run", "out=data", "epsilon=1.5")
    check("epsilon=2.0: give a number from 0 to 1", "run=run", "out=data", "epsilon=[0.1,2]")
    check("epsilon=much: give a number", "run=run", "out=data", "epsilon=much")
    check("run or epsilon is an empty list", "run=run", "out=data", "epsilon=[]")
    check("steps=0: give a whole number of at least 1", "run=run", "out=data", "steps=0")
    check("too few for 2 agents", "run=run", "out=data", "steps=1", "epsilon=[0,1]")
    check("has no checkpoint of step 5: there are 100, 200", "run=run", "out=d", "checkpoints=[5]")
    check("checkpoints=every: give a whole number", "run=run", "out=d", "checkpoints=every")
    check("was not trained in the environment of 'run'", "run=[run,other]", "out=data")
    check("lower num_envs", "run=run", "out=data", "num_envs=20_000_000")
    check("unknown option 'step'", "run=run", "out=data", "step=5")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    check("takes about 0.027 GB, but 0.01 GB are free", "run=run", "out=deep/data")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    check("there are no checkpoints in 'run'", "run=run", "out=data", "checkpoints=all")


def test_checkpoints_serve_where_the_run_has_no_end(script, tmp_path):
    leave_run(tmp_path / "run", SHORT)
    (tmp_path / "run" / "agent.eqx").unlink()
    arguments = ["run=run", "checkpoints=[200]", "steps=50", "out=data"]
    status, _, err = script("collect", *arguments)
    assert status == 0, err
    header = json.loads((tmp_path / "data" / "header.json").read_text())
    assert header["shards"][0]["source"]["env_steps"] == 200


def test_a_damaged_checkpoint_is_found_before_anything_is_played(script, tmp_path):
    leave_run(tmp_path / "run", SHORT)
    newest = tmp_path / "run" / "checkpoints" / "000000000200.ckpt"
    for path in (newest, newest.with_name("000000000100.ckpt")):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        status, out, err = script("collect", "run=run", "checkpoints=all", "steps=50", "out=data")
        assert status == 1, out
        assert f"{path.name}' is damaged" in err and not list(tmp_path.glob("*.partial"))
        path.write_bytes(data)


def test_a_run_is_the_same_however_its_path_is_written(script, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.collecting, "_STEPS_PER_SHARD", 30)
    leave_run(tmp_path / "run", SHORT)
    command = ["steps=60", "out=data"]

    def full(self, *arguments, **options):
        if self.done:
            raise KeyboardInterrupt
        commit(self, *arguments, **options)

    commit = Writer.commit
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "commit", full)
        assert script("collect", "run=run", *command)[0] == 1
    (tmp_path / "link").symlink_to(tmp_path / "run")
    status, _, err = script("collect", f"run={tmp_path}/./link/", *command)
    assert status == 0, err
    dataset = Dataset(tmp_path / "data")
    assert len(dataset.shards) == 2
    assert dataset.description.source["runs"] == [str(tmp_path.resolve() / "run")]
