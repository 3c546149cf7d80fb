"""Several trackers at once."""

import logging

import numpy as np
import pytest

from eqx_q.tracking import JsonlTracker, Tracker, Trackers

pytestmark = pytest.mark.quick


class Broken(Tracker):
    def log(self, metrics, step):
        raise RuntimeError("out of order")

    log_params = log_gif = close = log


class Recorder(Tracker):
    def __init__(self):
        self.calls = []

    def log(self, metrics, step):
        self.calls.append(("log", dict(metrics), step))

    def log_params(self, params):
        self.calls.append(("params", params))

    def log_gif(self, path, step, name="episode"):
        self.calls.append(("gif", path, step, name))

    def close(self):
        self.calls.append(("close",))


def test_a_broken_tracker_does_not_stop_the_others(caplog, tmp_path):
    first, last = Recorder(), Recorder()
    trackers = Trackers(first, Broken(), last)
    with caplog.at_level(logging.WARNING):
        trackers({"any": "run state"}, {"env_steps": np.array([3, 3]), "loss": 1.0})
        trackers.log_params({"a": 1})
        trackers.log_gif("a.gif", 4)
        trackers.close()
    assert [call[0] for call in first.calls] == ["log", "params", "gif", "close"]
    assert str(first.calls) == str(last.calls)
    assert first.calls[0][2] == 3 and first.calls[2] == ("gif", "a.gif", 4, "episode")
    assert len(caplog.records) == 1 and "Broken failed" in caplog.text


def test_a_jsonl_tracker_is_a_tracker(tmp_path):
    tracker = JsonlTracker(tmp_path / "a")
    assert isinstance(tracker, Tracker)
    tracker.close()
