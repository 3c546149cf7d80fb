"""Measures the library on a GPU, unattended: about 40 minutes, what matters most first.

Results are written after every step, and a step that fails does not stop the others. A training
that is cut (--minutes, or a signal) keeps its checkpoint: the same command continues it. Steps that
have a result from this commit and device are left out, unless they are named.

  python benchmarks/gpu.py                     # all steps
  python benchmarks/gpu.py --minutes 9         # as many as fit; repeat the command for the rest
  python benchmarks/gpu.py pong minatar        # these
  python benchmarks/gpu.py --tiny --out FILE   # whether everything works, in sizes for a CPU
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from exact_resume import differing, rows
from play import play
from record import RESULTS, ROOT, commit, compose, write
from speed import configuration, drive, split

import eqx_q

_MINATAR = ["env=minatar", "env.name=Breakout-MinAtar"]
_PONG = ["env=atari", "env.name=Pong-v5"]
_SOLVED = 20.0  # Pong
_LOOPS_TOO = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
_GRAPHS = {
    "default": "",
    "without": "--xla_gpu_enable_command_buffer=",
    "with loops": _LOOPS_TOO,
    "with loops, unrolled": f"{_LOOPS_TOO} --xla_gpu_command_buffer_unroll_loops=true",
}
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
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    finally:
        process.kill()  # nothing if it has ended
        process.wait()
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
        if line["train_seconds"] is None:  # the end of a run that was killed after it
            continue
        if line["train_seconds"] < last:  # a resume, which counts anew
            before += last
        last = line["train_seconds"]
        if line.get("eval/return") is not None:
            mean = float(np.mean(line["eval/return"]))
            evaluations.append((line["env_steps"], before + last, mean))
    return before + last, evaluations


def timed(overrides: list[str], steps: int, limits: Limits) -> dict[str, Any]:
    """Speed of training without evaluation, after compilation; the mean of two runs."""
    request = {"config": configuration(overrides, steps)}
    runs = [
        drive(sys.executable, "run_library", request, seed=seed, timeout=limits.seconds)
        for seed in range(1 if limits.tiny else 2)
    ]
    each = [run["env_steps"] / run["seconds"] for run in runs]
    kept = ("compile_seconds", "peak_device_memory_mb", "device")
    return {
        "overrides": overrides,
        "steps_per_second": statistics.mean(each),
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
    overrides, steps = _of_pong(limits)
    result = timed(overrides, steps, limits)
    request = {"config": configuration(overrides, steps), "steps": 64 if limits.tiny else 20_000}
    measured = drive(sys.executable, "measure_split", request, seed=0, timeout=limits.seconds)
    return {**result, "split": split(measured, result["steps_per_second"])}


def atari_double_buffered(limits: Limits) -> dict[str, Any]:
    """Atari's speed where the agent acts in one half of the lanes while the other is stepped."""
    overrides, steps = _of_pong(limits)
    return timed([*overrides, "env.double_buffered=true"], steps, limits)


def _of_pong(limits: Limits) -> tuple[list[str], int]:
    sizes = ["num_envs=2", "agent.num_minibatches=2"] if limits.tiny else []
    return [*_PONG, *sizes], 64 if limits.tiny else 500_000


def minatar(limits: Limits) -> dict[str, Any]:
    """MinAtar's Breakout: 10 million steps of one seed."""
    return _minatar(1, limits)


def minatar_seeds(limits: Limits) -> dict[str, Any]:
    """MinAtar's Breakout: 10 million steps of each of ten seeds, as one program."""
    return _minatar(2 if limits.tiny else 10, limits)


def _minatar(num_seeds: int, limits: Limits) -> dict[str, Any]:
    sizes = ["total_steps=10_000_000"]
    if limits.tiny:
        sizes = ["total_steps=64", "num_envs=2", "agent.num_minibatches=2", "eval.num_envs=2"]
        sizes += ["eval.max_episode_steps=8"]
    overrides = [*_MINATAR, f"num_seeds={num_seeds}", *sizes]
    return training(f"minatar_{num_seeds}", overrides, limits)


def craftax(limits: Limits) -> dict[str, Any]:
    """Craftax, symbolic."""
    return timed(["env=craftax", *_small(limits)], 2 if limits.tiny else 4_000_000, limits)


def craftax_classic(limits: Limits) -> dict[str, Any]:
    """Craftax-Classic, symbolic."""
    return timed(["env=craftax_classic", *_small(limits)], 2 if limits.tiny else 4_000_000, limits)


def _small(limits: Limits) -> list[str]:
    return ["num_envs=2", "agent.num_minibatches=2"] if limits.tiny else []


def cql(limits: Limits) -> dict[str, Any]:
    """CQL's updates on frames of Pong, and drawing batches alone."""
    options = compose(["agent=cql", "env=atari"])["agent"]
    network = {k: v for k, v in options["network_options"].items() if v is not None}
    with tempfile.TemporaryDirectory() as directory:
        play("Pong", Path(directory) / "data", 300 if limits.tiny else 30_000)
        request = {
            "agent": {**options, "network_options": network},
            "data": f"{directory}/data",
            "num_updates": 4 if limits.tiny else 20_000,
            "num_batches": 4 if limits.tiny else 100_000,
        }
        return drive(sys.executable, "run_offline", request, seed=0, timeout=limits.seconds)


def cartpole(limits: Limits) -> dict[str, Any]:
    """2,048 CartPole agents as one program."""
    sizes = [f"num_seeds={4 if limits.tiny else 2048}", "eval.every=0"]
    return training("cartpole", [*sizes, f"total_steps={4096 if limits.tiny else 500_000}"], limits)


def launches(limits: Limits) -> dict[str, Any]:
    """Kernels that the profiler sees in an update, beside those counted in the program."""
    counted = RESULTS / "launches.json"
    cases = json.loads(counted.read_text())["cases"] if counted.exists() else {}
    found = {}
    for case, overrides in {"cartpole": ["env=cartpole"], "minatar": _MINATAR}.items():
        request = {"config": compose(overrides), "num_updates": 2 if limits.tiny else 10}
        seen = drive(sys.executable, "profile_library", request, seed=0, timeout=limits.seconds)
        if not seen["seen_per_update"] and not limits.tiny:
            raise RuntimeError("the profiler saw no kernels: install CUPTI, or run as root")
        update = cases.get(case, {}).get("eqx_q", {}).get("update")
        found[case] = {**seen, "counted_per_update": update}
    return found


def graphs(limits: Limits) -> dict[str, Any]:
    """CartPole with loops of gradient steps as CUDA graphs, launched as one, beside the default."""
    steps = 4096 if limits.tiny else 1_000_000
    given, found = os.environ.get("XLA_FLAGS", ""), {}
    for name, flags in _GRAPHS.items():
        with mock.patch.dict(os.environ, XLA_FLAGS=f"{given} {flags}".strip()):
            found[name] = timed(["env=cartpole"], steps, limits)
    return found


def bfloat16(limits: Limits) -> dict[str, Any]:
    """MinAtar's Breakout with products in bfloat16, beside the default."""
    return _precisions([*_MINATAR, *_small(limits)], 64 if limits.tiny else 4_000_000, limits)


def bfloat16_atari(limits: Limits) -> dict[str, Any]:
    """Atari with products in bfloat16, beside the default."""
    return _precisions(*_of_pong(limits), limits)


def bfloat16_gamma_hadamax(limits: Limits) -> dict[str, Any]:
    """Atari's largest network with products in bfloat16, beside the default."""
    overrides, steps = _of_pong(limits)
    return _precisions([*overrides, "tuned=pqn_atari_strong"], steps, limits)


def _precisions(overrides: list[str], steps: int, limits: Limits) -> dict[str, Any]:
    found: dict[str, Any] = {
        precision: timed([*overrides, f"agent.precision={precision}"], steps, limits)
        for precision in ("float32", "bfloat16")
    }
    speeds = {name: each["steps_per_second"] for name, each in found.items()}
    return {**found, "ratio": speeds["bfloat16"] / speeds["float32"]}


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
        if any(run["status"] != "done" for run in runs):
            raise TimeoutError("a training was cut: repeat the command to continue it")
        one, other = (eqx_q.load(limits.runs / name / "agent.eqx") for name in names)
        found[f"deterministic={choice}"] = {
            "identical": not differing(one, other),
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


class Step(NamedTuple):
    """A function, and the minutes that it may take."""

    measure: Callable[[Limits], dict[str, Any]]
    minutes: float = 4.0


STEPS = {
    step.measure.__name__: step
    for step in (
        Step(pong, 14.0),
        Step(atari),
        Step(atari_double_buffered),
        Step(minatar),
        Step(minatar_seeds, 6.0),
        Step(craftax),
        Step(cql),
        Step(cartpole),
        Step(launches),
        Step(graphs),
        Step(bfloat16_gamma_hadamax),
        Step(bfloat16_atari),
        Step(bfloat16),
        Step(determinism),
        Step(craftax_classic),
    )
}


def device() -> str:
    """The kind of the device that trainings run on. Exits unless it is a GPU."""
    program = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"
    told = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    platform, _, kind = told.stdout.strip().partition(" ")
    if platform != "gpu":
        sys.exit("error: JAX finds no GPU: install eqx_q with [cuda], or give --tiny")
    return kind


def main() -> None:
    about = "\n".join(f"  {name:<24}{step.measure.__doc__}" for name, step in STEPS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nSteps, in this order:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("steps", nargs="*", help="default: all without a result")
    parser.add_argument("--minutes", type=float, default=40.0, help="default: 40")
    parser.add_argument("--tiny", action="store_true", help="in sizes for a CPU")
    parser.add_argument("--runs", type=Path, help="of trainings; default: runs/gpu_COMMIT")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.json")
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; steps are {', '.join(STEPS)}")
    if args.tiny and not args.out:
        parser.error("with --tiny the results mean nothing: give --out FILE")
    jax.config.update("jax_platforms", "cpu")  # of this process; the device is its children's
    here = {"commit": commit(ROOT), "device": "tiny" if args.tiny else device()}
    runs = (args.runs or ROOT / "runs" / f"gpu_{here['commit']}{'_tiny' * args.tiny}").resolve()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(runs / "compiled"))
    out = args.out or RESULTS / "gpu.json"
    found: dict[str, Any] = json.loads(out.read_text())["steps"] if out.exists() else {}
    deadline = time.monotonic() + 60 * args.minutes
    failed = []
    for name in args.steps or STEPS:
        before = found.get(name, {})
        if not args.steps and before.get("of") == here and is_whole(before):
            continue
        if time.monotonic() >= deadline:
            failed.append(name)
            continue
        step, begin = STEPS[name], time.monotonic()
        print(f"{name}: {step.measure.__doc__}", flush=True)
        try:
            limits = Limits(args.tiny, runs, min(deadline, begin + 60 * step.minutes))
            result = step.measure(limits)
        except (Exception, SystemExit) as error:  # of one step; the others go on
            traceback.print_exc()
            result = {**before, "error": " ".join(str(error).split())}
        else:
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
