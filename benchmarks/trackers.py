"""Shows that trackers change nothing in a training, and hardly slow it.

Trains the same with `metrics.jsonl` alone, with each tracker that is installed, with all of them at
once, and with one that takes ten seconds for every call; rounds alternate. Compares the agents bit
by bit, and times: training may take 2 % longer, and so may all of it, 30 s for a tracker's end left
out. The machine should do nothing else.

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
_ALONE, _SLOW = "jsonl", "slow"
_TO_FINISH = 30.0  # seconds that a tracker has, the default of `close_timeout`
_MOST = 1.02  # times as long

_PROGRAM = """
import time

class Run:
    id = "slow"

    def wait(self, *arguments):
        time.sleep(10)

    __init__ = metrics = histogram = params = gif = close = wait
"""

# What scripts/train.py imports, to have that in TensorBoard's place.
_PUT_THERE = """
from pathlib import Path

from eqx_q.tracking import remote

remote._PROGRAMS = Path(__file__).parent / "programs"
remote.BACKENDS["tensorboard"] = remote.BACKENDS["tensorboard"]._replace(package="json")
"""


def run(directory: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains in a process of its own; gives its summary, and what was said of trackers."""
    programs = directory / "slow" / "programs"
    programs.mkdir(parents=True)
    (programs / "tensorboard.py").write_text(_PROGRAM)
    (programs.parent / "slow_tracker.py").write_text(_PUT_THERE)
    paths = [str(programs.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "scripts/train.py", *_OPTIONS, *overrides]
    command += [f"hydra.run.dir={directory / 'run'}", f"tracker.repo={directory}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\nerror: scripts/train.py failed")
    summary = json.loads((directory / "run" / "summary.json").read_text())
    said = [line for line in done.stdout.splitlines() if "lacks this run" in line]
    return {**summary, "warnings": said}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    present = [name for name in BACKENDS if installed(name)]
    parser.add_argument("overrides", nargs="*", help=f"of the training, after {' '.join(_OPTIONS)}")
    parser.add_argument("--trackers", nargs="+", default=present, help=f"default: {present}")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, default=RESULTS / "trackers.json")
    args = parser.parse_args()
    choices = {name: name for name in (_ALONE, *args.trackers)}
    choices |= {"all": f"[{','.join(args.trackers)}]", _SLOW: "tensorboard"}
    found: dict[str, list[dict[str, Any]]] = {choice: [] for choice in choices}
    wrong: dict[str, list[str]] = {}
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
                    for place in (f"0/{_ALONE}", f"{number}/{choice}")
                )
                if others := differing(ours, theirs):
                    wrong[choice] = others

    def median(choice: str, name: str) -> float:
        return float(np.median([summary[name] for summary in found[choice]]))

    results = {}
    for choice in choices:
        results[choice] = {
            "train_seconds_each": [summary["train_seconds"] for summary in found[choice]],
            "wall_seconds_each": [summary["wall_seconds"] for summary in found[choice]],
            "times_as_long": median(choice, "train_seconds") / median(_ALONE, "train_seconds"),
            "warnings": [len(summary["warnings"]) for summary in found[choice]],
        }
    bounds = {
        "training": results[_SLOW]["times_as_long"] <= _MOST,
        "all": median(_SLOW, "wall_seconds") <= _MOST * median(_ALONE, "wall_seconds") + _TO_FINISH,
        "one_warning": results[_SLOW]["warnings"] == [1] * args.rounds,
    }
    result = {
        "overrides": [*_OPTIONS, *args.overrides],
        "bit_identical": not wrong,
        "differing": wrong,
        "slow_within": bounds,
        "trackers": results,
    }
    write(args.out, result)
    failed = [name for name, kept in bounds.items() if not kept]
    sys.exit(f"not the same: {wrong}; beyond its bound: {failed}" if wrong or failed else 0)


if __name__ == "__main__":
    main()
