"""A failing tracker never stops or delays the run. The backends are replaced by simple ones."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

import eqx_q
from eqx_q.errors import UnknownNameError
from eqx_q.tracking import AimTracker, RemoteTracker, Trackers, remote

EVERY = pytest.mark.parametrize("name", remote.BACKENDS)

FAKE = (Path(__file__).parent / "fake.py").read_text()
METRICS = "def metrics(self, values, step):\n        "


def log_many(tracker, messages=5):
    """Logs as a run does, and checks that every call returns at once."""
    for step in range(messages):
        started = time.perf_counter()
        tracker.log({"loss": 1.0, "q_values": np.arange(3.0)}, step)
        assert time.perf_counter() - started < 0.5


def becomes_true(condition, seconds=20.0):
    """Whether a condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def the_one_warning(caplog, name="aim"):
    """There is one warning, which names the tracker and says what to do."""
    (message,) = messages(caplog)
    assert message.startswith(remote.BACKENDS[name].title) and "The run goes on" in message
    assert "To fix this" in message and "tracker=jsonl" in message
    return message


# ---- what the backend receives


def test_members_have_runs_parameters_and_names_of_their_own(
    tmp_path, replace_backend, received, caplog
):
    replace_backend()
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
        (tmp_path / "a.gif").touch()
        tracker.log_gif(tmp_path / "a.gif", 20)
        tracker.log_gif(tmp_path / "deleted.gif", 20)
        tracker.close()
        again = AimTracker(tmp_path / "run", **options)
        again.close()
    assert messages(caplog) == []

    opened, member, params, per_member, constants, *rest, counts, close, resumed, _, _ = received(
        tmp_path, 1
    )
    name = f"{tmp_path.name}/run #1"
    expected = {"repo": str(tmp_path), "name": name, "resume_id": None, "experiment": "pqn"}
    expected |= {"description": "words", "tags": ["a"], "own": 3, "train_pid": os.getpid()}
    expected |= {"member": 1, "lock_timeout": 20.0}
    assert opened == ["open", expected]
    assert resumed[1]["resume_id"] == "id 1"
    assert member[1].keys() == {"member", "git_commit"}
    flat = {"deep.x": [0, 1], "object": str(object)}
    assert params == ["params", {"deep": {"x": [0, 1]}, "object": str(object)}, flat]
    assert per_member[1] == {"lambda_": 0.75}
    assert constants[1] == {"total_steps": 100, "compile_seconds": 1.5}  # once
    assert rest == [
        ["metrics", {"eval/return": 4.0}, 10],
        ["train/q_values", 2, [5.0, 7.0], 10],
        ["metrics", {"eval/return": 4.0}, 20],
        ["train/q_values", 2, [5.0, 7.0], 20],
    ]
    assert counts[1] == {"env_steps": 20} and close == ["close"]
    first = received(tmp_path, 0)
    assert ["metrics", {"train/return": 1.0, "eval/return": 3.0}, 10] in first
    gifs = [call for call in first if call[0] == "gif"]
    assert gifs == [["gif", str(tmp_path / "a.gif"), "eval/episode", 20]]


def test_named_members_are_never_aggregated(tmp_path, replace_backend, received):
    replace_backend()
    tracker = AimTracker(repo=tmp_path, num_members=40, names=[f"trial {i}" for i in range(40)])
    tracker.log({"eval/return": np.arange(40.0)}, 5)
    tracker.close()
    assert ["metrics", {"eval/return": 39.0}, 5] in received(tmp_path, 39)


def test_large_populations_are_aggregated(tmp_path, replace_backend, received):
    replace_backend()
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


def test_another_repository_means_other_runs(tmp_path, replace_backend, received):
    replace_backend()
    for repo, resume_id in (("a", None), ("a", "id 0"), ("b", None)):
        (tmp_path / repo).mkdir(exist_ok=True)
        AimTracker(tmp_path / "run", repo=tmp_path / repo).close()
        assert [row[1]["resume_id"] for row in received(tmp_path / repo) if row[0] == "open"][
            -1
        ] == resume_id
    (tmp_path / "run" / "aim.json").write_text("[]")  # damaged
    AimTracker(tmp_path / "run", repo=tmp_path / "b").close()
    assert [row[1]["resume_id"] for row in received(tmp_path / "b") if row[0] == "open"] == [
        None
    ] * 2
    AimTracker(
        tmp_path / "run", repo=tmp_path / "b", num_members=2
    ).close()  # another number of members
    assert received(tmp_path / "b", 1)[0][1]["resume_id"] is None


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(UnknownNameError, match="the nearest are wandb"):
        RemoteTracker("wndb")


def test_the_backends_import_nothing_when_loaded():
    """Not even eqx_q, so that they start fast and report missing packages themselves."""
    script = "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]"
    backends = [remote._WORKER, *remote._BACKENDS_DIR.glob("*.py")]
    assert {path.stem for path in backends} == {"worker", "__init__", *remote.BACKENDS}
    subprocess.run([sys.executable, "-I", "-S", "-c", script, *backends], check=True)


# ---- failures


@EVERY
def test_a_tracker_that_is_not_installed(tmp_path, caplog, monkeypatch, name):
    monkeypatch.setitem(sys.modules, remote.BACKENDS[name].package, None)
    with caplog.at_level(logging.WARNING):
        tracker = RemoteTracker(name, tmp_path / "run", repo=tmp_path)
        log_many(tracker)
        tracker.log_params({"a": 1})
        tracker.log_gif("a.gif", 1)
        tracker.close()
    (message,) = messages(caplog)
    extra = "train" if name == "aim" else "trackers"
    advice = f"pip install 'eqx_q[{extra}]'"
    if sys.version_info >= remote.BACKENDS[name].python_below:
        advice = "tracker=tensorboard"
    assert "not installed" in message and advice in message
    assert os.listdir(tmp_path) == []


def test_a_package_that_the_tracker_lacks(tmp_path, replace_backend, caplog):
    replace_backend("import sqlalchemy_of_nobody", "mlflow")
    with caplog.at_level(logging.WARNING):
        RemoteTracker("mlflow", repo=tmp_path).close()
    (message,) = messages(caplog)
    assert "sqlalchemy_of_nobody" in message and "pip install 'eqx_q[trackers]'" in message


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
def test_a_tracker_that_dies(tmp_path, replace_backend, caplog, code, reason, name):
    replace_backend(code, name)
    with caplog.at_level(logging.WARNING):
        tracker = RemoteTracker(name, repo=tmp_path)
        for _ in range(20):
            log_many(tracker)
        tracker.close()
        log_many(tracker)
    message = the_one_warning(caplog, name)
    assert reason in message and str(tmp_path / remote.BACKENDS[name].store) in message


@EVERY
def test_a_tracker_that_needs_ten_seconds_for_every_call(tmp_path, replace_backend, caplog, name):
    replace_backend(FAKE.replace("print(", "time.sleep(10); print("), name)
    with caplog.at_level(logging.WARNING):
        tracker = RemoteTracker(name, repo=tmp_path, close_timeout=0.5)
        log_many(tracker, 200)
        started = time.perf_counter()
        tracker.close()
        assert time.perf_counter() - started < 1.5
    assert "did not finish within 0.5 s" in the_one_warning(caplog, name)
    assert tracker._process.wait(5.0) == -signal.SIGKILL


def test_a_failing_tracker_does_not_stop_others(tmp_path, replace_backend, received, caplog):
    names = ["aim", "wandb", "mlflow"]
    for name in names:
        replace_backend("raise SystemExit(1)" if name == "wandb" else FAKE, name)
        (tmp_path / name).mkdir()
    with caplog.at_level(logging.WARNING):
        tracker = Trackers(*[RemoteTracker(name, repo=tmp_path / name) for name in names])
        tracker.log({"loss": 1.0}, 5)
        tracker.close()
    the_one_warning(caplog, "wandb")
    for name in ("aim", "mlflow"):
        assert received(tmp_path / name)[2] == ["metrics", {"loss/loss": 1.0}, 5]


def test_a_lock_that_another_process_releases(tmp_path, replace_backend, received, caplog):
    locked = 'if os.path.exists("{}"): raise OSError("database is locked")\n        self.id ='
    replace_backend(FAKE.replace("self.id =", locked.format(tmp_path / "lock")))
    with caplog.at_level(logging.WARNING):
        (tmp_path / "lock").touch()
        patient = AimTracker(repo=tmp_path)
        refused = AimTracker(repo=tmp_path, open_timeout=1.5)
        refused.close()
        (tmp_path / "lock").unlink()
        patient.close()
    assert "database is locked" in the_one_warning(caplog)
    assert received(tmp_path)[-1] == ["close"]


def test_a_slow_tracker_gets_what_was_queued(
    tmp_path, replace_backend, received, monkeypatch, caplog
):
    monkeypatch.setattr(remote, "_QUEUE_SIZE", 4)
    replace_backend(FAKE.replace("self.id =", "time.sleep(1); self.id ="))
    with caplog.at_level(logging.WARNING):
        tracker = AimTracker(tmp_path / "run", repo=tmp_path)
        for step in range(20):
            tracker.log({"loss": 1.0}, step)
        tracker.close()
    assert "slower than the run" in the_one_warning(caplog)
    steps = [row[2] for row in received(tmp_path) if row[0] == "metrics"]
    assert steps[:2] == [0, 1] and len(steps) < 20


@pytest.mark.parametrize("when", ["opening", "running"])
def test_a_tracker_that_hangs(tmp_path, replace_backend, caplog, when):
    stop = "os.kill(os.getpid(), signal.SIGSTOP); "
    into = "self.id =" if when == "opening" else METRICS
    replace_backend(FAKE.replace(into, stop + into if when == "opening" else into + stop))
    before = threading.active_count()
    with caplog.at_level(logging.WARNING):
        tracker = AimTracker(repo=tmp_path, open_timeout=1.0, close_timeout=3.0)
        log_many(tracker, 20)
        started = time.perf_counter()
        tracker.close()
        assert time.perf_counter() - started < 4.0
    word = "did not open" if when == "opening" else "did not finish"
    assert word in the_one_warning(caplog)
    assert becomes_true(lambda: threading.active_count() == before)  # no thread is left
    assert tracker._process.poll() == -signal.SIGKILL


def test_a_hang_in_a_long_run(tmp_path, replace_backend, caplog, monkeypatch):
    monkeypatch.setattr(remote, "_QUEUE_SIZE", 4)
    replace_backend(FAKE.replace(METRICS, METRICS + "time.sleep(100); "))
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


def test_child_processes_of_a_tracker_end_with_it(tmp_path, replace_backend):
    child = "__import__('subprocess').Popen(['sleep', '1000'])"
    replace_backend(FAKE.replace("info.resume_id or", f"str({child}.pid) or"))
    tracker = AimTracker(tmp_path / "run", repo=tmp_path, close_timeout=0.1)
    note = tmp_path / "run" / "aim.json"
    assert becomes_true(note.exists)
    (pid,) = json.loads(note.read_text())["runs"]
    tracker._give_up("a test")

    assert becomes_true(lambda: not is_running(pid))


def is_running(pid):
    try:
        return (Path("/proc") / pid / "stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_tracker_that_hangs_ends_after_a_run_that_was_killed(tmp_path, received):
    worker = remote._WORKER.read_text().replace("_GRACE = 60.0", "_GRACE = 0.5")
    (tmp_path / "worker.py").write_text(worker)
    code = FAKE.replace(METRICS, METRICS + "self.write('hangs'); time.sleep(100); ")
    (tmp_path / "backend.py").write_text(code)
    script = f"""
import os, pathlib, signal, time
from eqx_q.tracking import RemoteTracker, remote
remote._WORKER = pathlib.Path({str(tmp_path)!r}) / "worker.py"
remote._BACKENDS_DIR = remote._WORKER.parent
remote.BACKENDS["backend"] = remote.Backend("Backend", "json", "store")
tracker = RemoteTracker("backend", repo={str(tmp_path)!r})
print(tracker._process.pid, flush=True)
tracker.log({{"loss": 1.0}}, 1)
received = pathlib.Path({str(tmp_path / "received 0")!r})
deadline = time.monotonic() + 60.0
while not (received.exists() and "hangs" in received.read_text() or time.monotonic() > deadline):
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""
    out = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert out.returncode == -signal.SIGKILL
    assert received(tmp_path)[-1] == ["hangs"] and is_running(out.stdout.strip())
    assert becomes_true(lambda: not is_running(out.stdout.strip()))


def test_a_tracker_does_not_change_what_is_learnt(tmp_path, replace_backend, received):
    replace_backend()
    env = eqx_q.make("gymnax/CartPole-v1", num_envs=4)
    agent = eqx_q.PQN.create(
        env.observation_space,
        env.action_space,
        key=jax.random.key(0),
        network_options={"hidden_sizes": [16]},
        rollout_length=16,
        num_minibatches=2,
    )
    tracker = AimTracker(repo=tmp_path)
    with_tracker, without = (
        eqx_q.train(agent, env, total_steps=256, key=jax.random.key(1), callbacks=callbacks)[0]
        for callbacks in ([tracker], [])
    )
    tracker.close()
    assert any(row[0] == "metrics" for row in received(tmp_path))
    assert eqx.tree_equal(with_tracker, without)
