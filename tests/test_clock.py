"""The progress of a run, read from its metrics."""

import numpy as np
import pytest

from eqx_q.clock import Clock, clock

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("metrics", "expected", "noun"),
    [
        ({"env_steps": 5, "total_steps": 9, "loss": 1.0}, Clock(5, 9, "env_steps"), "steps"),
        ({"num_updates": 5, "total_updates": 9}, Clock(5, 9, "num_updates"), "updates"),
        ({"num_updates": 5, "total_steps": 7}, Clock(5, 0, "num_updates"), "updates"),
        ({"env_steps": np.array([3, 3])}, Clock(3, 0, "env_steps"), "steps"),
        ({"num_updates": np.array([3, 4])}, Clock(4, 0, "num_updates"), "updates"),
    ],
)
def test_what_counts(metrics, expected, noun):
    now = clock(metrics)
    assert now == expected and now.noun == noun
    assert type(now.done) is int and type(now.total) is int


def test_metrics_that_do_not_say():
    with pytest.raises(KeyError):
        clock({"loss": 1.0})
