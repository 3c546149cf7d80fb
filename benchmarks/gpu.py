"""Measures the library on a GPU, unattended: about 40 minutes, what matters most first.

Results are written after every step, and a step that fails does not stop the others. A training
that is cut (--minutes, or a signal) keeps its checkpoint: the same command continues it. Steps that
have a result from this commit and machine are left out, unless they are named.

  python benchmarks/gpu.py                     # all steps
  python benchmarks/gpu.py --minutes 9         # as many as fit; repeat the command for the rest
  python benchmarks/gpu.py pong minatar        # these
  python benchmarks/gpu.py --tiny              # whether everything works, in sizes for a CPU
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from exact_resume import differing, rows
from play import play
from record import RESULTS, ROOT, commit, compose, machine, write
from speed import configuration, drive, split

_MINATAR = ["env=minatar", "env.name=Breakout-MinAtar"]
_PONG = ["env=atari", "env.name=Pong-v5"]
_SOLVED = 20.0  # Pong
_GRACE = 60.0  # seconds for a training to save when it is told to stop


class Limits(NamedTuple):
    """What a step may use: whether in tiny sizes, a directory for runs, and when to stop.

    `deadline`: of `time.monotonic()`.
    """

    tiny: bool
    runs: Path
    deadline: float

    @property
    def seconds(self) -> float:
        """Seconds that are left."""
        return max(1.0, self.deadline - time.monotonic())


def training(name: str, overrides: list[str], limits: Limits) -> dict[str, Any]:
    """Trains by `scripts/train.py`, or continues it; it is told to stop at the deadline.

    **Returns:** its summary, and `evaluations`: triples of steps, training seconds and return.
    """
    directory = limits.runs / name
    command = [sys.executable, "scripts/train.py", *overrides, "tracker=jsonl", "video.every=0"]
    command += ["resume=auto", "eval.time_fraction=null", f"hydra.run.dir={directory}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    try:
        process.wait(limits.seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(_GRACE)
    if process.returncode:
        raise RuntimeError(f"scripts/train.py {' '.join(overrides)} failed")
    summary = json.loads((directory / "summary.json").read_text())
    seconds, evaluations = course(rows(directory))
    kept = ("status", "env_steps", "steps_per_second", "compile_seconds", "wall_seconds")
    kept += ("eval_return_per_seed", "train_return_per_seed")
    return {
        **{name: summary[name] for name in kept},
        "train_seconds": seconds,
        "evaluations": evaluations,
    }


def course(lines: list[dict[str, Any]]) -> tuple[float, list[tuple[int, float, float]]]:
    """Seconds of training over all resumes, and of each evaluation the steps, seconds and return.

    `lines`: of `metrics.jsonl`.
    """
    evaluations, before, last = [], 0.0, 0.0
    for line in lines:
        if line["train_seconds"] < last:  # a resume, which counts anew
            before += last
        last = line["train_seconds"]
        if line.get("eval/return") is not None:
            mean = float(np.mean(line["eval/return"]))
            evaluations.append((line["env_steps"], before + last, mean))
    return before + last, evaluations


def timed(overrides: list[str], steps: int, limits: Limits, **request: Any) -> dict[str, Any]:
    """Speed of training without evaluation, after compilation; the median of three."""
    config = configuration(overrides, steps)
    request = {"config": config, **request}
    repetitions = 1 if limits.tiny else 3
    runs = [
        drive(sys.executable, "run_library", request, seed=seed, timeout=limits.seconds)
        for seed in range(repetitions)
    ]
    each = [run["env_steps"] / run["seconds"] for run in runs]
    kept = ("compile_seconds", "peak_device_memory_mb", "device")
    return {
        "overrides": overrides,
        "steps_per_second": statistics.median(each),
        "steps_per_second_each": each,
        **{name: runs[0][name] for name in kept},
    }


def pong(limits: Limits) -> dict[str, Any]:
    """Atari's Pong: seconds of training until a greedy evaluation reaches 20."""
    sizes = ["total_steps=10_000_000", "eval.every=500_000"]
    if limits.tiny:
        sizes = ["total_steps=64", "num_envs=2", "agent.rollout_length=16", "eval.num_envs=1"]
        sizes += ["agent.num_minibatches=2", "eval.max_episode_steps=8"]
    result = training("pong", [*_PONG, *sizes], limits)
    solved = [seconds for _, seconds, mean in result["evaluations"] if mean >= _SOLVED]
    return {**result, "seconds_to_20": solved[0] if solved else None}


def atari(limits: Limits) -> dict[str, Any]:
    """Atari's speed, and the split of its time."""
    sizes = ["num_envs=2", "agent.num_minibatches=2"] if limits.tiny else []
    steps = 64 if limits.tiny else 500_000
    result = timed([*_PONG, *sizes], steps, limits)
    config = configuration([*_PONG, *sizes], steps)
    measured = drive(
        sys.executable, "measure_split", {"config": config}, seed=0, timeout=limits.seconds
    )
    return {**result, "split": split(measured, result["steps_per_second"])}


def minatar(limits: Limits) -> dict[str, Any]:
    """MinAtar's Breakout: 10 million steps of one seed, and of ten as one program."""
    sizes = ["total_steps=10_000_000"]
    if limits.tiny:
        sizes = ["total_steps=64", "num_envs=2", "agent.num_minibatches=2", "eval.num_envs=2"]
        sizes += ["eval.max_episode_steps=8"]
    return {
        f"{seeds} seeds": training(
            f"minatar_{seeds}", [*_MINATAR, f"num_seeds={seeds}", *sizes], limits
        )
        for seeds in ((1, 2) if limits.tiny else (1, 10))
    }


def craftax(limits: Limits) -> dict[str, Any]:
    """Craftax, symbolic, and Craftax-Classic."""
    sizes = ["num_envs=2", "agent.num_minibatches=2"] if limits.tiny else []
    games = ("craftax_classic",) if limits.tiny else ("craftax", "craftax_classic")
    steps = 2 if limits.tiny else 4_000_000
    return {game: timed([f"env={game}", *sizes], steps, limits) for game in games}


def cql(limits: Limits) -> dict[str, Any]:
    """CQL's updates on frames of Pong, and drawing batches alone."""
    options = compose(["agent=cql", "env=atari"])["agent"]
    network = {k: v for k, v in options["network_options"].items() if v is not None}
    sizes = {"num_updates": 4, "num_batches": 4} if limits.tiny else {"num_updates": 20_000}
    with tempfile.TemporaryDirectory() as directory:
        play("Pong", Path(directory) / "data", 300 if limits.tiny else 100_000)
        request = {
            "agent": {**options, "network_options": network},
            "data": f"{directory}/data",
            "num_batches": 100_000,
            **sizes,
        }
        return drive(sys.executable, "run_offline", request, seed=0, timeout=limits.seconds)


def cartpole(limits: Limits) -> dict[str, Any]:
    """Many CartPole agents as one program."""
    agents = 4 if limits.tiny else 2048
    sizes = [f"num_seeds={agents}", "eval.every=0"]
    return training("cartpole", [*sizes, f"total_steps={4096 if limits.tiny else 500_000}"], limits)


def launches(limits: Limits) -> dict[str, Any]:
    """Kernels that the profiler sees in an update, beside those counted in the program."""
    counted = json.loads((RESULTS / "launches.json").read_text())["cases"]
    found = {}
    for case, overrides in {"cartpole": ["env=cartpole"], "minatar": _MINATAR}.items():
        request = {"config": compose(overrides), "num_updates": 2 if limits.tiny else 10}
        seen = drive(sys.executable, "profile_library", request, seed=0, timeout=limits.seconds)
        found[case] = {**seen, "counted_per_update": counted[case]["eqx_q"]["update"]}
    return found


def bfloat16(limits: Limits) -> dict[str, Any]:
    """Training with products in bfloat16, beside the default, from small to large networks."""
    sizes = ["num_envs=2", "agent.num_minibatches=2"] if limits.tiny else []
    cases = {"minatar": _MINATAR}
    if not limits.tiny:
        cases |= {"atari": _PONG, "gamma_hadamax": [*_PONG, "tuned=pqn_atari_strong"]}
        cases |= {"craftax": ["env=craftax"]}
    found: dict[str, Any] = {}
    for case, overrides in cases.items():
        steps = 64 if limits.tiny else 4_000_000 if case in ("minatar", "craftax") else 200_000
        found[case] = {
            precision: timed([*overrides, *sizes, f"agent.precision={precision}"], steps, limits)
            for precision in ("float32", "bfloat16")
        }
        speeds = [found[case][name]["steps_per_second"] for name in ("bfloat16", "float32")]
        found[case]["ratio"] = speeds[0] / speeds[1]
    return found


def determinism(limits: Limits) -> dict[str, Any]:
    """Whether `deterministic=true` makes two runs bit-identical, and what it costs."""
    sizes = ["total_steps=1_000_000", "eval.every=0", "checkpoint.keep=1"]
    if limits.tiny:
        sizes += ["total_steps=128", "num_envs=2", "agent.num_minibatches=2"]
    found: dict[str, Any] = {}
    for choice in ("false", "true"):
        names = [f"deterministic_{choice}_{i}" for i in range(2)]
        runs = [
            training(name, [*_MINATAR, *sizes, f"deterministic={choice}"], limits) for name in names
        ]
        found[f"deterministic={choice}"] = {
            "identical": not differing(*(_agent(limits.runs / name) for name in names)),
            "steps_per_second_each": [run["steps_per_second"] for run in runs],
        }
    return found


def is_whole(result: dict[str, Any]) -> bool:
    """Whether a step neither failed nor was cut."""
    parts = [part for part in result.values() if isinstance(part, dict)]
    return (
        "error" not in result
        and result.get("status", "done") == "done"
        and all(map(is_whole, parts))
    )


def _agent(directory: Path) -> Any:
    from eqx_q import load  # starts JAX

    return load(directory / "agent.eqx")


STEPS: dict[str, Callable[[Limits], dict[str, Any]]] = {
    step.__name__: step
    for step in (pong, atari, minatar, craftax, cql, cartpole, launches, bfloat16, determinism)
}


def main() -> None:
    about = "\n".join(f"  {name:<14}{step.__doc__}" for name, step in STEPS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nSteps, in this order:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("steps", nargs="*", help="default: all without a result")
    parser.add_argument("--minutes", type=float, default=40.0, help="default: 40")
    parser.add_argument("--tiny", action="store_true", help="in sizes for a CPU")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gpu", help="their directory")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.json")
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; steps are {', '.join(STEPS)}")
    if args.tiny and not args.out:
        parser.error("with --tiny the results mean nothing: give --out FILE")
    out = args.out or RESULTS / "gpu.json"
    here = {"commit": commit(ROOT), "machine": machine()["cpu"]}
    found: dict[str, Any] = json.loads(out.read_text())["steps"] if out.exists() else {}
    deadline = time.monotonic() + 60 * args.minutes
    limits = Limits(args.tiny, args.runs.resolve(), deadline)
    failed = []
    for name in args.steps or STEPS:
        before = found.get(name, {})
        if not args.steps and before.get("of") == here and is_whole(before):
            continue
        if time.monotonic() >= deadline:
            failed.append(name)
            continue
        print(f"{name}: {STEPS[name].__doc__}", flush=True)
        begin = time.monotonic()
        try:
            result = STEPS[name](limits)
        except (Exception, SystemExit) as error:  # of one step; the others go on
            traceback.print_exc()
            result = {"error": " ".join(str(error).split())}
        result |= {"seconds": time.monotonic() - begin, "of": here}
        found[name] = result
        print(json.dumps(result), flush=True)
        write(out, {"steps": found})
        if not is_whole(result):
            failed.append(name)
    if failed:
        sys.exit(f"without a result: {', '.join(failed)}")


if __name__ == "__main__":
    main()
