"""Measures search: what it finds, and how long it takes, against the shipped tuned values.

`search` runs scripts/tune.py, times the same trials one after another (each a process of
scripts/train.py, start-up and compilation counted), and trains what was found and what ships
with seeds that the search has not seen. `pbt` trains one population twice from the same start,
with population-based training and without, which is random search at equal steps.

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

import matplotlib.pyplot as plt
import numpy as np
from record import RESULTS, ROOT, compose, write

_UNSEEN = 1000  # the first of the seeds that compare
_ROUNDS = 20  # of population-based training


def script(name: str, directory: Path, *arguments: str) -> float:
    """Runs a script anew in a directory. Returns the seconds that it took."""
    shutil.rmtree(directory, ignore_errors=True)
    words = [f"scripts/{name}.py", *arguments, "tracker=jsonl", f"hydra.run.dir={directory}"]
    print("+", *words, flush=True)
    started = time.perf_counter()
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        sys.exit(f"error: scripts/{name}.py failed with the message above")
    return time.perf_counter() - started


def train(directory: Path, *arguments: str) -> tuple[float, dict[str, Any]]:
    """Runs a training that is evaluated at its end alone. Returns its seconds and summary."""
    alone = ["eval.every=1_000_000_000", "checkpoint.every=1_000_000_000", "video.every=0"]
    seconds = script("train", directory, *alone, *arguments)
    return seconds, json.loads((directory / "summary.json").read_text())


def trials(directory: Path) -> list[dict[str, str]]:
    """The lines of a search's table."""
    with open(directory / "trials.csv") as file:
        return list(csv.DictReader(file))


def overrides_of(trial: dict[str, str]) -> list[str]:
    """What a trial varied."""
    return [f"{k}={v}" for k, v in trial.items() if k == "num_envs" or "." in k]


def search(args: argparse.Namespace, runs: Path) -> dict[str, Any]:
    task = args.override
    population = f"population={args.population}"
    seconds = script("tune", runs / "search", *task, f"trials={args.trials}", population)
    summary = json.loads((runs / "search" / "summary.json").read_text())
    table = trials(runs / "search")
    measured = table[: args.sequential or len(table)]
    alone = [train(runs / "alone", *task, *overrides_of(trial)) for trial in measured]
    sequential = sum(taken for taken, _ in alone) * len(table) / len(measured)
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
        "values": [[int(t["trial"]), float(t["value"] or "nan"), t["state"]] for t in table],
        "unseen_seeds": args.seeds,
        "greedy_return_found": found["eval_return_per_seed"],
        "greedy_return_shipped": shipped["eval_return_per_seed"],
    }


def pbt(args: argparse.Namespace, runs: Path) -> dict[str, Any]:
    config = compose(args.override)
    updates = config["total_steps"] // (config["num_envs"] * config["agent"]["rollout_length"])
    per_round = max(1, updates // _ROUNDS)
    every = per_round * config["num_envs"] * config["agent"]["rollout_length"]
    names = ",".join(args.hyperparameters)
    common = [*args.override, f"num_seeds={args.population}", f"log_every={per_round}"]
    common += [f"pbt.hyperparameters=[{names}]", f"pbt.spread={args.spread}"]
    result: dict[str, Any] = {"population": args.population, "spread": args.spread}
    result |= {"hyperparameters": args.hyperparameters, "steps_between_rounds": every}
    for name, period in (("pbt", every), ("random", 1_000_000_000)):
        seconds, summary = train(runs / name, *common, f"pbt.every={period}")
        result[name] = {
            "seconds": seconds,
            "greedy_return_per_member": summary["eval_return_per_seed"],
            **curves(runs / name / "metrics.jsonl"),
        }
    return result


def curves(path: Path) -> dict[str, list]:
    """Training returns of the best and of the median member, by steps."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if "episode_return" in row]
    returns = np.array([row["episode_return"] for row in rows], float)
    return {
        "steps": [row["env_steps"] for row in rows],
        "best": np.nanmax(returns, axis=1).tolist(),
        "median": np.nanmedian(returns, axis=1).tolist(),
    }


def draw(path: Path, result: dict[str, Any]) -> None:
    """Curves of populations, or values of trials beside what ships."""
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    if "pbt" in result:
        for name, colour in (("pbt", "C0"), ("random", "C1")):
            for member, style in (("best", "-"), ("median", "--")):
                curve = result[name]
                axes.plot(curve["steps"], curve[member], colour + style, label=f"{name}, {member}")
        axes.set(xlabel="steps of each member", ylabel="training return")
    else:
        complete = [(n, value) for n, value, state in result["values"] if state == "complete"]
        axes.plot(*zip(*complete, strict=True), "C0.", label="trials")
        axes.axhline(np.mean(result["greedy_return_found"]), color="C0", label="best, unseen seeds")
        axes.axhline(np.mean(result["greedy_return_shipped"]), color="C1", label="as shipped")
        axes.set(xlabel="trial", ylabel="greedy return")
    axes.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("search", "pbt"))
    parser.add_argument("override", nargs="*", help="overrides of the scripts")
    parser.add_argument("--trials", type=int, default=64, help="default: 64")
    parser.add_argument("--population", type=int, default=16, help="default: 16")
    parser.add_argument("--seeds", type=int, default=5, help="that compare (default: 5)")
    parser.add_argument("--sequential", type=int, help="trials to time alone (default: all)")
    parser.add_argument("--hyperparameters", nargs="+", default=["learning_rate", "lambda_"])
    parser.add_argument("--spread", type=float, default=3.0, help="of a population (default: 3)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "search", help="directory")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/WHAT_ENV.json")
    args = parser.parse_intermixed_args()
    config = compose([word for word in args.override if not word.startswith("search")])
    name = re.sub(r"\W+", "_", f"{args.what}_{config['env']['name'].lower()}")
    result = {"search": search, "pbt": pbt}[args.what](args, args.runs.resolve() / name)
    out = args.out or RESULTS / f"{name}.json"
    result = {"env": config["env"]["name"], "total_steps": config["total_steps"], **result}
    write(out, {"overrides": args.override, **result})
    draw(out.with_suffix(".png"), result)


if __name__ == "__main__":
    main()
