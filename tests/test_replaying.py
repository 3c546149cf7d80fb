"""A run that diverges saves the update that diverged."""

import json

import numpy as np
import pytest

from eqx_q.saving.checkpoint import load

DIVERGING = [
    "tracker=jsonl", "eval.every=0", "video.every=0", "num_envs=4", "total_steps=6400",
    "agent.rollout_length=16", "agent.num_minibatches=4", "agent.num_epochs=1",
    "agent.network_options={hidden_sizes: [16], norm: none}", "agent.optimizer=sgd",
    "agent.learning_rate=10", "agent.max_grad_norm=1e30", "hydra.run.dir=run",
]  # fmt: skip


@pytest.mark.parametrize("kind", [[], ["num_seeds=2"]])
def test_the_update_that_diverged_is_found_again(script, tmp_path, kind):
    status, _, err = script("train", *DIVERGING, *kind, "log_every=10")
    assert status == 1 and "the loss is not finite after 640 steps" in err
    assert "`python scripts/replay.py run=" in err and err.count("\n") == 1
    status, out, err = script("replay", "run=run", "rows=1")
    assert status == 0, err
    assert "the loss is not finite after " in out and "640 steps" not in out
    assert "all inputs of the update are finite" in out
    update = load(tmp_path / "run" / "diverged_update.eqx")
    before = np.max(update["agent"].learnt)
    assert f"after {before + 64} steps" in out
    assert out.splitlines()[-1].split()[0] == str(before)  # the last good one
    _, metrics = update["agent"].update(update["experience"], key=update["key"])
    assert not np.any(np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"]))


def test_what_cannot_be_replayed_is_told(script, tmp_path):
    status, _, err = script("replay")
    assert (status, err) == (1, "error: there is no run to replay: give run=DIR\n")
    finite = [*DIVERGING, "agent.learning_rate=1e-4", "log_every=10"]
    assert script("train", *finite, "total_steps=128")[0] == 0
    status, _, err = script("replay", "run=run")
    assert status == 1 and "this run has not diverged" in err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "done"
