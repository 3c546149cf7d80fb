"""Shows that the memory use of a run does not grow with its length.

Trains once, and once for ten times as long, each in its own process, with everything enabled that
could make memory grow: a line of metrics at every update, evaluations, checkpoints. Memory is read
from the operating system, at the end and during the longer run.

  python benchmarks/memory.py
  python benchmarks/memory.py env=minatar total_steps=500_000
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, ROOT, compose, write

_POINTS = 20
_EVERY_SECONDS = 0.2


def run(overrides: list[str], total_steps: int) -> list[float]:
    """Resident megabytes of a training, sampled while it runs."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *(sys.executable, "scripts/train.py", *overrides, f"total_steps={total_steps}"),
            *("log_every=1", "tracker=jsonl", "video.every=0", f"hydra.run.dir={directory}/run"),
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        samples: list[float] = []
        ended = threading.Event()

        def watch():
            while not ended.wait(_EVERY_SECONDS):
                samples.extend(resident_mb(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        ended.set()
        watcher.join()
    if status:
        sys.exit("error: scripts/train.py failed with the message above")
    return samples


def resident_mb(pid: int) -> list[float]:
    """The resident memory of a process; `None` if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")]


def summarise(samples: list[float]) -> dict[str, Any]:
    """The peak, and the mean of each twentieth of the run's time."""
    parts = np.array_split(samples, min(_POINTS, len(samples)))
    return {"peak_mb": max(samples), "through_the_run_mb": [round(p.mean(), 1) for p in parts]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("override", nargs="*", help="overrides of scripts/train.py")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    args = parser.parse_args()
    total_steps = int(compose(args.override)["total_steps"])
    result: dict[str, Any] = {"overrides": args.override}
    for name, steps in (("short", total_steps), ("long", 10 * total_steps)):
        begin = time.perf_counter()
        result[name] = {"total_steps": steps, **summarise(run(args.override, steps))}
        peak, seconds = result[name]["peak_mb"], time.perf_counter() - begin
        print(f"{steps:12,} steps: at most {peak:.0f} MB ({seconds:.0f} s)", flush=True)
    write(args.out, result)


if __name__ == "__main__":
    main()
