"""Checks that trackers do not change what is learnt, and measures how much they slow training.

Each round trains the same agent with `metrics.jsonl` alone, with each installed tracker, with all
of them at once, and with a tracker that needs ten seconds for every call. The trained agents must
be bit-identical. With the slow tracker, training may take 2 % longer, and the whole run 2 % plus
the 30 s that a tracker has to close. Nothing else should run on the machine.

  python benchmarks/trackers.py
  python benchmarks/trackers.py --rounds 1 --trackers tensorboard -- total_steps=200_000
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from exact_resume import differing
from record import RESULTS, ROOT, write

from eqx_q.saving.checkpoint import load
from eqx_q.tracking import installed
from eqx_q.tracking.remote import BACKENDS

_OPTIONS = ["env=cartpole", "total_steps=3_000_000"]
_BASELINE, _SLOW = "jsonl", "slow"
_CLOSE_TIMEOUT = 30.0  # seconds, the default of `RemoteTracker`
_MAX_RATIO = 1.02  # of times with the slow tracker and without any

_SLOW_BACKEND = """
import time

class Run:
    id = "slow"

    def wait(self, *arguments):
        time.sleep(10)

    __init__ = metrics = histogram = params = gif = close = wait
"""

# scripts/train.py imports this module, which replaces TensorBoard by the slow tracker.
_SLOW_MODULE = """
from pathlib import Path

from eqx_q.tracking import remote

remote._BACKENDS_DIR = Path(__file__).parent / "backends"
remote.BACKENDS["tensorboard"] = remote.BACKENDS["tensorboard"]._replace(package="json")
"""


def run(directory: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains in a process of its own. Returns its summary, with the warnings of trackers."""
    backends = directory / "slow" / "backends"
    backends.mkdir(parents=True)
    (backends / "tensorboard.py").write_text(_SLOW_BACKEND)
    (backends.parent / "slow_tracker.py").write_text(_SLOW_MODULE)
    paths = [str(backends.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "scripts/train.py", *_OPTIONS, *overrides]
    command += [f"hydra.run.dir={directory / 'run'}", f"tracker.repo={directory}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\nerror: scripts/train.py failed")
    summary = json.loads((directory / "run" / "summary.json").read_text())
    warnings = [line for line in done.stdout.splitlines() if "does not track this run" in line]
    return {**summary, "warnings": warnings}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    present = [name for name in BACKENDS if installed(name)]
    parser.add_argument(
        "overrides", nargs="*", help=f"of scripts/train.py, after {' '.join(_OPTIONS)}"
    )
    parser.add_argument("--trackers", nargs="+", default=present, help=f"default: {present}")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, default=RESULTS / "trackers.json")
    args = parser.parse_args()
    choices = {name: name for name in (_BASELINE, *args.trackers)}
    choices |= {"all": f"[{','.join(args.trackers)}]", _SLOW: "tensorboard"}
    found: dict[str, list[dict[str, Any]]] = {choice: [] for choice in choices}
    differing_parts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(args.rounds):
            for choice in choices:
                directory = Path(temporary) / str(number) / choice
                overrides = [*args.overrides, f"tracker={choices[choice]}"]
                overrides += ["+imports=[slow_tracker]"] if choice == _SLOW else []
                summary = run(directory, overrides)
                found[choice].append(summary)
                seconds = summary["train_seconds"], summary["wall_seconds"]
                print(f"{choice}: {seconds[0]:.1f} s of {seconds[1]:.1f} s", flush=True)
                ours, theirs = (
                    load(Path(temporary) / place / "run" / "agent.eqx")
                    for place in (f"0/{_BASELINE}", f"{number}/{choice}")
                )
                if names := differing(ours, theirs):
                    differing_parts[choice] = names

    def median(choice: str, name: str) -> float:
        return float(np.median([summary[name] for summary in found[choice]]))

    results = {}
    for choice in choices:
        results[choice] = {
            "train_seconds_each": [summary["train_seconds"] for summary in found[choice]],
            "wall_seconds_each": [summary["wall_seconds"] for summary in found[choice]],
            "times_as_long": median(choice, "train_seconds") / median(_BASELINE, "train_seconds"),
            "warnings": [len(summary["warnings"]) for summary in found[choice]],
        }
    bounds = {
        "training": results[_SLOW]["times_as_long"] <= _MAX_RATIO,
        "all": median(_SLOW, "wall_seconds")
        <= _MAX_RATIO * median(_BASELINE, "wall_seconds") + _CLOSE_TIMEOUT,
        "one_warning": results[_SLOW]["warnings"] == [1] * args.rounds,
    }
    result = {
        "overrides": [*_OPTIONS, *args.overrides],
        "bit_identical": not differing_parts,
        "differing": differing_parts,
        "slow_within": bounds,
        "trackers": results,
    }
    write(args.out, result)
    failed = [name for name, kept in bounds.items() if not kept]
    sys.exit(
        f"agents differ: {differing_parts}; bounds exceeded: {failed}"
        if differing_parts or failed
        else 0
    )


if __name__ == "__main__":
    main()
