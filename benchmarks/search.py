"""Measures the results and duration of searches, compared with the shipped tuned values.

`search` runs scripts/tune.py, times the same trials one after another (each a process of
scripts/train.py, including start-up and compilation), and trains with the found and the shipped
values on seeds that the search has not seen. `pbt` trains one population twice from the same start,
with population-based training and without, which is random search at equal steps. Finished parts
are not repeated, interrupted ones continue.

  python benchmarks/search.py search env=cartpole
  python benchmarks/search.py search env=minatar total_steps=1_000_000 --sequential 8
  python benchmarks/search.py pbt env=minatar total_steps=2_000_000
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, ROOT, compose, write

_UNSEEN = 1000  # first seed of the comparison
_ROUNDS = 20  # of population-based training
_NEVER = 1_000_000_000
_OF_SEARCH = ("search", "metric", "direction", "sampler", "halving")  # keys of scripts/tune.py


def run(name: str, directory: Path, *arguments: str) -> tuple[float, dict[str, Any]]:
    """Runs a script in a directory unless that is done; continues after an interruption.

    **Returns:** the total seconds, and its summary. If it was killed, a few seconds may be missing.
    """
    note = directory.with_suffix(".json")
    told = json.loads(note.read_text()) if note.exists() else {}
    begun = (directory / "study.journal", *directory.glob("checkpoints/*.ckpt"))
    goes_on = any(path.exists() for path in begun) or _is_done(directory)
    if told.get("arguments") != list(arguments) or not goes_on:
        shutil.rmtree(directory, ignore_errors=True)
        told = {"arguments": arguments, "seconds": 0.0}
    if not _is_done(directory):
        fresh = [*arguments, f"hydra.run.dir={directory}"]
        words = [f"resume={directory}"] if directory.exists() else fresh
        told["seconds"] += _timed([f"scripts/{name}.py", *words, "tracker=jsonl"], note, told)
        note.write_text(json.dumps(told))
    if not _is_done(directory):
        sys.exit("stopped: run the same command to continue")
    return told["seconds"], json.loads((directory / "summary.json").read_text())


def _is_done(directory: Path) -> bool:
    path = directory / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "done"


def _timed(words: list[str], note: Path, told: dict[str, Any]) -> float:
    """The seconds that a script takes, saved repeatedly, since this or the script may be killed."""
    print("+", *words, flush=True)
    note.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *words], cwd=ROOT) as process:
        while process.poll() is None:
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                seconds = told["seconds"] + time.perf_counter() - started
                note.write_text(json.dumps({**told, "seconds": seconds}))
    if process.returncode:
        sys.exit(f"error: {words[0]} failed with the message above")
    return time.perf_counter() - started


def train(directory: Path, *arguments: str) -> tuple[float, dict[str, Any]]:
    """Runs a training with an evaluation only at its end. Returns its seconds and summary."""
    return run("train", directory, *arguments, f"eval.every={_NEVER}", "video.every=0")


def alone(directory: Path, *arguments: str) -> float:
    """The seconds that a training takes; starts over after an interruption."""
    if not _is_done(directory):
        shutil.rmtree(directory, ignore_errors=True)
    return train(directory, *arguments, f"checkpoint.every={_NEVER}")[0]


def trials(directory: Path) -> list[dict[str, str]]:
    """The lines of a search's table."""
    with open(directory / "trials.csv") as file:
        return list(csv.DictReader(file))


def overrides_of(trial: dict[str, str]) -> list[str]:
    """The overrides of a trial's parameters."""
    return [f"{k}={v}" for k, v in trial.items() if k == "num_envs" or "." in k]


def of_training(overrides: list[str]) -> list[str]:
    """The overrides without those of the search itself."""
    return [word for word in overrides if re.split(r"[.=]", word.lstrip("+~"))[0] not in _OF_SEARCH]


def search(args: argparse.Namespace, runs: Path) -> dict[str, Any]:
    """Searches, times trials alone, and compares the found with the shipped values."""
    sizes = [f"trials={args.trials}", f"population={args.population}"]
    seconds, summary = run("tune", runs / "search", *args.override, *sizes)
    task, table = of_training(args.override), trials(runs / "search")
    measured = table[: args.sequential or len(table)]
    each = [
        alone(runs / f"alone_{trial['trial']}", *task, *overrides_of(trial)) for trial in measured
    ]
    sequential = sum(each) * len(table) / len(measured)
    best = next(trial for trial in table if int(trial["trial"]) == summary["best"]["trial"])
    unseen = [f"seed={_UNSEEN}", f"num_seeds={args.seeds}"]
    found = train(runs / "found", *task, *unseen, *overrides_of(best))[1]
    shipped = train(runs / "shipped", *task, *unseen)[1]
    return {
        "trials": len(table),
        "population": args.population,
        "search_seconds": seconds,
        "sequential_seconds": sequential,
        "sequential_trials_measured": len(measured),
        "speedup": sequential / seconds,
        "best": summary["best"],
        "unseen_seeds": args.seeds,
        "greedy_return_found": found["eval_return_per_seed"],
        "greedy_return_shipped": shipped["eval_return_per_seed"],
    }


def pbt(args: argparse.Namespace, runs: Path) -> dict[str, Any]:
    """Trains a population twice, with and without population-based training."""
    config = compose(args.override)
    steps_per_update = config["num_envs"] * config["agent"]["rollout_length"]
    per_round = max(1, int(config["total_steps"]) // steps_per_update // _ROUNDS)
    every = per_round * steps_per_update
    names = ",".join(args.hyperparameters)
    common = [*args.override, f"num_seeds={args.population}", f"log_every={per_round}"]
    common += [f"pbt.hyperparameters=[{names}]", f"pbt.spread={args.spread}"]
    result: dict[str, Any] = {"population": args.population, "spread": args.spread}
    result |= {"hyperparameters": args.hyperparameters, "steps_between_rounds": every}
    for name, period in (("pbt", every), ("random", _NEVER)):
        seconds, summary = train(runs / name, *common, f"pbt.every={period}")
        result[name] = {
            "seconds": seconds,
            "env_steps": summary["env_steps"],
            "greedy_return_per_member": summary["eval_return_per_seed"],
            **curves(runs / name / "metrics.jsonl"),
        }
    return result


def curves(path: Path) -> dict[str, list]:
    """Training returns of the best and the median member, by steps."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    returns = np.array([row["episode_return"] for row in rows], float)
    ended = ~np.isnan(returns).all(1)
    return {
        "steps": np.array([row["env_steps"] for row in rows])[ended].tolist(),
        "best": np.nanmax(returns[ended], axis=1).tolist(),
        "median": np.nanmedian(returns[ended], axis=1).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("search", "pbt"))
    parser.add_argument("override", nargs="*", help="overrides of the scripts")
    parser.add_argument("--trials", type=int, default=64, help="default: 64")
    parser.add_argument("--population", type=int, default=16, help="default: 16")
    parser.add_argument("--seeds", type=int, default=5, help="seeds to compare (default: 5)")
    parser.add_argument("--sequential", type=int, help="trials to time alone (default: all)")
    parser.add_argument("--hyperparameters", nargs="+", default=["learning_rate", "lambda_"])
    parser.add_argument("--spread", type=float, default=3.0, help="as pbt.spread (default: 3)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "search", help="directory")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/WHAT_ENV.json")
    args = parser.parse_intermixed_args()
    config = compose(of_training(args.override))
    name = re.sub(r"\W+", "_", f"{args.what}_{config['env']['name'].lower()}")
    result = {"search": search, "pbt": pbt}[args.what](args, args.runs.resolve() / name)
    result = {"env": config["env"]["name"], "total_steps": config["total_steps"], **result}
    write(args.out or RESULTS / f"{name}.json", {"overrides": args.override, **result})


if __name__ == "__main__":
    main()
