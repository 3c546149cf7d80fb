"""Aim gets everything, and whatever happens to it does not touch the run."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from eqx_q.loops.media import write_gif
from eqx_q.tracking import AimTracker, aim as aim_module


def log_many(tracker, messages=5):
    """Logs as a run does; every call returns at once."""
    for step in range(messages):
        started = time.perf_counter()
        tracker.log({"loss": 1.0, "q_values": np.arange(3.0)}, step)
        assert time.perf_counter() - started < 0.5


@contextlib.contextmanager
def process(code):
    """A process that runs `code` and then sleeps, held for as long as the context."""
    code = textwrap.dedent(code) + "\nprint('ready', flush=True)\nimport time; time.sleep(100)"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with child:
        while (line := child.stdout.readline()) != "ready\n":
            assert line, "the process failed"
        yield child
        child.kill()


# ---- with Aim itself

READER = """
    import json, sys
    import aim
    from aim.storage.context import Context
    repo = aim.Repo.from_path(sys.argv[1])
    runs = []
    for run_hash in repo.list_all_runs():
        run = aim.Run(
            run_hash, repo=repo, capture_terminal_logs=False, system_tracking_interval=None
        )
        series = []
        for name, context, _ in run.iter_metrics_info():
            metric = run.get_metric(name, context)
            steps, (values, *_) = metric.data.numpy()
            series.append([name, context.to_dict(), dict(zip(steps.tolist(), values.tolist()))])
        histograms, pictures = {}, {}
        found = run.get_distribution_sequence("q_values", Context({"subset": "train"}))
        for step, value in zip(*found.values.sparse_list()) if found else ():
            histograms[step] = [value.weights.tolist(), value.range]
        found = run.get_image_sequence("episode", Context({"subset": "eval"}))
        for step, value in zip(*found.values.sparse_list()) if found else ():
            pictures[step] = [value.format, value.to_pil_image().n_frames]
        runs.append(dict(name=run.name, experiment=run.experiment, hash=run.hash,
                         params=run[...], series=series, histograms=histograms, pictures=pictures))
    print("RESULT" + json.dumps(runs))
"""


def read(repo):
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READER), str(repo)],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.split("RESULT")[1])


def series(run, name, subset):
    (found,) = [s for n, context, s in run["series"] if n == name and context == {"subset": subset}]
    return {int(step): value for step, value in found.items()}


def test_everything_arrives_and_a_resumed_run_continues(tmp_path, caplog):
    directory = tmp_path / "pong"
    options = {"repo": tmp_path, "experiment": "pqn_atari", "num_members": 2}
    options["close_timeout"] = 90.0
    frames = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(4)]
    write_gif(tmp_path / "a.gif", frames)
    with caplog.at_level(logging.WARNING):
        tracker = AimTracker(directory, **options)
        params = {"agent": {"learning_rate": np.float32(0.5), "network": None}, "seed": 3}
        tracker.log_params(params)
        for step in (10, 20):
            metrics = {
                "env_steps": step,
                "loss": np.array([1.0, np.nan]) * step,
                "q_values": np.array([[0.0, 0.0, 1.0], [5.0, np.nan, 7.0]]),
                "name": "text is left out",
                "eval/return": np.array([3.0, 4.0]),
            }
            tracker({"run": "state"}, metrics)
        tracker.log_gif(tmp_path / "a.gif", 20)
        tracker.log_params([{"own": 0}, {"own": 1, "seed": 7}])
        tracker.close()
        hashes = json.loads((directory / "aim.json").read_text())["runs"]

        tracker = AimTracker(directory, **options)
        tracker.log({"loss": np.array([30.0, 31.0])}, 30)
        tracker.close()
    assert caplog.records == []

    runs = sorted(read(tmp_path), key=lambda run: run["name"])
    assert [run["hash"] for run in runs] == hashes
    assert [run["name"] for run in runs] == [f"{tmp_path.name}/pong #{i}" for i in (0, 1)]
    first, second = runs
    assert first["experiment"] == "pqn_atari"
    assert first["params"]["agent"] == {"learning_rate": 0.5, "network": None}
    assert (first["params"]["own"], second["params"]["own"]) == (0, 1)
    assert (first["params"]["seed"], second["params"]["seed"]) == (3, 7)
    assert first["params"]["member"] == 0
    assert second["params"]["member"] == 1 and "git_commit" in second["params"]
    assert series(first, "loss", "train") == {10: 10.0, 20: 20.0, 30: 30.0}
    assert series(second, "loss", "train") == {30: 31.0}
    assert series(second, "return", "eval") == {10: 4.0, 20: 4.0}
    assert {n for n, _, _ in second["series"]} == {"env_steps", "loss", "return"}
    assert "__system__cpu" in {n for n, _, _ in first["series"]}

    weights, ends = second["histograms"]["20"]
    assert ends == [5.0, 7.0] and (weights[0], weights[-1], sum(weights)) == (1, 1, 2)
    assert first["pictures"] == {"20": ["GIF", 4]} and second["pictures"] == {}


def test_runs_that_start_at_once_in_a_new_repository(tmp_path, caplog):
    options = {"repo": tmp_path / "new", "close_timeout": 90.0}
    with caplog.at_level(logging.WARNING):
        trackers = [AimTracker(tmp_path / f"run{i}", **options) for i in range(2)]
        for tracker in trackers:
            log_many(tracker)
        for tracker in trackers:
            tracker.close()
    assert caplog.records == []
    assert all((tmp_path / f"run{i}" / "aim.json").exists() for i in range(2))


def test_repository_locked_by_another_process(tmp_path, caplog):
    """Aim waits for this lock of its own for five minutes."""
    with (
        process(f"""
        import os
        from filelock import SoftFileLock
        os.makedirs({str(tmp_path / ".aim/locks")!r})
        lock = SoftFileLock({str(tmp_path / ".aim/locks/structured_db_lock")!r})
        lock.acquire()  # held for as long as `lock` is
    """),
        caplog.at_level(logging.WARNING),
    ):
        tracker = AimTracker(repo=tmp_path, open_timeout=8.0)
        log_many(tracker, 300)
        tracker.close()
    (record,) = caplog.records
    message = record.getMessage()
    assert "did not open within 8 s" in message and "the run goes on" in message
    assert f"rm {tmp_path}/.aim/locks/*lock" in message and "tracker=jsonl" in message


def test_a_killed_run_is_taken_up_when_nobody_has_it_open(tmp_path, caplog):
    directory = tmp_path / "run"
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
                import os, signal, time
                from eqx_q.tracking import AimTracker
                tracker = AimTracker({str(directory)!r}, repo={str(tmp_path)!r})
                tracker.log({{"loss": 1.0}}, 10)
                while not os.path.exists({str(directory / "aim.json")!r}):
                    time.sleep(0.1)
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)
            """),
        ],
    )
    assert killed.returncode == -signal.SIGKILL
    (run_hash,) = json.loads((directory / "aim.json").read_text())["runs"]

    with caplog.at_level(logging.WARNING):
        holder = f"""
            import aim
            run = aim.Run({run_hash!r}, repo={str(tmp_path)!r}, system_tracking_interval=None)
        """
        with process(holder):
            refused = AimTracker(directory, repo=tmp_path, open_timeout=9.0)
            log_many(refused)
            refused.close()
            waiting = AimTracker(directory, repo=tmp_path, close_timeout=90.0)
            waiting.log({"loss": 2.0}, 20)
            time.sleep(5.0)
        waiting.close()
    (record,) = caplog.records
    assert "ock" in record.getMessage().split(")")[0]  # Aim's own words: lock, Lock, LOCK
    assert f"aim runs --repo {tmp_path} close {run_hash}" in record.getMessage()
    (run,) = read(tmp_path)
    assert run["hash"] == run_hash and series(run, "loss", "train") == {10: 1.0, 20: 2.0}


def test_repository_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        tracker = AimTracker(repo=tmp_path / "file")
        log_many(tracker)
        tracker.close()
        log_many(tracker)
    (record,) = caplog.records
    assert "NotADirectoryError" in record.getMessage() and "tracker.repo=DIR" in record.getMessage()


def test_aim_is_not_installed(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "aim", None)
    with caplog.at_level(logging.WARNING):
        tracker = AimTracker(tmp_path / "run", repo=tmp_path)
        log_many(tracker)
        tracker.log_params({"a": 1})
        tracker.log_gif("a.gif", 1)
        tracker.close()
    (record,) = caplog.records
    assert "not installed" in record.getMessage() and "eqx_q[train]" in record.getMessage()
    assert os.listdir(tmp_path) == []


# ---- with something in Aim's place

ECHO = """
    import json, os, sys
    first = json.loads(sys.stdin.readline())
    print(json.dumps({"runs": ["hash"] * len(first["names"])}), flush=True)
    with open(os.path.join(first["repo"], "received"), "w") as file:
        for line in sys.stdin:
            file.write(line)
            file.flush()
"""


@pytest.fixture
def in_place_of_aim(tmp_path, monkeypatch):
    def put(code):
        (tmp_path / "worker.py").write_text(textwrap.dedent(code))
        monkeypatch.setattr(aim_module, "_WORKER", tmp_path / "worker.py")

    return put


def received(directory):
    return [json.loads(line) for line in (directory / "received").read_text().splitlines()]


def test_named_members_have_runs_and_parameters_of_their_own(tmp_path, in_place_of_aim):
    in_place_of_aim(ECHO)
    names = [f"trial {i}" for i in range(40)]
    tracker = AimTracker(repo=tmp_path, num_members=40, names=names)
    tracker.log_params([{"lambda_": i / 40} for i in range(40)])
    tracker.log({"eval/return": np.arange(40.0)}, 5)
    tracker.close()
    params, numbers = received(tmp_path)
    assert params["params"][10] == {"lambda_": 0.25}
    assert [record[:2] for record in numbers["records"]] == [[i, {"return": i}] for i in range(40)]


def test_large_populations_are_summed_up(tmp_path, in_place_of_aim):
    in_place_of_aim(ECHO)
    tracker = AimTracker(tmp_path / "run", repo=tmp_path, num_members=40)
    loss = np.arange(40.0)
    loss[7] = np.nan
    tracker.log({"loss": loss, "q_values": np.ones((40, 3)), "nothing": np.full(40, np.nan)}, 5)
    tracker.close()
    assert json.loads((tmp_path / "run" / "aim.json").read_text())["runs"] == ["hash"]
    numbers, histograms = received(tmp_path)
    rest = np.delete(np.arange(40.0), 7)
    expected = {"mean": rest.mean(), "std": rest.std(), "min": 0.0, "max": 39.0}
    assert len(numbers["records"]) == 4
    for member, row, context in numbers["records"]:
        assert member == 0 and context["subset"] == "train"
        assert row == {"loss": pytest.approx(expected[context["over_members"]])}
    ((member, name, counts, _, _),) = histograms["records"]
    assert (member, name, sum(counts)) == (0, "q_values", 120)


def test_a_slow_one_gets_what_was_queued(tmp_path, in_place_of_aim, monkeypatch, caplog):
    monkeypatch.setattr(aim_module, "_WAITING", 4)
    in_place_of_aim(ECHO.replace("print", "import time; time.sleep(1.0); print"))
    with caplog.at_level(logging.WARNING):
        tracker = AimTracker(tmp_path / "run", repo=tmp_path)
        tracker.log_params({"deep": {("no", "text"): 1}, "array": np.arange(2), "object": object})
        for step in range(20):
            tracker.log({"loss": 1.0}, step)
        tracker.close()
    (record,) = caplog.records
    assert "lack some points" in record.getMessage()
    params, *numbers = received(tmp_path)
    assert params["params"] == {"deep": {}, "array": [0, 1], "object": str(object)}
    assert [message["step"] for message in numbers][:2] == [0, 1] and len(numbers) < 20


@pytest.mark.parametrize("when", ["opening", "running"])
def test_a_hang_is_told_from_a_run_that_waits(tmp_path, in_place_of_aim, caplog, when):
    stop = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)\n"
    echo = textwrap.dedent(ECHO)
    in_place_of_aim(stop + echo if when == "opening" else echo.replace("with", stop + "with"))
    before = threading.active_count()
    with caplog.at_level(logging.WARNING):
        tracker = AimTracker(repo=tmp_path, open_timeout=1.0, close_timeout=3.0)
        log_many(tracker, 20)
        started = time.perf_counter()
        tracker.close()
        assert time.perf_counter() - started < 4.0
    (record,) = caplog.records
    word = "did not open" if when == "opening" else "did not finish"
    assert word in record.getMessage()
    deadline = time.monotonic() + 5.0
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before  # and nothing is left of it
    assert tracker._process.poll() == -signal.SIGKILL


def test_a_hang_in_a_long_run(tmp_path, in_place_of_aim, caplog, monkeypatch):
    monkeypatch.setattr(aim_module, "_WAITING", 4)
    in_place_of_aim(ECHO.replace("for line in sys.stdin", "import time; time.sleep(100)\n    if 0"))
    tracker = AimTracker(repo=tmp_path, open_timeout=3.0)
    big = {"params": "x" * 100_000}  # more than a pipe holds
    with caplog.at_level(logging.WARNING):
        deadline = time.monotonic() + 20.0
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            tracker.log_params(big)
            time.sleep(0.02)
        started = time.perf_counter()
        tracker.close()
        assert time.perf_counter() - started < 0.5
    slower, hangs = (record.getMessage() for record in caplog.records)
    assert "lack some points" in slower and "it hangs" in hangs


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit(3)", "its process died"),
        ("import os; os.kill(os.getpid(), 11)", "its process died"),
        ("""print('{"error": "out of order"}'); raise SystemExit(1)""", "out of order"),
        (ECHO + '\n    print(\'{"error": "at last"}\'); sys.exit(1)', "at last"),
        (ECHO.replace("with", "sys.exit(1)\n    with"), "its process died"),
    ],
)
def test_a_process_that_dies(tmp_path, in_place_of_aim, caplog, code, reason):
    in_place_of_aim(code)
    with caplog.at_level(logging.WARNING):
        tracker = AimTracker(repo=tmp_path)
        for _ in range(20):
            log_many(tracker)
        tracker.close()
        log_many(tracker)
    (record,) = caplog.records
    assert f"({reason})" in record.getMessage()


def test_another_repository_means_other_runs(tmp_path, in_place_of_aim):
    in_place_of_aim(ECHO)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tracker = AimTracker(tmp_path / "run", repo=tmp_path / "a")
    tracker.close()
    assert tracker._remembered(1) == ["hash"] and tracker._remembered(2) == []
    other = AimTracker(tmp_path / "run", repo=tmp_path / "b")
    assert other._remembered(1) == []
    other.close()
