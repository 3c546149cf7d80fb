"""Lines of JSON: what is in them, and what is left of them after an accident."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from eqx_q.errors import UsageError
from eqx_q.saving.files import unseal
from eqx_q.tracking import JsonlTracker

pytestmark = pytest.mark.quick


def read(path):
    return [unseal(json.loads(line)) for line in path.read_text().splitlines()]


def log_steps(path, steps, **options):
    tracker = JsonlTracker(path, **options)
    for step in steps:
        tracker.log({"env_steps": step, "loss": step / 8}, step)
    tracker.close()


def test_values(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker(path)
    metrics = {
        "env_steps": np.int64(10),
        "loss": np.float32(0.5),
        "episode_return": float("nan"),
        "grad_norm": np.inf,
        "done": False,
        "name": "pong",
        "q_values": np.array([4.0, 0.0, 1.0, 3.0, 2.0]),
    }
    tracker.log(metrics, 10)
    assert read(path) == [  # there at once, not only after `close`
        {
            "env_steps": 10,
            "loss": 0.5,
            "episode_return": None,
            "grad_norm": None,
            "done": False,
            "name": "pong",
            "q_values": {"min": 0, "q25": 1, "median": 2, "q75": 3, "max": 4, "mean": 2},
        }
    ]
    tracker.close()


def test_population(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, num_members=2)
    samples = np.array([[[0.0, 1.0], [2.0, 5.0]], [[1.0, 1.0], [1.0, np.nan]]])
    tracker.log({"loss": np.array([1.0, np.nan]), "speed": 3.0, "q_values": samples}, 7)
    tracker.close()
    (line,) = read(path)
    assert line["env_steps"] == 7 and line["loss"] == [1.0, None] and line["speed"] == 3.0
    assert line["q_values"]["mean"] == [2.0, None] and line["q_values"]["median"] == [1.5, None]


@pytest.mark.parametrize(
    ("resume_step", "steps"), [(None, [1, 2, 3, 9]), (2, [1, 2, 9]), (0, [9]), (3, [1, 2, 3, 9])]
)
def test_resumes(tmp_path, resume_step, steps):
    path = tmp_path / "metrics.jsonl"
    log_steps(path, [1, 2, 3])
    with open(path, "a") as file:
        file.write('{"env_steps": 4, "lo')
    log_steps(path, [9], resume_step=resume_step)
    assert [line["env_steps"] for line in read(path)] == steps
    assert read(path)[-1]["loss"] == 9 / 8


def test_an_offline_run_counts_updates(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in (5, 10, 15):
        tracker(None, {"num_updates": step, "total_updates": 20, "loss": 0.5})
    tracker.close()
    assert read(path)[0] == {"num_updates": 5, "total_updates": 20, "loss": 0.5}
    JsonlTracker(path, resume_step=10).close()
    assert [line["num_updates"] for line in read(path)] == [5, 10]


def test_garbage_in_the_middle_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"env_steps": 1}\n\x00\x00\xff\n[]\n3\n"x"\nnull\n{"env_steps": 2}\n{"env_steps": 3}'
    )
    JsonlTracker(path).close()
    assert path.read_bytes() == b'{"env_steps": 1}\n{"env_steps": 2}\n{"env_steps": 3}\n'


def test_survives_being_killed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = f"""
        import os, signal
        from eqx_q.tracking import JsonlTracker
        tracker = JsonlTracker({str(path)!r})
        for step in range(5):
            tracker.log({{"x": step}}, step)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == -signal.SIGKILL
    assert [line["x"] for line in read(path)] == [0, 1, 2, 3, 4]


def test_full_disk(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    line = {"text": "x" * 60}  # with its step and checksum, 100 bytes and some
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250, limits[1]))  # room for two lines and a half
    try:
        with caplog.at_level(logging.WARNING):
            for step in range(6):
                tracker.log(line, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tracker.log(line, 6)  # there is room again
    tracker.close()
    assert [x["env_steps"] for x in read(path)] == [0, 1, 6]
    assert len(caplog.records) == 1 and "the run goes on" in caplog.text


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*metrics\.jsonl"):
        JsonlTracker(tmp_path / "file" / "metrics.jsonl")
    assert os.listdir(tmp_path) == ["file"]
