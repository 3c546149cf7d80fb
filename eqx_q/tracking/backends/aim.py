"""Writes to an Aim repository. `aim up` shows it."""

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

# Bookmarks of Aim's metrics explorer: description, query, and what has a chart of its own
_VIEWS = {
    "Returns": (
        "Training returns (with exploration) and evaluation returns, one chart per experiment",
        'metric.name == "return"',
        "run.props.experiment.name",
    ),
    "Is it learning?": (
        "Returns, Q-values, TD errors and gradient norms. Q-values that rise while returns do not "
        "are over-estimates. Lasting spikes mean that the learning rate is too high.",
        'metric.name in ["return", "q_value", "loss/td_error", "loss/grad_norm"]',
        "name",
    ),
}


class Run:
    """See `eqx_q.tracking.worker.Run`.

    **Arguments:** `views`: whether to add bookmarks to the repository.
    """

    def __init__(self, info: Any, views: bool = False):
        self._aim: Any = importlib.import_module("aim")
        # Aim should sample the training process, not this one.
        sampling: Any = importlib.import_module("aim.ext.resource.tracker")
        psutil: Any = importlib.import_module("psutil")
        sampling.Process = functools.partial(psutil.Process, info.train_pid)
        repository = _repository(info.repo, info.lock_timeout)
        resume_id = info.resume_id
        if resume_id and not repository.run_exists(resume_id):  # it was deleted
            resume_id = None
        self._run = self._aim.Run(
            resume_id,
            repo=repository,
            experiment=info.experiment,
            capture_terminal_logs=False,
            system_tracking_interval=None if info.member else 10,  # once per population
        )
        self.id, self._run.name = self._run.hash, info.name
        if not resume_id:
            self._run.description = info.description
            for tag in info.tags:
                self._run.add_tag(tag)
        if views and not info.member:
            with contextlib.suppress(Exception):  # the next run tries again
                _make_views(Path(repository.path), info.lock_timeout)

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
    """Name and context of a series. Training and evaluation share a name, and so a chart."""
    found = re.fullmatch(r"(?:(train|eval)/)?(.*?)(?:/(mean|std|min|max))?", series)
    assert found is not None
    subset, name, statistic = found.groups()
    context = {"subset": subset or "train"}
    return name, context | ({"over_members": statistic} if statistic else {})


@functools.cache
def _repository(path: str, lock_timeout: float) -> Any:
    """Opens or creates a repository. If several runs start at once, the first one creates it."""
    aim: Any = importlib.import_module("aim")
    directory = Path(path) / aim.sdk.configs.get_aim_repo_name()
    made = directory / "VERSION"  # the last file that Aim creates
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        deadline = time.monotonic() + lock_timeout
        while not made.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    return aim.Repo.from_path(path, init=not made.exists())


def _make_views(store: Path, timeout: float) -> None:
    """Adds the bookmarks that the repository never had to the database of Aim's web page."""
    database = store / "aim_db"
    if not database.exists():
        _make_database(database, timeout)
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        known = {name for (name,) in db.execute("SELECT name FROM dashboards")}
        for name in [name for name in _VIEWS if name not in known]:
            description, query, chart = _VIEWS[name]
            # Colours tell runs apart, strokes training from evaluation.
            grouping = {"chart": [chart], "color": ["run.props.name"], "stroke": ["context.subset"]}
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


def _make_database(path: Path, timeout: float) -> None:
    """Creates the database as `aim up` does.

    It is created elsewhere and then moved: `aim up` cannot start with an incomplete one.
    """
    web: Any = importlib.import_module("aim.web.configs")
    settings = str(Path(web.__file__).parent / "migrations" / "alembic.ini")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.parent.name / path.name
        made.parent.mkdir()
        subprocess.run(
            [sys.executable, "-P", "-m", "alembic", "-c", settings, "upgrade", "head"],
            env={**os.environ, web.AIM_UI_MOUNTED_REPO_PATH: scratch},
            timeout=timeout,  # a part of the time to open
            check=True,
        )
        os.link(made, path)
