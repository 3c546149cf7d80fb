"""Names of metrics in trackers."""

import pytest

from eqx_q.tracking import series

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("eval/return", "eval/return"),
        ("eval/won", "eval/won"),
        ("episode_return", "train/return"),
        ("episode_length", "train/length"),
        ("episode_won", "train/won"),
        ("episodes", "train/episodes"),
        ("q_value", "train/q_value"),
        ("learning_rate", "train/learning_rate"),
        ("loss", "loss/loss"),
        ("td_error", "loss/td_error"),
        ("conservative_gap", "loss/conservative_gap"),
        ("steps_per_second", "time/steps_per_second"),
        ("train_seconds", "time/train_seconds"),
        ("eval/seconds", "time/eval_seconds"),
        ("mine/anything", "mine/anything"),
        ("compile_seconds", None),
        ("total_updates", None),
        ("env_steps", None),
        ("done", None),
    ],
)
def test_a_metric_has_a_series(metric, expected):
    assert series(metric) == expected
