import memory
import pytest


def test_a_run_is_watched_and_summed_up():
    samples = memory.run(
        ["env=cartpole", "eval.every=0", "num_envs=4", "agent.num_minibatches=4"], 20_000
    )
    assert 50 < max(samples) < 20_000  # megabytes, of a process that has imported JAX
    summary = memory.summarise([1.0, 3.0, *[2.0] * 38])
    assert summary == {"peak_mb": 3.0, "through_the_run_mb": [2.0] * 20}


def test_a_run_that_fails_ends_it():
    with pytest.raises(SystemExit, match=r"scripts/train.py failed"):
        memory.run(["env=nonsense"], 1)
