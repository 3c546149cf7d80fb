"""The process in which Aim runs: `eqx_q.tracking.aim` starts this file and sends it JSON lines.

Aim may hang on a lock, crash or print; here it can do so without touching the training process.
The first line says what to open, each later one is a call of `_Session.handle`. The answer to
the first is `{"runs": [hash, ...]}`; an error is answered with `{"error": ...}`, and ends it all.
"""

import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_GRACE = 60.0  # seconds to finish when the run has died


class _Session:
    """Aim runs that are open, one for each member of a population."""

    def __init__(
        self,
        repo: str,
        experiment: str | None,
        names: list[str],
        hashes: list[str],
        process: int,
        patience: float,
    ):
        import aim
        import psutil
        from aim.ext.resource import tracker

        self._aim = aim
        # What Aim samples should be the training process, not this one.
        setattr(tracker, "Process", functools.partial(psutil.Process, process))  # noqa: B010
        repository = _repository(repo, patience)
        known = [h if repository.run_exists(h) else None for h in hashes] or [None] * len(names)
        self.runs = []
        for name, run_hash in zip(names, known, strict=True):
            open_run = functools.partial(
                aim.Run,
                run_hash,
                repo=repository,
                experiment=experiment,
                capture_terminal_logs=False,
                system_tracking_interval=None if self.runs else 10,  # one of them is enough
            )
            # A run that was killed and is resumed at once may not have let go of it yet.
            run = _patiently(open_run, patience)
            run.name = name
            run["git_commit"] = _git_commit()
            self.runs.append(run)

    def handle(self, kind: str, step: int | None = None, **message: Any) -> None:
        """Does what a message says."""
        if kind == "params":
            of_each = message["params"]
            if not isinstance(of_each, list):
                of_each = [of_each] * len(self.runs)
            for i, (run, params) in enumerate(zip(self.runs, of_each, strict=True)):
                for name, value in params.items():
                    run[name] = value
                run["member"] = i
        elif kind == "metrics":
            for i, values, context in message["records"]:
                self.runs[i].track(values, step=step, context=context)
        elif kind == "histograms":
            for i, name, counts, ends, context in message["records"]:
                histogram = self._aim.Distribution(hist=counts, bin_range=ends)
                self.runs[i].track(histogram, name=name, step=step, context=context)
        elif kind == "gif":
            image = self._aim.Image(message["path"])
            self.runs[0].track(image, name=message["name"], step=step, context=message["context"])


def _patiently(action: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action()
        except Exception:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _repository(path: str, patience: float) -> Any:
    """Opens a repository; where several runs start at once in a new one, the first makes it."""
    import aim
    from aim.sdk.configs import get_aim_repo_name

    directory = Path(path) / get_aim_repo_name()
    made = directory / "VERSION"  # the last thing that making it writes
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        deadline = time.monotonic() + patience
        while not made.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    return aim.Repo.from_path(path, init=not made.exists())


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
    """Ends this process, however stuck, soon after the one that started it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(_GRACE)
    os._exit(1)


def main() -> int:
    """Serves until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Aim prints

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    try:
        session = _Session(**json.loads(sys.stdin.readline()))
        answer(runs=[run.hash for run in session.runs])
        for line in sys.stdin:
            if line.endswith("\n"):  # else the training process died in the middle of it
                session.handle(**json.loads(line))
        for run in session.runs:
            run.close()
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
