"""Offline runs by the scripts: their files, their continuation, what they refuse."""

import json
import os
import signal

import equinox as eqx
import jax
import numpy as np
import pytest
from test_cli import QUIET, SMALL

import eqx_q
from eqx_q.data import Dataset
from eqx_q.loops.callbacks import Evaluation
from eqx_q.saving.checkpoint import load

LEARNER = [
    "tracker=jsonl",
    "video.every=0",
    "agent.network_options.hidden_sizes=[16]",
    "agent.batch_size=8",
    "agent.target_update_period=20",
    "eval.num_envs=2",
]


@pytest.fixture
def data(script, tmp_path):
    """A teacher's play, recorded: 400 transitions."""
    assert script("train", *SMALL, *QUIET, "total_steps=64", "hydra.run.dir=teacher")[0] == 0
    status, _, err = script("collect", "run=teacher", "steps=400", "epsilon=1", "out=data")
    assert status == 0, err
    return Dataset(tmp_path / "data")


@pytest.mark.parametrize("agent", ["dqn", "cql", "bc"])
def test_the_circle_from_play_to_an_agent_that_was_never_in_the_environment(
    agent, data, script, tmp_path
):
    options = [f"agent={agent}", "data=data", "num_updates=100", "num_seeds=2", "eval.every=50"]
    status, out, err = script("train", *LEARNER, *options, "hydra.run.dir=run")
    assert status == 0, err
    assert "400 transitions" in out
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["num_updates"]) == ("done", 100)
    of_data = summary["data"]
    assert (of_data["transitions"], of_data["env"]) == (400, "gymnax/CartPole-v1")
    assert (of_data["path"], of_data["checksum"]) == (str(data.path), data.checksum)
    assert summary["updates_per_second"] == pytest.approx(100 / summary["train_seconds"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = np.array([row["eval/return"] for row in rows if "eval/return" in row])
    assert evaluations.shape[1] == 2
    np.testing.assert_allclose(summary["eval_return_per_seed"], evaluations[-1])
    np.testing.assert_allclose(summary["best_eval_return_per_seed"], evaluations.max(0))
    assert set(summary["best_eval_num_updates_per_seed"]) <= {50, 100}
    learner = load(run / "agent.eqx").member(0)
    assert type(learner) is getattr(eqx_q, agent.upper()) and learner.num_updates == 100
    expected = {"dqn": (0, 1), "cql": (0.1, 1), "bc": (1, 0)}[agent]
    np.testing.assert_allclose((learner.alpha, learner.td_weight), expected)

    assert script("export", "run=run", "member=0", "platforms=[cpu]")[0] == 0
    card = (run / "export" / "README.md").read_text()
    assert f"| agent | `eqx_q.{agent.upper()}`" in card
    assert "400 transitions in" in card and data.checksum in card

    assert script("evaluate", "run=run", "episodes=2")[0] == 0
    result = json.loads((run / "evaluation_as_trained.json").read_text())
    assert result["num_updates"] == 100 and np.shape(result["returns"]) == (2, 2)
    status, _, err = script("collect", "run=run", "steps=20", "out=again")
    assert status == 0, err


def test_interrupted_and_resumed_it_ends_the_same(data, script, tmp_path, monkeypatch):
    options = [*LEARNER, "agent=cql", "data=data", "num_updates=120", "eval.every=30"]
    options += ["eval.time_fraction=null"]
    options += ["sampling.priority_exponent=0.5", "checkpoint.keep=null"]
    assert script("train", *options, "hydra.run.dir=whole")[0] == 0
    evaluate, calls = Evaluation.__call__, []

    def interrupt(self, run_state, metrics):
        calls.append(metrics["num_updates"])
        if metrics["num_updates"] == 60:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, run_state, metrics)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluation, "__call__", interrupt)
        status, out, _ = script("train", *options, "hydra.run.dir=cut", "log_every=30")
        assert status == 0 and "stopped: continue with `python scripts/train.py resume=" in out
    assert json.loads((tmp_path / "cut/summary.json").read_text())["status"] == "stopped"
    status, _, err = script("train", "resume=cut", "sampling.fraction=0.5")
    assert status == 1 and "leave out 'sampling.fraction=0.5'" in err
    status, _, err = script("train", "resume=cut")
    assert status == 0, err
    whole, cut = load(tmp_path / "whole" / "agent.eqx"), load(tmp_path / "cut" / "agent.eqx")
    assert type(cut) is eqx_q.CQL and cut.num_updates == 120
    for ours, theirs in zip(*map(_leaves, (whole, cut)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    status, _, err = script("train", "resume=cut")
    assert status == 1 and "has completed its 120 updates: give a larger num_updates" in err
    best = [json.loads((tmp_path / x / "summary.json").read_text()) for x in ("whole", "cut")]
    for name in ("best_eval_return_per_seed", "best_eval_num_updates_per_seed"):
        assert best[0][name] == best[1][name]
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) >= 10


def _leaves(agent):
    return [np.asarray(x) for x in (agent.network.head.linear.weight, agent.learning_rate)]


BAD = {
    ("agent=cql",): "this agent learns from recorded data: give data=DIR",
    ("data=data",): "this agent learns from environments, so data=... is not supported",
    ("agent=cql", "data=nothing"): "nothing' is not a data set, since it has no header.json",
    ("agent=cql", "data=data", "env=acrobot"): "is of gymnax/CartPole-v1, but the environment is",
    ("agent=cql", "data=data", "env=cartpole", "+env.observe=[0,2]"): "data' has observations",
    ("agent=cql", "data=data", "sampling.fraction=2"): "fraction=2: give a number above 0, up to 1",
    ("agent=cql", "data=data", "sampling.by=game"): "unknown by 'game': known are episode,",
    ("agent=cql", "data=data", "sampling.runs=[7]"): "has no run 7: it has 0",
    ("agent=cql", "data=data", "sampling.memory_gb=1e-9"): "raise memory_gb",
    ("agent=cql", "data=data", "agent.td_loss=hubert"): "unknown td_loss 'hubert': the nearest",
    ("agent=cql", "data=data", "agent.alpha=-1"): "alpha=-1 is out of range",
    ("agent=cql", "data=data", "num_updates=0"): "give a whole number of at least 1",
}


def test_bad_input_ends_with_one_line(data, script, tmp_path):
    for overrides, message in BAD.items():
        status, _, err = script("train", *overrides, "tracker=jsonl", "hydra.run.dir=bad")
        assert status == 1, overrides
        assert message in err, (overrides, err)
        assert err.count("error:") == 1 and "Traceback" not in err
        assert not (tmp_path / "bad" / "config.yaml").exists()
    path = tmp_path / "data" / "obs.npy"
    bytes_ = bytearray(path.read_bytes())
    bytes_[-1] ^= 1
    path.write_bytes(bytes_)
    status, _, err = script("train", "agent=cql", "data=data", "hydra.run.dir=bad")
    assert status == 1 and "obs.npy' is damaged, its checksum is wrong" in err


@pytest.mark.parametrize("learning_rate", [100, 1e30])
def test_from_data_the_update_that_diverged_is_found_again(data, script, tmp_path, learning_rate):
    """Sooner or later, or the first one."""
    options = ["agent=dqn", "data=data", "num_updates=400", "eval.every=0", "log_every=100"]
    options += ["agent.optimizer=sgd", f"agent.learning_rate={learning_rate}"]
    options += ["agent.network_options={hidden_sizes: [16], norm: none}"]
    options += ["agent.value.td_loss=squared", "sampling.priority_exponent=0.5"]
    status, _, err = script("train", *LEARNER, *options, "hydra.run.dir=run")
    assert status == 1 and "the loss is not finite after 100 updates" in err
    status, out, err = script("replay", "run=run")
    assert status == 0, err
    assert "the loss is not finite after " in out and "100 updates" not in out
    assert "all inputs of the update are finite" in out
    update = load(tmp_path / "run" / "diverged_update.eqx")
    assert update["experience"].weight is not None
    agent, metrics = update["agent"].update(update["experience"], key=update["key"])
    network = jax.tree.leaves(eqx.filter(agent.network, eqx.is_array))
    finite = [np.all(np.isfinite(x)) for x in [metrics["loss"], metrics["grad_norm"], *network]]
    assert not all(finite)
