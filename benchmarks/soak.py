"""A soak test: memory and files stay bounded, and steps are counted past 2^32.

Trains a tiny agent for more than 2^32 steps, with everything enabled that could grow (metrics about
every second, evaluations, checkpoints, Aim). An interrupted soak continues:

  python benchmarks/soak.py --runs runs/soak
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from memory import resident_mb, summarise
from record import RESULTS, ROOT, write

_SIZES = [
    "env=cartpole",
    "tuned=none",
    "total_steps=4_400_000_000",
    "num_envs=1024",
    "agent.rollout_length=32",
    "agent.num_epochs=1",
    "agent.num_minibatches=1",
    "agent.network_options.hidden_sizes=[4]",
    "agent.network_options.norm=none",
    "tracker=aim",
    "video.every=0",
    "eval.num_episodes=128",
]
_EVERY_SECONDS = 5.0


def run(directory: Path, overrides: list[str]) -> dict[str, list[float]]:
    """Trains to the end; returns the measurements taken on the way."""
    command = [sys.executable, "scripts/train.py", *_SIZES, *overrides]
    command += ["resume=auto", f"hydra.run.dir={directory / 'run'}", f"tracker.repo={directory}"]
    process = subprocess.Popen(command, cwd=ROOT)
    seen: dict[str, list[float]] = {"seconds": [], "mb": [], "files": [], "files_mb": []}
    begin = time.perf_counter()
    while process.poll() is None:
        sizes = [_size(path) for path in directory.rglob("*")]
        seen["seconds"].append(time.perf_counter() - begin)
        seen["mb"] += resident_mb(process.pid) or [float("nan")]
        seen["files"].append(len(sizes))
        seen["files_mb"].append(sum(sizes) / 2**20)
        time.sleep(_EVERY_SECONDS)
    if process.returncode:
        sys.exit("error: scripts/train.py failed with the message above")
    return seen


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # the process has ended
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("override", nargs="*", help="overrides of scripts/train.py")
    parser.add_argument("--runs", type=Path, required=True, help="directory, kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    args = parser.parse_args()
    directory = args.runs.resolve()
    seen = run(directory, args.override)
    summary = json.loads((directory / "run" / "summary.json").read_text())
    (name,) = json.loads((directory / "run" / "aim.json").read_text())["runs"]
    aim: Any = importlib.import_module("aim")  # Python 3.11 alone has it
    tracked = aim.Repo.from_path(str(directory)).request_tree("meta", name, read_only=True)
    steady = np.array(seen["mb"][len(seen["mb"]) // 5 :])  # everything is compiled by then
    hours = np.array(seen["seconds"][len(seen["mb"]) // 5 :]) / 3600
    result: dict[str, Any] = {
        "overrides": [*_SIZES, *args.override],
        "env_steps": summary["env_steps"],
        "transitions": summary["transitions"],
        "steps_per_second": summary["steps_per_second"],
        "hours": seen["seconds"][-1] / 3600,
        "memory": summarise(seen["mb"]),
        "memory_growth_mb_per_hour": float(np.polyfit(hours, steady, 1)[0]),
        "files": seen["files"][-1],
        "most_files": max(seen["files"]),
        "files_mb": seen["files_mb"][-1],
        "lines_of_metrics": sum(1 for _ in (directory / "run" / "metrics.jsonl").open()),
        "aim_run_is_closed": tracked["meta", "chunks", name, "end_time"] is not None,
    }
    print(result)
    write(args.out, result)


if __name__ == "__main__":
    main()
