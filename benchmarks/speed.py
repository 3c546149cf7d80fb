"""Compares speed with a peer: same environment, same hyperparameters, alternating runs.

Every run is a separate process without evaluation; compile time is reported separately. Runs
alternate (ours, the peer's, ours, ...), and ratios are taken pair by pair. Also reported: the
fraction of the machine's matmul ceiling at the network's shapes, and the split of time between
environment, acting and learning. Without --peer the library is measured alone.

A peer is given by its checkout and a Python that runs its scripts:

  python benchmarks/speed.py cartpole --peer purejaxql=DIR --peer-python DIR/.venv/bin/python
  python benchmarks/speed.py cleanrl_cartpole --peer cleanrl=DIR --peer-python DIR/.venv/bin/python
  python benchmarks/speed.py minatar num_seeds=10 --out seeds.json

An earlier version of the library runs beside them, if a checkout of it is given:

  python benchmarks/speed.py minatar --earlier DIR
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import LOAD, RESULTS, ROOT, commit, compose, write


@dataclass(frozen=True)
class Case:
    """A comparison: our configuration, the peer's script, and further configurations of ours.

    `loss`: the ratio of the peer's loss to ours, by which the gradient clip is scaled.
    """

    overrides: list[str]
    total_steps: int
    peer: str
    request: dict[str, Any]
    beside: dict[str, list[str]] = field(default_factory=dict)
    loss: float = 1.0


CASES = {
    "cartpole": Case(
        ["env=cartpole"],
        500_000,
        "purejaxql",
        {"script": "pqn_gymnax", "algorithm": "pqn_cartpole"},
    ),
    "minatar": Case(
        ["env=minatar", "env.name=Breakout-MinAtar"],
        1_000_000,
        "purejaxql",
        {"script": "pqn_minatar", "algorithm": "pqn_minatar"},
    ),
    "atari": Case(
        ["env=atari", "env.name=Pong-v5"],
        4096,  # one update: the peer takes minutes for it on two cores
        "purejaxql",
        {"script": "pqn_atari", "algorithm": "pqn_atari"},
    ),
    "rnn_cartpole": Case(
        ["agent=pqn_rnn", "env=cartpole"],
        100_000,
        "purejaxql",
        {"script": "pqn_rnn_gymnax", "algorithm": "pqn_rnn_cartpole"},
    ),
    "rnn_memory_chain": Case(
        ["agent=pqn_rnn", "env=memory_chain"],
        100_000,
        "purejaxql",
        {"script": "pqn_rnn_gymnax", "algorithm": "pqn_rnn_memory_chain"},
        beside={
            f"eqx_q, {memory}": [
                "agent=pqn_rnn",
                "env=memory_chain",
                f"agent.network_options.memory={memory}",
            ]
            for memory in ("lstm", "mingru")
        },
    ),
    "vdn_smax": Case(
        ["agent=pqn_vdn", "env=smax"],
        2 * 128 * 128,
        "purejaxql",
        {"script": "pqn_vdn_rnn_jaxmarl", "algorithm": "pqn_vdn_rnn_smax"},
        loss=2.0,
    ),
    "craftax": Case(
        ["env=craftax"],
        64 * 1024,  # 64 updates, so that making the first 1024 worlds takes a small part
        "purejaxql",
        {"script": "pqn_craftax", "algorithm": "pqn_craftax"},
    ),
    "cleanrl_cartpole": Case(
        ["env=cartpole", "tuned=cleanrl_cartpole"],
        500_000,
        "cleanrl",
        {"script": "pqn.py"},
        beside={"eqx_q, Gymnasium": ["env=gymnasium", "tuned=cleanrl_cartpole"]},
    ),
}

# The peers' names of our hyperparameters, which are passed to them.
_PUREJAXQL = {
    "NUM_ENVS": "num_envs",
    "TOTAL_TIMESTEPS": "total_steps",
    "ENV_NAME": "env.name",
    "TOTAL_TIMESTEPS_DECAY": "agent.schedule_steps",
    "NUM_STEPS": "agent.rollout_length",
    "NUM_EPOCHS": "agent.num_epochs",
    "NUM_MINIBATCHES": "agent.num_minibatches",
    "LR": "agent.learning_rate",
    "MAX_GRAD_NORM": "agent.max_grad_norm",
    "GAMMA": "agent.discount",
    "LAMBDA": "agent.lambda_",
    "EPS_START": "agent.epsilon_start",
    "EPS_FINISH": "agent.epsilon_end",
    "EPS_DECAY": "agent.epsilon_decay",
    "REW_SCALE": "agent.reward_scale",
}
# CleanRL's loss is twice ours, so its default clip of 10 equals our 5.
_CLEANRL = {
    "num_envs": "num_envs",
    "total_timesteps": "total_steps",
    "env_id": "env.name",
    "num_steps": "agent.rollout_length",
    "update_epochs": "agent.num_epochs",
    "num_minibatches": "agent.num_minibatches",
    "learning_rate": "agent.learning_rate",
    "gamma": "agent.discount",
    "q_lambda": "agent.lambda_",
    "start_e": "agent.epsilon_start",
    "end_e": "agent.epsilon_end",
    "exploration_fraction": "agent.epsilon_decay",
}
_PEERS = {"purejaxql": ("overrides", _PUREJAXQL), "cleanrl": ("arguments", _CLEANRL)}


def configuration(overrides: list[str], total_steps: int) -> dict[str, Any]:
    """Our configuration for `steps` steps, with schedules over the whole tuned length."""
    config = compose(overrides)
    config["agent"]["schedule_steps"] = config["agent"]["schedule_steps"] or config["total_steps"]
    return {**config, "total_steps": total_steps}


def peer_request(case: Case, config: dict[str, Any], path: str) -> dict[str, Any]:
    """The request to the peer's driver: its own configuration file, with our values."""
    argument, names = _PEERS[case.peer]
    values = {theirs: _select(config, ours) for theirs, ours in names.items()}
    if "MAX_GRAD_NORM" in values:
        values["MAX_GRAD_NORM"] *= case.loss
    return {**case.request, "path": str(Path(path).resolve()), argument: values}


def _select(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def drive(
    python: str,
    driver: str,
    request: dict[str, Any],
    seed: int,
    timeout: float | None = None,
    checkout: Path = ROOT,
) -> dict[str, Any]:
    """Runs a driver in its own process; its last line of output is the result."""
    script = checkout / "benchmarks" / "drivers" / f"{driver}.py"
    command = [python, "-W", "ignore", str(script), json.dumps({**request, "seed": seed})]
    process = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=checkout,
        env=_environment(checkout),
        timeout=timeout,
    )
    if process.returncode:
        sys.exit(f"error: {driver} failed with the message above: {python} {script.name}")
    return json.loads(process.stdout.splitlines()[-1])


def _environment(checkout: Path) -> dict[str, str]:
    """The environment of a process that imports the library of a checkout."""
    if checkout == ROOT:
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": str(checkout)}


def earlier_configuration(checkout: Path, overrides: list[str], total_steps: int) -> dict[str, Any]:
    """`configuration` as an earlier version composes it, whose keys may differ."""
    program = (
        "import json, sys; sys.path.insert(0, 'benchmarks'); from speed import configuration; "
        "print(json.dumps(configuration(*json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", program, json.dumps([overrides, total_steps])]
    options: dict[str, Any] = {"cwd": checkout, "env": _environment(checkout), "text": True}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, **options)
    return json.loads(done.stdout.splitlines()[-1])


def compare(contestants: dict[str, tuple], repetitions: int) -> dict[str, list[dict[str, Any]]]:
    """Runs all in turn, several times."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for repetition in range(repetitions):
        for name, (python, driver, request, *checkout) in contestants.items():
            run = drive(python, driver, request, repetition, None, *checkout)
            run["steps_per_second"] = run["env_steps"] / run["seconds"]
            runs[name].append(run)
            costs = f"{run['compile_seconds']:6.1f} s compiling {run['peak_memory_mb']:6.0f} MB"
            speed = f"{run['steps_per_second']:10,.0f} steps/s"
            print(f"{repetition + 1}/{repetitions} {name:<20} {speed} {costs}", flush=True)
    return runs


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repetitions, and the speed of each."""
    medians = {
        name: statistics.median(run[name] for run in runs)
        for name, value in runs[0].items()
        if isinstance(value, int | float)
    }
    each = [round(run["steps_per_second"]) for run in runs]
    kept = {name: runs[0][name] for name in ("device", "versions", "config") if name in runs[0]}
    return {**medians, "steps_per_second_each": each, **kept}


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Our speed over theirs, pair by pair."""
    pairs = [
        a["steps_per_second"] / b["steps_per_second"] for a, b in zip(ours, theirs, strict=True)
    ]
    return {"median": statistics.median(pairs), "pairs": pairs}


def split(measured: dict[str, float], steps_per_second: float) -> dict[str, float]:
    """Fractions of the time of a whole update, and of the matmul ceiling."""
    whole = measured["env_steps_per_update"] / steps_per_second
    environment = measured["environment_seconds"] / whole
    acting = measured["environment_and_acting_seconds"] / whole - environment
    return {
        "update_seconds": whole,
        "matmul_ceiling_fraction": measured["matmul_seconds"] / whole,
        "matmul_gflops_alone": measured["matmul_flops"] / measured["matmul_seconds"] / 1e9,
        "environment_fraction": environment,
        "acting_fraction": acting,
        "learning_fraction": 1 - environment - acting,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES, help="the comparison")
    parser.add_argument(
        "override", nargs="*", help="further overrides of scripts/train.py, for both"
    )
    parser.add_argument(
        "--peer", metavar="NAME=PATH", help="purejaxql or cleanrl, and its checkout"
    )
    parser.add_argument(
        "--peer-python", default=sys.executable, help="the Python that runs the peer"
    )
    parser.add_argument("--earlier", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--repetitions", type=int, default=5, help="pairs of runs (default: 5)")
    parser.add_argument("--total-steps", type=int, help="steps of each run (default: by case)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/speed_CASE.json")
    args = parser.parse_intermixed_args()
    case = CASES[args.case]
    total_steps = args.total_steps or case.total_steps
    config = configuration(case.overrides + args.override, total_steps)

    if LOAD > 0.5:
        print(f"warning: the machine is busy (load {LOAD:.1f}): these figures will be unreliable")
    contestants: dict[str, tuple] = {"eqx_q": (sys.executable, "run_library", {"config": config})}
    result: dict[str, Any] = {"case": args.case, "peer": None}
    if args.peer:
        name, _, path = args.peer.partition("=")
        if name != case.peer or not Path(path).is_dir():
            parser.error(f"{args.case} is compared with {case.peer}: give --peer {case.peer}=PATH")
        unknown = {o.split("=")[0] for o in args.override} - set(_PEERS[name][1].values())
        if unknown:
            parser.error(f"{name} is not given {', '.join(unknown)}: leave it out, or --peer")
        contestants[name] = (args.peer_python, f"run_{name}", peer_request(case, config, path))
        result |= {"peer": name, "peer_commit": commit(Path(path))}
    if args.earlier:
        checkout = args.earlier.resolve()
        overrides = case.overrides + args.override
        request = {"config": earlier_configuration(checkout, overrides, total_steps)}
        contestants["earlier"] = (sys.executable, "run_library", request, checkout)
        result["earlier_commit"] = commit(checkout)
    for name, overrides in case.beside.items():
        beside = configuration(overrides + args.override, total_steps)
        contestants[name] = (sys.executable, "run_library", {"config": beside})

    runs = compare(contestants, args.repetitions)
    result["contestants"] = {name: summarise(each) for name, each in runs.items()}
    result["ratio"] = ratios(runs["eqx_q"], runs[case.peer]) if args.peer else None
    if args.earlier:
        result["ratio_to_earlier"] = ratios(runs["eqx_q"], runs["earlier"])
    if config["num_seeds"] == 1:
        print("where the time goes ...", flush=True)
        measured = drive(sys.executable, "measure_split", {"config": config}, seed=0)
        result["split"] = split(measured, result["contestants"]["eqx_q"]["steps_per_second"])
    for name in ("ratio", "ratio_to_earlier", "split"):
        print(f"{name}: {json.dumps(result.get(name), indent=1)}")
    write(args.out or RESULTS / f"speed_{args.case}.json", result)


if __name__ == "__main__":
    main()
