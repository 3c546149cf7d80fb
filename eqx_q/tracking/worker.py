"""The process in which a tracker runs: `eqx_q.tracking.remote` starts this file, and sends JSON.

A tracker may hang on a lock, crash or print; here it can do so without touching the training
process. The first line says what to open, each later one is a call of a run's method. The answer
to the first is `{"runs": [id, ...]}`; an error is answered with `{"error": ...}`, and ends it all.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

_GRACE = 60.0  # seconds to finish when the training process has died


class Run(Protocol):
    """What a file of `backends` defines: a run of a tracker, open to be written.

    Names of metrics are those of `eqx_q.tracking.series`, with `/mean`, `/std`, `/min` or `/max`
    after them where they sum up a population. Whatever is raised ends tracking, not the training.

    **Arguments:**

    - `asked`: has `repo` (a directory), `name`, `known` (the `id` that this run had before, or
        `None`), `experiment` (or `None`), `description`, `tags`, `member` (of a population, from
        0), `process` (the training's) and `patience` (seconds that opening may take).
    - `options`: the tracker's own, as in `conf/tracker/<name>.yaml`.

    **Attributes:** `id`: by which a resumed run finds it again.
    """

    id: str

    def __init__(self, asked: Any, **options: Any): ...

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Numbers by name."""

    def histogram(self, name: str, counts: list[int], ends: list[float], step: int) -> None:
        """A distribution, as counts in bins of one width from `ends[0]` to `ends[1]`."""

    def params(self, nested: dict[str, Any], flat: dict[str, Any]) -> None:
        """Parameters as they are, and the same by paths with dots between levels."""

    def gif(self, path: str, name: str, step: int) -> None:
        """A GIF that is in a file."""

    def close(self) -> None:
        """Writes what is left."""


def _open(backend: str, names: list[str], known: list[str], options: dict, **asked: Any) -> list:
    spec = importlib.util.spec_from_file_location("backend", backend)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runs: list[Run] = []
    commit = _git_commit()
    for member, name in enumerate(names):
        told = SimpleNamespace(
            name=name, known=known[member] if known else None, member=member, **asked
        )
        runs.append(_patiently(lambda told=told: module.Run(told, **options), asked["patience"]))
        _params(runs[-1], {"member": member, "git_commit": commit})
    return runs


def _patiently(open_run: Callable[[], Run], seconds: float) -> Run:
    """Opens a run that a killed process lets go of just now, or a store that another one makes."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return open_run()
        except Exception as error:
            passing = any(word in str(error).lower() for word in ("lock", "already exists"))
            if not passing or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _handle(runs: list[Run], kind: str, **message: Any) -> None:
    """Does what a message says."""
    if kind == "params":
        params = message["params"]
        of_each = params if isinstance(params, list) else [params] * len(runs)
        for run, each in zip(runs, of_each, strict=True):
            _params(run, each)
    elif kind == "metrics":
        for member, values in message["records"]:
            runs[member].metrics(values, message["step"])
    elif kind == "histograms":
        for member, *histogram in message["records"]:
            runs[member].histogram(*histogram, message["step"])
    elif kind == "gif":
        runs[0].gif(message["path"], message["name"], message["step"])


def _params(run: Run, nested: dict[str, Any]) -> None:
    run.params(nested, _flat(nested))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, node in tree.items():
        found |= _flat(node, f"{prefix}{key}.") if isinstance(node, dict) else {prefix + key: node}
    return found


def _git_commit() -> str | None:
    """The commit of the working directory, with a `+` where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return result.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _leave_with(parent: int) -> None:
    """Ends this process and its own, however stuck, soon after the one that started it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(_GRACE)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Serves until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # trackers print

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    try:
        runs = _open(**json.loads(sys.stdin.readline()))
        answer(runs=[run.id for run in runs])
        for line in sys.stdin:
            if line.endswith("\n"):  # else the training process died in the middle of it
                _handle(runs, **json.loads(line))
        for run in runs:
            run.close()
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
