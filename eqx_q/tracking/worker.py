"""Runs a tracker in a process of its own, so that it may hang, crash or print.

`eqx_q.tracking.remote` runs this file and sends lines of JSON. The first line opens the runs, and
the answer is `{"runs": [id, ...]}`. Each later line is a call of a method of the runs. After an
error, the answer is `{"error": ...}` and the process ends.
"""

import functools
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

_GRACE = 60.0  # seconds to finish after the training process died


class Run(Protocol):
    """An open run of a tracker. Each file in `backends` defines such a class.

    `eqx_q.tracking.series` defines the names of metrics. Statistics of a large population end in
    `/mean`, `/std`, `/min` or `/max`. An exception ends tracking, but not training.

    **Arguments:**

    - `info`: has the attributes
        - `repo`: the directory for the tracker's data,
        - `name`, `description`, `tags`: of the run,
        - `experiment`: the group of the run, or `None`,
        - `resume_id`: the `id` of the run to continue, or `None`,
        - `member`: the index in the population, from 0,
        - `train_pid`: the id of the training process,
        - `lock_timeout`: seconds to wait for a lock.
    - `options`: options of the backend, as in `conf/tracker/<name>.yaml`.

    **Attributes:** `id`: identifies the run, so that it can be continued.
    """

    id: str

    def __init__(self, info: Any, **options: Any): ...

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Logs numbers by name."""

    def histogram(self, name: str, counts: list[int], ends: list[float], step: int) -> None:
        """Logs a histogram: counts in bins of equal width, from `ends[0]` to `ends[1]`."""

    def params(self, nested: dict[str, Any], flat: dict[str, Any]) -> None:
        """Logs hyperparameters, given twice: nested, and flat with dots between the levels."""

    def gif(self, path: str, name: str, step: int) -> None:
        """Logs a GIF from a file."""

    def close(self) -> None:
        """Writes what is pending."""


def _open(
    backend: str, names: list[str], resume_ids: list[str], options: dict, **shared: Any
) -> list[Run]:
    """Opens a run for each name."""
    spec = importlib.util.spec_from_file_location("backend", backend)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runs: list[Run] = []
    commit = _git_commit()
    for member, name in enumerate(names):
        resume_id = resume_ids[member] if resume_ids else None
        info = SimpleNamespace(name=name, resume_id=resume_id, member=member, **shared)
        runs.append(_open_patiently(functools.partial(module.Run, info, **options), info))
        _params(runs[-1], {"member": member, "git_commit": commit})
    return runs


def _open_patiently(open_run: Callable[[], Run], info: Any) -> Run:
    """Opens a run. Retries while another process holds a lock or creates the store."""
    deadline = time.monotonic() + info.lock_timeout
    while True:
        try:
            return open_run()
        except Exception as error:
            temporary = any(word in str(error).lower() for word in ("lock", "already exists"))
            if not temporary or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _handle(runs: list[Run], kind: str, **message: Any) -> None:
    """Calls the method that a message names, on the runs that it concerns."""
    if kind == "params":
        params = message["params"]
        per_run = params if isinstance(params, list) else [params] * len(runs)
        for run, nested in zip(runs, per_run, strict=True):
            _params(run, nested)
    elif kind == "metrics":
        for member, values in message["records"]:
            runs[member].metrics(values, message["step"])
    elif kind == "histograms":
        for member, *histogram in message["records"]:
            runs[member].histogram(*histogram, message["step"])
    elif kind == "gif" and os.path.exists(message["path"]):  # it may have been deleted
        runs[0].gif(message["path"], message["name"], message["step"])


def _params(run: Run, nested: dict[str, Any]) -> None:
    run.params(nested, _flat(nested))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, node in tree.items():
        found |= _flat(node, f"{prefix}{key}.") if isinstance(node, dict) else {prefix + key: node}
    return found


def _git_commit() -> str | None:
    """The commit of the working directory, with a `+` if tracked files have changed."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return result.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _end_with(parent: int) -> None:
    """Waits for the parent to die, then kills this process and its children after `_GRACE`."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(_GRACE)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Handles messages until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what trackers print must not mix with the answers

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        runs = _open(**json.loads(sys.stdin.readline()))
        answer(runs=[run.id for run in runs])
        for line in sys.stdin:
            if line.endswith("\n"):  # else the training process died while writing it
                _handle(runs, **json.loads(line))
        for run in runs:
            run.close()
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
