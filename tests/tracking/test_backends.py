"""Each tracker's own reader finds what was logged, also after a run was killed and resumed."""

import contextlib
import json
import logging
import resource
import runpy
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from eqx_q.loops.media import write_gif
from eqx_q.tracking import AimTracker, RemoteTracker, Trackers, installed, remote

SUPPORTED = [name for name, x in remote.BACKENDS.items() if sys.version_info < x.python_below]

KILLED = """
    import os, pathlib, signal, sys, time
    import numpy as np
    from eqx_q.tracking import RemoteTracker, Trackers
    repo, *names = sys.argv[1:]
    run = pathlib.Path(repo) / "runs" / "pong"
    about = {"repo": repo, "experiment": "PQN", "num_members": 2}
    about |= {"description": "how it was made", "tags": ["pqn", "gymnax/Pong"]}
    own = {"aim": {"views": True}}
    trackers = [RemoteTracker(name, run, **about, **own.get(name, {})) for name in names]
    # Another run starts at the same time, before the repository exists.
    others = [RemoteTracker(x, run.with_name("other"), **about) for x in names if x == "aim"]
    tracker = Trackers(*trackers)
    tracker.log_params({"agent": {"learning_rate": np.float32(0.5), "network": None}, "a (b)": 1})
    tracker.log_params([{"own": 0.25}, {"own": 0.75}])
    for step in (10, 20):
        metrics = {
            "env_steps": step,
            "total_steps": 40,
            "loss": np.array([1.0, np.nan]) * step,
            "episode_return": np.array([1.0, 2.0]),
            "eval/return": np.array([3.0, 4.0]) * step,
            "q_values": np.array([[0.0, 0.0, 1.0], [5.0, np.nan, 7.0]]),
        }
        tracker({"run": "state"}, metrics)
    tracker.log_gif(pathlib.Path(repo) / "a.gif", 20)
    Trackers(*others).close()
    for name, each in zip(names, trackers):
        while not (each._given_up or (run / f"{name}.json").exists() and each._queue.empty()):
            time.sleep(0.1)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_all_trackers_are_installed():
    """`dev` installs them all, so that tests are skipped only where Aim does not run."""
    assert [name for name in remote.BACKENDS if installed(name)] == SUPPORTED


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A directory with the data of all trackers, of a run that was killed and resumed."""
    repo = tmp_path_factory.mktemp("repo")
    write_gif(repo / "a.gif", [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(4)])
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(repo), *SUPPORTED]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    about = {"repo": repo, "experiment": "PQN", "num_members": 2, "close_timeout": 90.0}
    own = {"aim": {"views": True}}
    trackers = [
        RemoteTracker(name, repo / "runs" / "pong", **about, **own.get(name, {}))
        for name in SUPPORTED
    ]
    tracker = Trackers(*trackers)
    tracker.log({"loss": np.array([30.0, 31.0])}, 30)
    tracker.close()
    return repo


def read(script, *arguments):
    """Runs a script in a process of its own, and returns its variable `found`."""
    script = "import json, sys\n" + textwrap.dedent(script) + "\nprint('\\n' + json.dumps(found))"
    command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def reads(function):
    """Marks a test of a tracker: skipped if the tracker does not support this version of Python."""
    name = function.__name__.removeprefix("test_")
    reason = f"{name} does not support this version of Python"
    return pytest.mark.skipif(name not in SUPPORTED, reason=reason)(function)


def numbers(of_run):
    return {name: {int(step): x for step, x in points} for name, points in of_run.items()}


FIRST = {
    "loss/loss": {10: 10.0, 20: 20.0, 30: 30.0},
    "train/return": {10: 1.0, 20: 1.0},
    "eval/return": {10: 30.0, 20: 60.0},
}
SECOND = {
    "loss/loss": {30: 31.0},
    "train/return": {10: 2.0, 20: 2.0},
    "eval/return": {10: 40.0, 20: 80.0},
}


@reads
def test_aim(repo):
    script = """
        import aim, sqlite3
        from aim.storage.context import Context
        repo = aim.Repo.from_path(sys.argv[1])
        runs = {}
        for run_hash in repo.list_all_runs():
            run = aim.Run(
                run_hash, repo=repo, capture_terminal_logs=False, system_tracking_interval=None
            )
            series = {}
            for name, context, _ in run.iter_metrics_info():
                steps, (values, *_) = run.get_metric(name, context).data.numpy()
                key = context.to_dict().get("subset", "system") + " " + name
                series[key] = list(zip(steps.tolist(), values.tolist()))
            histograms, pictures = {}, {}
            found = run.get_distribution_sequence("q_values", Context({"subset": "train"}))
            for step, value in zip(*found.values.sparse_list()) if found else ():
                histograms[step] = [value.weights.tolist(), value.range]
            found = run.get_image_sequence("episode", Context({"subset": "eval"}))
            for step, value in zip(*found.values.sparse_list()) if found else ():
                pictures[step] = [value.format, value.to_pil_image().n_frames]
            runs[run.name] = dict(
                hash=run.hash, params=run[...], series=series, histograms=histograms,
                pictures=pictures, about=[run.experiment, run.description, sorted(run.tags)],
            )
        views = sqlite3.connect(sys.argv[1] + "/.aim/aim_db").execute(
            "SELECT name, state FROM dashboards JOIN explore_states "
            "ON explore_states.dashboard_id = dashboards.uuid"
        )
        found = [runs, views.fetchall()]
    """
    runs, views = read(script, repo)
    first, second = (runs.pop(f"runs/pong #{i}") for i in (0, 1))
    assert runs.keys() == {"runs/other #0", "runs/other #1"}
    stored = json.loads((repo / "runs" / "pong" / "aim.json").read_text())["runs"]
    assert [first["hash"], second["hash"]] == stored
    about = ["PQN", "how it was made", ["gymnax/Pong", "pqn"]]
    assert first["about"] == about and second["about"] == about
    assert first["params"]["agent"] == {"learning_rate": 0.5, "network": None}
    assert (first["params"]["own"], second["params"]["own"]) == (0.25, 0.75)
    assert (second["params"]["member"], second["params"]["total_steps"]) == (1, 40)
    assert "git_commit" in second["params"]
    # Training and evaluation are one series, in two contexts.
    names = ["train loss/loss", "train return", "eval return"]
    for run, expected in ((first, FIRST), (second, SECOND)):
        series = numbers(run["series"])
        assert [series[name] for name in names] == list(expected.values())
    assert second["series"].keys() == {*names}
    assert "system __system__cpu" in first["series"]
    weights, ends = second["histograms"]["20"]
    assert ends == [5.0, 7.0] and (weights[0], weights[-1], sum(weights)) == (1, 1, 2)
    assert first["pictures"] == {"20": ["GIF", 4]} and second["pictures"] == {}
    assert sorted(name for name, _ in views) == ["Is it learning?", "Returns"]  # once
    returns = json.loads(dict(views)["Returns"])
    assert returns["select"]["advancedQuery"] == 'metric.name == "return"'
    assert returns["grouping"]["stroke"] == ["context.subset"]


@reads
def test_tensorboard(repo):
    script = """
        import pathlib, struct
        import tensorboardX
        store = pathlib.Path(sys.argv[1]) / "tensorboard"
        found = {}
        for path in sorted(store.rglob("events*")):
            run = found.setdefault(str(path.parent.relative_to(store)), {})
            data = path.read_bytes()
            while data:
                size = struct.unpack("<Q", data[:8])[0]
                event = tensorboardX.proto.event_pb2.Event.FromString(data[12 : 12 + size])
                data = data[16 + size :]
                for value in event.summary.value:
                    kind = value.WhichOneof("value")
                    what = getattr(value, kind) if kind else value.metadata.plugin_data.content
                    if kind == "histo":
                        last = what.bucket_limit[-1]
                        what = [what.num, what.min, what.max, last, list(what.bucket)]
                    elif kind == "image":
                        what = [what.width, what.height, what.encoded_image_string[:6].decode()]
                    elif kind == "tensor":
                        what = what.string_val[0].decode()
                    elif not kind:
                        what = what.decode(errors="replace")
                    run.setdefault(value.tag, []).append([event.step, what])
    """
    runs = read(script, repo)
    first, second = (runs.pop(f"PQN/runs/pong #{i}") for i in (0, 1))
    assert runs == {}
    for run, expected in ((first, FIRST), (second, SECOND)):
        assert numbers({name: run[name] for name in expected}) == expected
        (text,) = (text for _, text in run["description/text_summary"])
        assert text == "how it was made\n\npqn\n\ngymnax/Pong"
    num, *ends, counts = dict(second["train/q_values"])[20]
    assert (num, ends, counts[0], counts[-1]) == (2, [5.0, 7.0, 7.0], 1, 1)
    assert first["eval/episode"] == [[20, [8, 8, "GIF89a"]]] and "eval/episode" not in second
    params = second["_hparams_/session_start_info"][0][1]
    assert all(name in params for name in ("agent.learning_rate", "own", "total_steps", "member"))


@reads
def test_wandb(repo):
    script = """
        import glob, struct
        from wandb.proto.wandb_internal_pb2 import Record
        def records(path):
            data, at, whole = open(path, "rb").read(), 7, b""
            while at + 7 <= len(data):
                if (left := 32768 - at % 32768) < 7:
                    at += left
                    continue
                _, size, kind = struct.unpack("<IHB", data[at : at + 7])
                whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
                if kind in (1, 4):
                    yield Record.FromString(whole)
                    whole = b""
        found = []
        for path in sorted(glob.glob(sys.argv[1] + "/wandb/offline-*/*.wandb")):
            run = dict(rows=[], params={})
            for record in records(path):
                for item in record.history.item:
                    key = item.key or "/".join(item.nested_key)
                    if key == "_step":
                        run["rows"].append({})
                for item in record.history.item:
                    key = item.key or "/".join(item.nested_key)
                    run["rows"][-1][key] = json.loads(item.value_json)
                for item in record.config.update:
                    run["params"][item.key] = json.loads(item.value_json)
                if record.WhichOneof("record_type") == "run":
                    of = record.run
                    run["id"] = of.run_id
                    run["about"] = [of.display_name, of.run_group, of.project, of.notes, *of.tags]
            found.append(run)
    """
    found = read(script, repo)
    ids = json.loads((repo / "runs" / "pong" / "wandb.json").read_text())["runs"]
    for member, expected in enumerate((FIRST, SECOND)):
        made, resumed = (run for run in found if run["id"] == ids[member])
        group = "runs/pong"
        about = [f"{group} #{member}", group, "PQN", "how it was made", "pqn", "gymnax/Pong"]
        assert made["about"] == about
        assert made["params"]["agent"] == {"learning_rate": 0.5, "network": None}
        assert (made["params"]["own"], made["params"]["member"]) == ((0.25, 0.75)[member], member)
        rows = made["rows"] + resumed["rows"]
        for name, points in expected.items():
            assert {row["step"]: row[name] for row in rows if name in row} == points
        (_, counts) = [
            row["train/q_values/values"] for row in rows if "train/q_values/values" in row
        ]
        assert sum(counts) == (3, 2)[member]
        pictures = [row["step"] for row in rows if row.get("eval/episode/_type") == "video-file"]
        assert pictures == [[20], []][member]
    assert len(list(repo.glob("wandb/offline-*/files/media/videos/eval/*.gif"))) == 1


@reads
def test_trackio(repo):
    script = """
        import os
        os.environ["TRACKIO_DIR"] = sys.argv[1] + "/trackio"
        from trackio.sqlite_storage import SQLiteStorage
        found = [
            [run, SQLiteStorage.get_run_config("PQN", run_id=run["id"]),
             SQLiteStorage.get_logs("PQN", run_id=run["id"])]
            for run in SQLiteStorage.get_run_records("PQN")
        ]
    """
    runs = {run["name"]: [run["id"], *rest] for run, *rest in read(script, repo)}
    ids = json.loads((repo / "runs" / "pong" / "trackio.json").read_text())["runs"]
    for member, expected in enumerate((FIRST, SECOND)):
        found, params, rows = runs.pop(f"runs-pong #{member}")
        assert found == ids[member]
        assert params["own"] == (0.25, 0.75)[member] and params["agent.learning_rate"] == 0.5
        assert params["description"] == "how it was made" and params["tags"] == [
            "pqn",
            "gymnax/Pong",
        ]
        for name, points in expected.items():
            assert {row["step"]: row[name] for row in rows if name in row} == points
        (_, histogram) = [row["train/q_values"] for row in rows if "train/q_values" in row]
        assert histogram["_type"] == "trackio.histogram"
        assert sum(histogram["values"]) == (3, 2)[member]
        pictures = [row["eval/episode"] for row in rows if "eval/episode" in row]
        assert [x["_type"] for x in pictures] == ["trackio.image"] * (1 - member)
        assert all((repo / "trackio" / "media" / x["file_path"]).exists() for x in pictures)
    assert runs == {}


@reads
def test_mlflow(repo):
    script = """
        from mlflow import MlflowClient
        client = MlflowClient(f"sqlite:///{sys.argv[1]}/mlflow.db")
        experiment = client.get_experiment_by_name("PQN")
        found = {}
        for run in client.search_runs([experiment.experiment_id]):
            history = {
                name: [[x.step, x.value] for x in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            }
            files = [x.path for x in client.list_artifacts(run.info.run_id, "eval/episode")]
            found[run.info.run_name] = [run.info.run_id, run.info.status, history, files,
                                        run.data.params, run.data.tags]
    """
    runs = read(script, repo)
    ids = json.loads((repo / "runs" / "pong" / "mlflow.json").read_text())["runs"]
    for member, expected in enumerate((FIRST, SECOND)):
        found, status, history, files, params, tags = runs.pop(f"runs/pong #{member}")
        assert (found, status) == (ids[member], "FINISHED")
        assert numbers(history) == expected
        assert params["own"] == ("0.25", "0.75")[member] and params["agent.learning_rate"] == "0.5"
        assert params["a -b-"] == "1"  # MLflow does not allow the parentheses
        assert tags["mlflow.note.content"] == "how it was made" and "gymnax/Pong" in tags
        assert files == [["eval/episode/a.gif"], []][member]
    assert runs == {}


# ---- options and failures


def test_mlflow_at_another_uri(tmp_path):
    """As a server would be, and nothing is written to `repo`."""
    uri = f"sqlite:///{tmp_path}/other.db"
    tracker = RemoteTracker("mlflow", repo=tmp_path / "repo", uri=uri, close_timeout=90.0)
    tracker.log({"loss": 0.5}, 3)
    tracker.close()
    script = """
        from mlflow import MlflowClient
        found = [run.data.metrics for run in MlflowClient(sys.argv[1]).search_runs(["1"])]
    """
    assert read(script, uri) == [{"loss/loss": 0.5}]
    assert not (tmp_path / "repo").exists()


def test_wandb_samples_the_training_process_once(tmp_path, monkeypatch):
    wandb = SimpleNamespace(Settings=dict, init=lambda **options: opened.append(options) or Mock())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    opened = []
    run = runpy.run_path(str(remote._BACKENDS_DIR / "wandb.py"))["Run"]
    info = {"repo": tmp_path, "name": "a", "experiment": None, "resume_id": None, "train_pid": 7}
    for member in (0, 1):
        run(SimpleNamespace(**info, member=member, description="", tags=[]), entity="team")
    settings = [options["settings"] for options in opened]
    assert [(x["x_stats_pid"], x["x_disable_stats"]) for x in settings] == [(7, False), (7, True)]
    assert (opened[0]["mode"], opened[0]["entity"]) == ("offline", "team")


@pytest.mark.parametrize("problem", ["no directory", "full disk"])
def test_a_store_that_cannot_be_written(tmp_path, caplog, problem):
    """All trackers at once, since each takes a while to start."""
    repo = tmp_path / "repo"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if problem == "no directory":
        repo.write_text("")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        trackers = [RemoteTracker(name, repo=repo, close_timeout=90.0) for name in SUPPORTED]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with caplog.at_level(logging.WARNING):
        for step in range(100):
            Trackers(*trackers).log({"loss": 1.0, "q_values": np.arange(30.0)}, step)
        Trackers(*trackers).close()
    messages = [record.getMessage() for record in caplog.records]
    for name in SUPPORTED:
        backend = remote.BACKENDS[name]
        (message,) = (x for x in messages if x.startswith(backend.title))
        assert "The run goes on" in message and str(repo / backend.store) in message
    assert len(messages) == len(SUPPORTED)


needs_aim = pytest.mark.skipif("aim" not in SUPPORTED, reason="Aim needs Python 3.11")


@contextlib.contextmanager
def process(code):
    """A process that runs `code` and then sleeps until the end of the context."""
    code = textwrap.dedent(code) + "\nprint('ready', flush=True)\nimport time; time.sleep(100)"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with child:
        while (line := child.stdout.readline()) != "ready\n":
            assert line, "the process failed"
        yield child
        child.kill()


@needs_aim
def test_an_aim_repository_locked_by_another_process(tmp_path, caplog):
    """Aim would wait for this lock for five minutes."""
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
        tracker = AimTracker(repo=tmp_path, open_timeout=5.0)
        for step in range(300):
            tracker.log({"loss": 1.0}, step)
        tracker.close()
    (record,) = caplog.records
    message = record.getMessage()
    assert "did not open within 5 s" in message and "The run goes on" in message
    assert f"rm {tmp_path}/.aim/locks/*lock" in message and "tracker=jsonl" in message


@needs_aim
def test_an_aim_run_that_another_process_has_open(repo, caplog):
    directory = repo / "runs" / "other"
    run, _ = json.loads((directory / "aim.json").read_text())["runs"]
    holder = f"""
        import aim
        run = aim.Run({run!r}, repo={str(repo)!r}, system_tracking_interval=None)
    """
    options = {"repo": repo, "num_members": 2, "close_timeout": 90.0}
    with process(holder), caplog.at_level(logging.WARNING):
        AimTracker(directory, open_timeout=9.0, **options).close()
    (record,) = caplog.records
    assert "ock" in record.getMessage().split(". The run")[0]  # Aim's own words: lock, Lock, LOCK
    assert f"aim runs --repo {repo} close {run}" in record.getMessage()
