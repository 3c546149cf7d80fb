"""Writes to MLflow: to a SQLite file, which `mlflow ui` shows, or to a server."""

import contextlib
import importlib
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

_MAX_PARAMS = 100  # MLflow's limit for one call


class Run:
    """See `eqx_q.tracking.worker.Run`. MLflow has no histograms.

    **Arguments:** `uri`: of the server; by default the file `mlflow.db` in `repo`.
    """

    def __init__(self, info: Any, uri: str | None = None):
        mlflow: Any = importlib.import_module("mlflow")
        self._entities = mlflow.entities
        database = Path(info.repo) / "mlflow.db"
        if not (uri or database.exists()):
            _make(database, mlflow)
        self._client = mlflow.MlflowClient(uri or f"sqlite:///{database}")
        try:
            run = info.resume_id and self._client.get_run(info.resume_id)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # it was deleted
                raise
            run = None
        run = run or self._create(info, None if uri else info.repo)
        self.id, self._params = run.info.run_id, dict(run.data.params)
        self._client.update_run(self.id, "RUNNING")

    def metrics(self, values: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(_legal(name), x, now, step) for name, x in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def histogram(self, name: str, counts: list[int], ends: list[float], step: int) -> None:
        pass

    def params(self, nested: dict[str, Any], flat: dict[str, Any]) -> None:
        """A value that changes becomes a tag, since parameters of MLflow are constant."""
        texts = {_legal(name): str(value)[:6000] for name, value in flat.items()}
        new = [self._entities.Param(*item) for item in texts.items() if item[0] not in self._params]
        for i in range(0, len(new), _MAX_PARAMS):
            self._client.log_batch(self.id, params=new[i : i + _MAX_PARAMS])
        for name, value in texts.items():
            if self._params.setdefault(name, value) != value:
                self._client.set_tag(self.id, name, value)

    def gif(self, path: str, name: str, step: int) -> None:
        self._client.log_artifact(self.id, path, name)

    def close(self) -> None:
        self._client.set_terminated(self.id)

    def _create(self, info: Any, repo: str | None) -> Any:
        name = info.experiment or "eqx_q"
        experiment = self._client.get_experiment_by_name(name)
        artifacts = None if repo is None else (Path(repo) / "mlartifacts").as_uri()
        experiment_id = experiment and experiment.experiment_id
        experiment_id = experiment_id or self._client.create_experiment(name, artifacts)
        tags = dict.fromkeys(map(_legal, info.tags), "") | {"mlflow.note.content": info.description}
        return self._client.create_run(experiment_id, run_name=info.name, tags=tags)


def _legal(name: str) -> str:
    """Replaces characters that MLflow does not allow in names."""
    return re.sub(r"[^\w.:/ -]", "-", name)


def _make(database: Path, mlflow: Any) -> None:
    """Creates the database elsewhere and then moves it.

    Two processes that create it at once, or one that is killed, would leave a broken file.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=database.parent) as scratch:
        made = Path(scratch) / database.name
        mlflow.MlflowClient(f"sqlite:///{made}").search_experiments()
        with contextlib.suppress(FileExistsError):
            os.link(made, database)
