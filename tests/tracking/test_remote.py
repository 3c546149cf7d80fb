"""Whatever happens to a tracker does not touch the run: with something in the trackers' place."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from eqx_q.errors import UnknownNameError
from eqx_q.tracking import AimTracker, RemoteTracker, Trackers, remote

EVERY = pytest.mark.parametrize("name", remote.BACKENDS)

FAKE = (Path(__file__).parent / "fake.py").read_text()
METRICS = "def metrics(self, values, step):\n        "


def log_many(tracker, messages=5):
    """Logs as a run does; every call returns at once."""
    for step in range(messages):
        started = time.perf_counter()
        tracker.log({"loss": 1.0, "q_values": np.arange(3.0)}, step)
        assert time.perf_counter() - started < 0.5


def comes(what, seconds=20.0):
    """Whether something becomes true."""
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return what()


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def the_one_warning(caplog, name="aim"):
    """It names the tracker, and the mend."""
    (message,) = messages(caplog)
    assert message.startswith(remote.BACKENDS[name].title) and "the run goes on" in message
    assert "To mend it" in message and "tracker=jsonl" in message
    return message


# ---- what it is told


def test_members_have_runs_parameters_and_names_of_their_own(tmp_path, in_place, received, caplog):
    in_place()
    options = {"repo": tmp_path, "experiment": "pqn", "num_members": 2}
    options |= {"description": "words", "tags": ["a"], "own": 3}
    with caplog.at_level(logging.WARNING):
        tracker = AimTracker(tmp_path / "run", **options)
        tracker.log_params({"deep": {("no", "text"): 1, "x": np.arange(2)}, "object": object})
        tracker.log_params([{"lambda_": 0.5}, {"lambda_": 0.75}])
        for step in (10, 20):
            metrics = {
                "env_steps": step,
                "total_steps": 100,
                "compile_seconds": np.float32(1.5),
                "episode_return": np.array([1.0, np.nan]),
                "eval/return": np.array([3.0, 4.0]),
                "q_values": np.array([[0.0, 0.0, 1.0], [5.0, np.nan, 7.0]]),
                "name": "text is left out",
            }
            tracker({"run": "state"}, metrics)
        tracker.log_gif(tmp_path / "a.gif", 20)
        tracker.close()
        again = AimTracker(tmp_path / "run", **options)
        again.close()
    assert messages(caplog) == []

    asked, member, params, of_each, constants, *told, counts, close, resumed, _, _ = received(
        tmp_path, 1
    )
    name = f"{tmp_path.name}/run #1"
    expected = {"repo": str(tmp_path), "name": name, "known": None, "experiment": "pqn"}
    expected |= {"description": "words", "tags": ["a"], "own": 3, "process": os.getpid()}
    expected |= {"member": 1, "patience": 20.0}
    assert asked == ["open", expected]
    assert resumed[1]["known"] == "id 1"
    assert member[1].keys() == {"member", "git_commit"}
    flat = {"deep.x": [0, 1], "object": str(object)}
    assert params == ["params", {"deep": {"x": [0, 1]}, "object": str(object)}, flat]
    assert of_each[1] == {"lambda_": 0.75}
    assert constants[1] == {"total_steps": 100, "compile_seconds": 1.5}  # once
    assert told == [
        ["metrics", {"eval/return": 4.0}, 10],
        ["train/q_values", 2, [5.0, 7.0], 10],
        ["metrics", {"eval/return": 4.0}, 20],
        ["train/q_values", 2, [5.0, 7.0], 20],
    ]
    assert counts[1] == {"env_steps": 20} and close == ["close"]
    first = received(tmp_path, 0)
    assert ["metrics", {"train/return": 1.0, "eval/return": 3.0}, 10] in first
    assert ["gif", str(tmp_path / "a.gif"), "eval/episode", 20] in first


def test_named_members_are_never_summed_up(tmp_path, in_place, received):
    in_place()
    tracker = AimTracker(repo=tmp_path, num_members=40, names=[f"trial {i}" for i in range(40)])
    tracker.log({"eval/return": np.arange(40.0)}, 5)
    tracker.close()
    assert ["metrics", {"eval/return": 39.0}, 5] in received(tmp_path, 39)


def test_large_populations_are_summed_up(tmp_path, in_place, received):
    in_place()
    tracker = AimTracker(tmp_path / "run", repo=tmp_path, num_members=40)
    loss = np.arange(40.0)
    loss[7] = np.nan
    tracker.log({"loss": loss, "q_values": np.ones((40, 3)), "nothing": np.full(40, np.nan)}, 5)
    tracker.close()
    assert json.loads((tmp_path / "run" / "aim.json").read_text())["runs"] == ["id 0"]
    _, _, numbers, histogram, _ = received(tmp_path)
    rest = np.delete(np.arange(40.0), 7)
    expected = {"mean": rest.mean(), "std": rest.std(), "min": 0.0, "max": 39.0}
    expected = {f"loss/loss/{statistic}": x for statistic, x in expected.items()}
    assert numbers == ["metrics", pytest.approx(expected), 5]
    assert histogram[:2] == ["train/q_values", 120]


def test_another_repository_means_other_runs(tmp_path, in_place, received):
    in_place()
    for repo, known in (("a", None), ("a", "id 0"), ("b", None)):
        (tmp_path / repo).mkdir(exist_ok=True)
        AimTracker(tmp_path / "run", repo=tmp_path / repo).close()
        assert [row[1]["known"] for row in received(tmp_path / repo) if row[0] == "open"][
            -1
        ] == known
    AimTracker(tmp_path / "run", repo=tmp_path / "b", num_members=2).close()  # not of one member
    assert received(tmp_path / "b", 1)[0][1]["known"] is None


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(UnknownNameError, match="the nearest are wandb"):
        RemoteTracker("wndb")


def test_the_programs_need_nothing_to_be_loaded():
    """Not eqx_q either: they start in a moment, and say themselves what they lack."""
    script = "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]"
    programs = [remote._WORKER, *remote._PROGRAMS.glob("*.py")]
    assert {path.stem for path in programs} == {"worker", "__init__", *remote.BACKENDS}
    subprocess.run([sys.executable, "-I", "-S", "-c", script, *programs], check=True)


# ---- what goes wrong


@EVERY
def test_it_is_not_installed(tmp_path, caplog, monkeypatch, name):
    monkeypatch.setitem(sys.modules, remote.BACKENDS[name].package, None)
    with caplog.at_level(logging.WARNING):
        tracker = RemoteTracker(name, tmp_path / "run", repo=tmp_path)
        log_many(tracker)
        tracker.log_params({"a": 1})
        tracker.log_gif("a.gif", 1)
        tracker.close()
    (message,) = messages(caplog)
    extra = "train" if name == "aim" else "trackers"
    mend = f"pip install 'eqx_q[{extra}]'"
    if sys.version_info >= remote.BACKENDS[name].below:
        mend = "tracker=tensorboard"
    assert "not installed" in message and mend in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit(3)", "its process died"),
        ("import os; os.kill(os.getpid(), 11)", "its process died"),
        (
            FAKE.replace("self.id =", "raise OSError(13, 'no permission'); self.id ="),
            "no permission",
        ),
        (
            FAKE.replace(METRICS, METRICS + "raise OSError('the disk is full'); "),
            "the disk is full",
        ),
        (FAKE.replace(METRICS, METRICS + "os._exit(1); "), "its process died"),
        (FAKE.replace('self.write("close")', "raise ValueError('at last')"), "ValueError: at last"),
    ],
)
@EVERY
def test_it_dies(tmp_path, in_place, caplog, code, reason, name):
    in_place(code, name)
    with caplog.at_level(logging.WARNING):
        tracker = RemoteTracker(name, repo=tmp_path)
        for _ in range(20):
            log_many(tracker)
        tracker.close()
        log_many(tracker)
    message = the_one_warning(caplog, name)
    assert reason in message and str(tmp_path / remote.BACKENDS[name].store) in message


@EVERY
def test_it_takes_ten_seconds_for_everything(tmp_path, in_place, caplog, name):
    in_place(FAKE.replace("print(", "time.sleep(10); print("), name)
    with caplog.at_level(logging.WARNING):
        tracker = RemoteTracker(name, repo=tmp_path, close_timeout=0.5)
        log_many(tracker, 200)
        started = time.perf_counter()
        tracker.close()
        assert time.perf_counter() - started < 1.5
    assert "did not finish within 0.5 s" in the_one_warning(caplog, name)
    assert tracker._process.wait(5.0) == -signal.SIGKILL


def test_one_that_fails_takes_no_other_with_it(tmp_path, in_place, received, caplog):
    names = ["aim", "wandb", "mlflow"]
    for name in names:
        in_place("raise SystemExit(1)" if name == "wandb" else FAKE, name)
        (tmp_path / name).mkdir()
    with caplog.at_level(logging.WARNING):
        tracker = Trackers(*[RemoteTracker(name, repo=tmp_path / name) for name in names])
        tracker.log({"loss": 1.0}, 5)
        tracker.close()
    the_one_warning(caplog, "wandb")
    for name in ("aim", "mlflow"):
        assert received(tmp_path / name)[2] == ["metrics", {"loss/loss": 1.0}, 5]


def test_a_lock_that_another_process_lets_go_of(tmp_path, in_place, received, caplog):
    locked = 'if os.path.exists("{}"): raise OSError("database is locked")\n        self.id ='
    in_place(FAKE.replace("self.id =", locked.format(tmp_path / "lock")))
    with caplog.at_level(logging.WARNING):
        (tmp_path / "lock").touch()
        patient = AimTracker(repo=tmp_path)
        refused = AimTracker(repo=tmp_path, open_timeout=1.5)
        refused.close()
        (tmp_path / "lock").unlink()
        patient.close()
    assert "database is locked" in the_one_warning(caplog)
    assert received(tmp_path)[-1] == ["close"]


def test_a_slow_one_gets_what_was_queued(tmp_path, in_place, received, monkeypatch, caplog):
    monkeypatch.setattr(remote, "_WAITING", 4)
    in_place(FAKE.replace("self.id =", "time.sleep(1); self.id ="))
    with caplog.at_level(logging.WARNING):
        tracker = AimTracker(tmp_path / "run", repo=tmp_path)
        for step in range(20):
            tracker.log({"loss": 1.0}, step)
        tracker.close()
    assert "slower than the run" in the_one_warning(caplog)
    steps = [row[2] for row in received(tmp_path) if row[0] == "metrics"]
    assert steps[:2] == [0, 1] and len(steps) < 20


@pytest.mark.parametrize("when", ["opening", "running"])
def test_a_hang_is_told_from_a_run_that_waits(tmp_path, in_place, caplog, when):
    stop = "os.kill(os.getpid(), signal.SIGSTOP); "
    into = "self.id =" if when == "opening" else METRICS
    in_place(FAKE.replace(into, stop + into if when == "opening" else into + stop))
    before = threading.active_count()
    with caplog.at_level(logging.WARNING):
        tracker = AimTracker(repo=tmp_path, open_timeout=1.0, close_timeout=3.0)
        log_many(tracker, 20)
        started = time.perf_counter()
        tracker.close()
        assert time.perf_counter() - started < 4.0
    word = "did not open" if when == "opening" else "did not finish"
    assert word in the_one_warning(caplog)
    assert comes(lambda: threading.active_count() == before)  # and nothing is left of it
    assert tracker._process.poll() == -signal.SIGKILL


def test_a_hang_in_a_long_run(tmp_path, in_place, caplog, monkeypatch):
    monkeypatch.setattr(remote, "_WAITING", 4)
    in_place(FAKE.replace(METRICS, METRICS + "time.sleep(100); "))
    tracker = AimTracker(repo=tmp_path, open_timeout=2.0)
    big = {"params": "x" * 100_000}  # more than a pipe holds
    with caplog.at_level(logging.WARNING):
        tracker.log({"loss": 1.0}, 1)
        deadline = time.monotonic() + 20.0
        while not tracker._given_up and time.monotonic() < deadline:
            tracker.log_params(big)
            time.sleep(0.02)
        started = time.perf_counter()
        tracker.close()
        assert time.perf_counter() - started < 0.5
    the_one_warning(caplog)
    assert tracker._process.wait(5.0) == -signal.SIGKILL


def test_what_it_has_started_ends_with_it(tmp_path, in_place):
    child = "__import__('subprocess').Popen(['sleep', '1000'])"
    in_place(FAKE.replace("asked.known or", f"str({child}.pid) or"))
    tracker = AimTracker(tmp_path / "run", repo=tmp_path, close_timeout=0.1)
    note = tmp_path / "run" / "aim.json"
    assert comes(note.exists)
    (pid,) = json.loads(note.read_text())["runs"]
    tracker._give_up("a test")

    def runs():
        try:
            return (Path("/proc") / pid / "stat").read_text().split()[2] != "Z"
        except FileNotFoundError:
            return False

    assert comes(lambda: not runs())
