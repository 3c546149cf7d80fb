"""Compares offline training with slimCQL: same data, network and hyperparameters, alternating.

Both learn from the same frames of random play in Pong. Timed are whole gradient steps, and sampling
batches alone; reading the data and compilation are reported separately.

  python benchmarks/speed_offline.py cql --peer slimcql=DIR --peer-python DIR/.venv/bin/python
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from play import play
from record import LOAD, RESULTS, commit, compose, write
from speed import drive

_FIGURES = ("updates_per_second", "batches_per_second")


def write_both(directory: Path, num_steps: int) -> int:
    """Writes the same transitions for both; returns the number of actions."""
    dataset = play("Pong", directory / "data", num_steps)
    rows = dataset.rows
    acted = rows.action >= 0  # the peer has no final observations
    np.savez(
        directory / "arrays.npz",
        frames=rows.obs[acted],
        actions=rows.action[acted],
        rewards=rows.reward[acted],
        terminals=rows.terminated[acted],
        ends=(rows.terminated | rows.truncated)[acted],
    )
    return int(dataset.description.action_space.n)  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("algorithm", choices=("cql", "dqn"), help="the algorithm of both")
    parser.add_argument("--peer", metavar="slimcql=PATH", help="a checkout")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="the Python that runs the peer"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="pairs of runs (default: 3)")
    parser.add_argument(
        "--rows", type=int, default=20_000, help="frames of the data (default: 20,000)"
    )
    parser.add_argument(
        "--num-updates", type=int, default=2_000, help="per run of ours (default: 2,000)"
    )
    parser.add_argument("--peer-updates", type=int, default=200, help="default: 200")
    parser.add_argument("--out", type=Path, help="default: by algorithm, in benchmarks/results")
    args = parser.parse_args()
    if LOAD > 0.5:
        print(f"warning: the machine is busy (load {LOAD:.1f}): these figures will be unreliable")
    agent = compose([f"agent={args.algorithm}", "env=atari"])["agent"]
    given = {k: v for k, v in agent["network_options"].items() if v is not None}
    agent = {**agent, "network_options": given}
    runs: dict[str, list[dict[str, Any]]] = {"eqx_q": []}
    result: dict[str, Any] = {"case": f"offline_{args.algorithm}", "peer": None, "agent": agent}
    with tempfile.TemporaryDirectory() as temporary:
        num_actions = write_both(Path(temporary), args.rows)
        requests = {
            "eqx_q": (
                sys.executable,
                "run_offline",
                {
                    "agent": agent,
                    "data": f"{temporary}/data",
                    "num_updates": args.num_updates,
                    "num_batches": 10_000,
                },
            )
        }
        if args.peer:
            name, _, path = args.peer.partition("=")
            if name != "slimcql" or not Path(path).is_dir():
                parser.error("give --peer slimcql=PATH")
            call = min(100, args.peer_updates)
            request = {"path": str(Path(path).resolve()), "arrays": f"{temporary}/arrays.npz"}
            request |= {"algorithm": args.algorithm, "hyperparameters": agent}
            request |= {"num_actions": num_actions, "updates_per_call": call}
            request |= {"num_updates": args.peer_updates, "num_batches": args.peer_updates}
            requests[name] = (args.peer_python, "run_slimcql", request)
            runs[name] = []
            result |= {"peer": name, "peer_commit": commit(Path(path))}
        for repetition in range(args.repetitions):
            for name, (python, driver, request) in requests.items():
                run = drive(python, driver, request, seed=repetition)
                runs[name].append(run)
                speed = "  ".join(f"{run[x]:10,.1f} {x.replace('_', ' ')}" for x in _FIGURES)
                print(f"{repetition + 1}/{args.repetitions} {name:<8} {speed}", flush=True)
    result["contestants"] = {
        name: {
            **{
                x: statistics.median(run[x] for run in each)
                for x, value in each[0].items()
                if isinstance(value, int | float)
            },
            **{f"{x}_each": [round(run[x], 1) for run in each] for x in _FIGURES},
            "versions": each[0]["versions"],
        }
        for name, each in runs.items()
    }
    if args.peer:
        result["ratio"] = {
            x: [ours[x] / theirs[x] for ours, theirs in zip(*runs.values(), strict=True)]
            for x in _FIGURES
        }
        print(f"ratio: {json.dumps(result['ratio'], indent=1)}")
    write(args.out or RESULTS / f"offline_speed_{args.algorithm}.json", result)


if __name__ == "__main__":
    main()
