"""Host runs that are killed and resumed with `exact_resume=true`."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_settings import settings

from eqx_q.agents import Rollouts
from eqx_q.errors import UsageError
from eqx_q.run.training import _exact
from eqx_q.saving.checkpoint import checkpoints, load
from eqx_q.wrappers import Exact, make

SMALL = [
    *("tracker=jsonl", "eval.every=0", "video.every=0", "num_envs=4", "agent.rollout_length=8"),
    *("agent.num_minibatches=2", "agent.num_epochs=1", "agent.network_options.hidden_sizes=[8]"),
    *("checkpoint.every=64", "checkpoint.keep=null", "hydra.run.dir=run"),
]
ATARI = [
    *("env=atari", "env.name=Breakout-v5", "env.max_episode_steps=20"),
    *("env.img_height=21", "env.img_width=21", "agent.network=mlp"),
]
CARTPOLE = ["env=gymnasium", "agent=pqn_rnn", "agent.network_options.memory=gru"]


def kill(run, after):
    """Leaves what a kill leaves when so many checkpoints are there."""
    for name in ("agent.eqx", "summary.json"):
        (run / name).unlink()
    for path in checkpoints(run / "checkpoints")[:-after]:
        path.unlink()


def same(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_a_killed_run_on_atari_ends_as_one_that_was_not(script, tmp_path):
    assert script("train", *SMALL, *ATARI, "exact_resume=true", "total_steps=512")[0] == 0
    run = tmp_path / "run"
    whole = load(run / "agent.eqx")
    kill(run, after=3)
    status, out, err = script("train", "resume=run")
    assert status == 0 and "replaying 48 steps of 4 lanes" in out + err
    assert same(load(run / "agent.eqx"), whole)


def test_a_killed_run_with_memory_ends_as_one_that_was_not(script, tmp_path):
    """It then becomes longer, and that too is exact; but not what is resumed in another way."""
    assert script("train", *SMALL, *CARTPOLE, "exact_resume=true", "total_steps=384")[0] == 0
    run, other = tmp_path / "run", tmp_path / "other"
    whole = load(run / "agent.eqx")
    kill(run, after=3)
    shutil.copytree(run, other)
    status, out, err = script("train", "resume=run")
    assert status == 0 and "replaying 48 steps of 4 lanes" in out + err
    assert same(load(run / "agent.eqx"), whole)

    status, out, err = script("train", "resume=run", "total_steps=400")
    assert status == 0 and "replaying 96 steps of 4 lanes" in out + err
    kept = load(checkpoints(run / "checkpoints")[0]).env_state
    assert kept.actions.shape == (4, 104) and kept.actions.dtype == np.uint8
    assert (np.asarray(kept.steps) == 104).all()

    status, out, err = script("train", "resume=other", "exact_resume=false")
    assert status == 0 and "they start new episodes" in out + err
    assert not same(load(other / "agent.eqx"), whole)
    status, _, err = script("train", "resume=other", "exact_resume=true", "total_steps=600")
    assert status == 1 and "cannot be replayed: resume with exact_resume=false" in err


def test_only_what_needs_it_is_kept(monkeypatch):
    env, host_env = make("gymnax/CartPole-v1", 2), make("gymnasium/CartPole-v1", 2)
    agent = SimpleNamespace(learns_from=Rollouts(length=8))
    wanted = settings("exact_resume=true", "total_steps=33", "num_envs=2")
    assert _exact(wanted, agent, env) is env
    kept = _exact(wanted, agent, host_env)
    assert isinstance(kept, Exact) and kept.capacity == 24
    for without in ({"exact_resume": False}, {"data": "somewhere"}):
        assert _exact(dataclasses.replace(wanted, **without), agent, host_env) is host_env
    by_evaluation = settings("exact_resume=true", "pbt.every=9", "pbt.fitness=eval/return")
    with pytest.raises(UsageError, match=r"give pbt\.fitness=episode_return"):
        _exact(by_evaluation, agent, host_env)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UsageError, match="exact_resume=true is for one process"):
        _exact(wanted, agent, host_env)
    host_env.close()
