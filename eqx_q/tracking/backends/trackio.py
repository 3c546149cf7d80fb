"""Writes to trackio's files, which `TRACKIO_DIR=trackio trackio show` shows."""

import importlib
import os
import re
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class Run:
    """See `eqx_q.tracking.worker.Run`.

    It calls the storage below `trackio.init`, which drops what it cannot write and looks for a
    server.
    """

    def __init__(self, asked: Any):
        os.environ["TRACKIO_DIR"] = str(Path(asked.repo) / "trackio")
        self._trackio: Any = importlib.import_module("trackio")
        storage: Any = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        self._log = storage.bulk_log
        self.id = asked.known or uuid.uuid4().hex
        self._project = re.sub(r"[^\w.-]", "-", asked.experiment or "eqx_q")
        self._name = asked.name.replace("/", "-")  # it is a directory of pictures, too
        self._step, self._changed = 0, True
        self._config = {
            "_Created": datetime.now(UTC).isoformat(),
            "_Group": self._name.partition(" #")[0],
            "description": asked.description,
            "tags": asked.tags,
            **(storage.get_run_config(self._project, run_id=self.id) or {}),
        }

    def metrics(self, values: dict[str, Any], step: int) -> None:
        self._step = step
        config, self._changed = self._config if self._changed else None, False
        self._log(self._project, self._name, [values], [step], config=config, run_id=self.id)

    def histogram(self, name: str, counts: list[int], ends: list[float], step: int) -> None:
        start, end = ends
        edges = [start + (end - start) * i / len(counts) for i in range(len(counts) + 1)]
        histogram = self._trackio.Histogram(np_histogram=(counts, edges))
        self.metrics({name: histogram._to_dict()}, step)

    def params(self, nested: dict[str, Any], flat: dict[str, Any]) -> None:
        self._config |= flat
        self._changed = True

    def gif(self, path: str, name: str, step: int) -> None:
        video = self._trackio.Video(path)
        video._save(self._project, self._name, step)
        self.metrics({name: video._to_dict()}, step)

    def close(self) -> None:
        if self._changed:
            self.metrics({}, self._step)
