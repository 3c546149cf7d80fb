"""Times the conversion of public Atari data formats on one core.

Random games are written in the original formats; the benchmark times everything from these files to
the finished data set on disk.

  python benchmarks/convert.py
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from formats import Raw, Ring, write_rlu
from play import play
from record import LOAD, RESULTS, write

from eqx_q.data import Source, convert, from_dqn_replay, from_rlu

_FORMATS: dict[str, Callable[..., Source]] = {"rlu": from_rlu, "dqn_replay": from_dqn_replay}


def write_originals(directory: Path, game: str, num_frames: int) -> Path:
    """Writes `<format>/<game>` to a directory in `directory` if missing; returns that one."""
    home = directory / f"{game}-{num_frames}"
    if home.exists():
        return home
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        whole = Path(temporary) / "whole"
        rlu, dqn_replay = (whole / name / game for name in _FORMATS)
        games = [
            Raw(rows.obs, rows.action[:-1], rows.reward[:-1], bool(rows.terminated.any()))
            for rows in play(game, Path(temporary) / "data", num_frames).episodes()
        ]
        write_rlu(rlu, 1, 0, games)
        clipped = [one._replace(reward=np.sign(one.reward)) for one in games]
        capacity = sum(len(one.frames) + 3 for one in games) + 1  # one file, not full
        Ring(dqn_replay / "1" / "replay_logs", capacity, games[0].frames.shape[1:]).play(clipped)
        whole.rename(home)
    return home


def time_conversion(read: Callable[[], Source]) -> dict[str, float]:
    """Frames, frames/s, and the fraction of the core that this process had."""
    with tempfile.TemporaryDirectory() as temporary:
        started, cpu = time.perf_counter(), time.process_time()
        dataset = convert(read(), Path(temporary) / "data", num_workers=1)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "frames": len(dataset),
        "frames_per_second": len(dataset) / seconds,
        "core_fraction": cpu / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--games", nargs="+", default=["Breakout", "Pong", "Seaquest"])
    parser.add_argument("--frames", type=int, default=30_000, help="a game (default: 30,000)")
    parser.add_argument("--repetitions", type=int, default=3, help="default: 3")
    parser.add_argument("--originals", type=Path, help="directory of the files, which are reused")
    parser.add_argument("--out", type=Path, default=RESULTS / "convert.json")
    args = parser.parse_args()
    if LOAD > 0.5:
        print(f"warning: the machine is busy (load {LOAD:.1f}): these figures may be unreliable")
    games: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        originals = args.originals or Path(temporary)
        homes = {game: write_originals(originals, game, args.frames) for game in args.games}
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        for game in args.games:
            games[game] = {}
            for name, reader in _FORMATS.items():
                folder = homes[game] / name / game
                read = functools.partial(reader, folder)
                runs = [time_conversion(read) for _ in range(args.repetitions)]
                speeds = [run["frames_per_second"] for run in runs]
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                games[game][name] = {
                    "frames": runs[0]["frames"],
                    "bytes_per_frame": size / runs[0]["frames"],
                    "frames_per_second": statistics.median(speeds),
                    "frames_per_second_each": speeds,
                    "core_fraction_each": [run["core_fraction"] for run in runs],
                }
                shown = ", ".join(f"{x:,.0f}" for x in speeds)
                print(f"{game:<10} {name:<11} {shown} frames/s", flush=True)
    write(args.out, {"cores": 1, "games": games})


if __name__ == "__main__":
    main()
