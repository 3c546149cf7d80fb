"""Writes to MLflow: to a SQLite file, which `mlflow ui` shows, or to a server."""

import contextlib
import importlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

_AT_ONCE = 100  # parameters, of which MLflow takes no more in a call


class Run:
    """See `eqx_q.tracking.worker.Run`. MLflow has no histograms.

    **Arguments:** `uri`: of the server, by default `mlflow.db` in the repository.
    """

    def __init__(self, asked: Any, uri: str | None = None):
        mlflow: Any = importlib.import_module("mlflow")
        self._entities = mlflow.entities
        database = Path(asked.repo) / "mlflow.db"
        if not (uri or database.exists()):
            _make(database, mlflow)
        self._client = mlflow.MlflowClient(uri or f"sqlite:///{database}")
        try:
            run = asked.known and self._client.get_run(asked.known)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # it was deleted since
                raise
            run = None
        run = run or self._create(asked, None if uri else asked.repo)
        self.id, self._params = run.info.run_id, dict(run.data.params)
        self._client.update_run(self.id, "RUNNING")

    def metrics(self, values: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, x, now, step) for name, x in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def histogram(self, name: str, counts: list[int], ends: list[float], step: int) -> None:
        pass

    def params(self, nested: dict[str, Any], flat: dict[str, Any]) -> None:
        """What changes is a tag besides: MLflow lets no parameter change."""
        told = {name: str(value)[:6000] for name, value in flat.items()}
        new = [self._entities.Param(*item) for item in told.items() if item[0] not in self._params]
        for i in range(0, len(new), _AT_ONCE):
            self._client.log_batch(self.id, params=new[i : i + _AT_ONCE])
        for name, value in told.items():
            if self._params.setdefault(name, value) != value:
                self._client.set_tag(self.id, name, value)

    def gif(self, path: str, name: str, step: int) -> None:
        self._client.log_artifact(self.id, path, name)

    def close(self) -> None:
        self._client.set_terminated(self.id)

    def _create(self, asked: Any, repo: str | None) -> Any:
        name = asked.experiment or "eqx_q"
        experiment = self._client.get_experiment_by_name(name)
        place = None if repo is None else (Path(repo) / "mlartifacts").as_uri()
        found = experiment and experiment.experiment_id
        found = found or self._client.create_experiment(name, place)
        tags = dict.fromkeys(asked.tags, "") | {"mlflow.note.content": asked.description}
        return self._client.create_run(found, run_name=asked.name, tags=tags)


def _make(database: Path, mlflow: Any) -> None:
    """Elsewhere first: two processes at it, or one that is killed, would leave it of no use."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=database.parent) as scratch:
        made = Path(scratch) / database.name
        mlflow.MlflowClient(f"sqlite:///{made}").search_experiments()
        with contextlib.suppress(FileExistsError):
            os.link(made, database)
