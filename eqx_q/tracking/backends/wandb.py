"""Writes to Weights & Biases: to a directory for `wandb sync`, or to the server."""

import importlib
import os
import re
from pathlib import Path
from typing import Any


class Run:
    """See `eqx_q.tracking.worker.Run`.

    **Arguments:** `mode`: `"offline"` or `"online"`. `entity`: the user or team.
    """

    def __init__(self, info: Any, mode: str = "offline", entity: str | None = None):
        wandb: Any = importlib.import_module("wandb")
        store = Path(info.repo) / "wandb"
        store.mkdir(parents=True, exist_ok=True)
        if not os.access(store, os.W_OK):  # wandb would use another directory
            raise PermissionError(f"cannot write to '{store}'")
        self._wandb = wandb
        settings = {
            "silent": True,
            "console": "off",
            "x_disable_stats": bool(info.member),  # once per population
            "x_stats_pid": info.train_pid,  # not this process
        }
        self._run = wandb.init(
            dir=info.repo,
            mode=mode,
            entity=entity,
            project=re.sub(r"[^\w.-]", "-", info.experiment or "eqx_q"),
            name=info.name,
            group=info.name.partition(" #")[0],
            notes=None if info.resume_id else info.description,
            tags=info.tags,
            id=info.resume_id,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(**settings),
        )
        self.id = self._run.id
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def metrics(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def histogram(self, name: str, counts: list[int], ends: list[float], step: int) -> None:
        start, end = ends
        edges = [start + (end - start) * i / len(counts) for i in range(len(counts) + 1)]
        self._run.log({name: self._wandb.Histogram(np_histogram=(counts, edges)), "step": step})

    def params(self, nested: dict[str, Any], flat: dict[str, Any]) -> None:
        self._run.config.update(nested, allow_val_change=True)

    def gif(self, path: str, name: str, step: int) -> None:
        self._run.log({name: self._wandb.Video(path, format="gif"), "step": step})

    def close(self) -> None:
        self._run.finish()
        log = Path(self._run.settings.log_internal).read_text()
        if "failed to save record" in log:  # wandb's own process does not report it
            raise OSError("W&B could not write all data: the disk may be full")
