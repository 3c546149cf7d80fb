"""Writes to an Aim repository, which `aim up` shows."""

import contextlib
import functools
import importlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

# Bookmarks that a repository gets, of Aim's metrics explorer: a query, and what is told apart
_VIEWS = {
    "Returns": (
        "Of training (with exploration) and evaluation (greedy), a chart for each experiment",
        'metric.name == "return"',
        {"chart": ["run.props.experiment.name"], "color": ["run.props.name"]},
    ),
    "Is it learning?": (
        "Returns beside Q-values, TD errors and gradients: values that rise while returns do not "
        "are over-estimates; spikes that stay mean a learning rate too high",
        'metric.name in ["return", "q_value", "loss/td_error", "loss/grad_norm"]',
        {"chart": ["name"], "color": ["run.props.name"]},
    ),
}


class Run:
    """See `eqx_q.tracking.worker.Run`.

    **Arguments:** `views`: whether the repository gets bookmarks for the web page.
    """

    def __init__(self, asked: Any, views: bool = False):
        self._aim: Any = importlib.import_module("aim")
        # What Aim samples should be the training process, not this one.
        sampling: Any = importlib.import_module("aim.ext.resource.tracker")
        psutil: Any = importlib.import_module("psutil")
        sampling.Process = functools.partial(psutil.Process, asked.process)
        repository = _repository(asked.repo, asked.patience)
        known = asked.known if asked.known and repository.run_exists(asked.known) else None
        self._run = self._aim.Run(
            known,
            repo=repository,
            experiment=asked.experiment,
            capture_terminal_logs=False,
            system_tracking_interval=None if asked.member else 10,  # one of them is enough
        )
        self.id, self._run.name = self._run.hash, asked.name
        if not known:
            self._run.description = asked.description
            for tag in asked.tags:
                self._run.add_tag(tag)
        if views and not asked.member:
            with contextlib.suppress(Exception):  # the rest does not depend on them
                _make_views(Path(repository.path))

    def metrics(self, values: dict[str, float], step: int) -> None:
        for series, value in values.items():
            name, context = _of(series)
            self._run.track(value, name=name, step=step, context=context)

    def histogram(self, name: str, counts: list[int], ends: list[float], step: int) -> None:
        name, context = _of(name)
        distribution = self._aim.Distribution(hist=counts, bin_range=ends)
        self._run.track(distribution, name=name, step=step, context=context)

    def params(self, nested: dict[str, Any], flat: dict[str, Any]) -> None:
        for name, value in nested.items():
            self._run[name] = value

    def gif(self, path: str, name: str, step: int) -> None:
        name, context = _of(name)
        self._run.track(self._aim.Image(path), name=name, step=step, context=context)

    def close(self) -> None:
        self._run.close()


def _of(series: str) -> tuple[str, dict[str, str]]:
    """Name and context of a series: one name for training and evaluation lays them over another."""
    found = re.fullmatch(r"(?:(train|eval)/)?(.*?)(?:/(mean|std|min|max))?", series)
    assert found is not None
    subset, name, statistic = found.groups()
    context = {"subset": subset or "train"}
    return name, context | ({"over_members": statistic} if statistic else {})


@functools.cache
def _repository(path: str, patience: float) -> Any:
    """Opens a repository; where several runs start at once in a new one, the first makes it."""
    aim: Any = importlib.import_module("aim")
    directory = Path(path) / aim.sdk.configs.get_aim_repo_name()
    made = directory / "VERSION"  # the last thing that making it writes
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        deadline = time.monotonic() + patience
        while not made.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    return aim.Repo.from_path(path, init=not made.exists())


def _make_views(store: Path) -> None:
    """Adds those of `_VIEWS` that the repository never had to what its web page keeps."""
    database = store / "aim_db"
    if not database.exists():
        _make_database(database)
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        known = {name for (name,) in db.execute("SELECT name FROM dashboards")}
        for name in _VIEWS.keys() - known:
            description, query, grouping = _VIEWS[name]
            select = {"options": [], "query": "", "advancedMode": True, "advancedQuery": query}
            state = json.dumps({"select": select, "grouping": grouping})
            now = time.strftime("%F %T", time.gmtime())
            view, app = str(uuid.uuid1()), str(uuid.uuid1())
            db.execute(
                "INSERT INTO dashboards (uuid, name, description, created_at, updated_at, "
                "is_archived) VALUES (?, ?, ?, ?, ?, 0)",
                (view, name, description, now, now),
            )
            db.execute(
                "INSERT INTO explore_states (uuid, created_at, updated_at, is_archived, type, "
                "state, dashboard_id) VALUES (?, ?, ?, 0, 'metrics', ?, ?)",
                (app, now, now, state, view),
            )
        db.execute("COMMIT")


def _make_database(path: Path) -> None:
    """Does what `aim up` does first; half of it would keep that from starting, so: elsewhere."""
    web: Any = importlib.import_module("aim.web.configs")
    settings = str(Path(web.__file__).parent / "migrations" / "alembic.ini")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.parent.name / path.name
        made.parent.mkdir()
        subprocess.run(
            [sys.executable, "-P", "-m", "alembic", "-c", settings, "upgrade", "head"],
            env={**os.environ, web.AIM_UI_MOUNTED_REPO_PATH: scratch},
            timeout=60,
            check=True,
        )
        os.link(made, path)
