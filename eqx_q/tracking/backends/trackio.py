"""Writes to trackio's files. `TRACKIO_DIR=trackio trackio show` shows them."""

import importlib
import os
import re
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class Run:
    """See `eqx_q.tracking.worker.Run`.

    It uses trackio's storage directly: `trackio.init` looks for a server, and drops data that it
    cannot write.
    """

    def __init__(self, info: Any):
        os.environ["TRACKIO_DIR"] = str(Path(info.repo) / "trackio")
        self._trackio: Any = importlib.import_module("trackio")
        storage: Any = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        self._log = storage.bulk_log
        self.id = info.resume_id or uuid.uuid4().hex
        self._project = re.sub(r"[^\w.-]", "-", info.experiment or "eqx_q")
        self._name = info.name.replace("/", "-")  # also names a directory
        self._step, self._changed = 0, True
        self._config = {
            "_Created": datetime.now(UTC).isoformat(),
            "_Group": self._name.partition(" #")[0],
            "description": info.description,
            "tags": info.tags,
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
        """Logs an image: browsers play a GIF as an image, but not as a video."""
        image = self._trackio.Image(path)
        image._save(self._project, self._name, step)
        self.metrics({name: image._to_dict()}, step)

    def close(self) -> None:
        if self._changed:
            self.metrics({}, self._step)
