"""The closed loop: trains a teacher, records its play, and trains offline agents on the data.

For each game PQN is trained once, and plays twice: `narrow` data are from the agent at the end,
`mixed` data from all its checkpoints (in Pong: from the agent at the end, with different ε).
Behaviour cloning, DQN and CQL learn from each, with all seeds as one program. Finished parts are
not repeated, interrupted ones continue.

  python benchmarks/offline.py minatar
  python benchmarks/offline.py minatar --only Breakout num_updates=5000
  python benchmarks/offline.py pong --teacher runs/pong
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from learning import run, script
from record import RESULTS, ROOT, write

from eqx_q.data import Dataset


class Suite(NamedTuple):
    """Games, with the numbers of recorded transitions and updates."""

    games: dict[str, list[str]]
    teacher_steps: int
    transitions: int
    mixed: list[str]
    learners: list[str]


SUITES = {
    "minatar": Suite(
        {
            name: ["env=minatar", f"env.name={name}-MinAtar"]
            for name in ("Breakout", "Asterix", "SpaceInvaders")
        },
        teacher_steps=2_000_000,
        transitions=50_000,
        mixed=["epsilon=0.1", "checkpoints=all"],
        learners=["num_updates=20_000"],
    ),
    # Short enough for two CPU cores: slimCQL's runs have 3,125,000 updates
    "pong": Suite(
        {"Pong": ["env=atari", "env.name=Pong-v5"]},
        teacher_steps=10_000_000,
        transitions=50_000,
        mixed=["epsilon=[0.1,0.5,1.0]"],
        learners=[
            "num_updates=8_000",
            "agent.learning_rate=5e-4",
            "agent.optimizer.eps=1e-6",
            "agent.target_update_period=500",
            "eval.every=4_000",
            "eval.min_steps=null",
            "checkpoint.every=2_000",
        ],
    ),
}
LEARNERS = ("bc", "dqn", "cql")


def record(out: Path, options: list[str]) -> dict[str, Any]:
    """Records a data set unless that is done; returns its description."""
    if not out.exists():
        script("collect", *options, f"out={out}")
    dataset = Dataset(out)
    asked = dict(option.split("=") for option in options)
    there = dataset.description.source
    there = {
        "run": there.get("runs"),
        "steps": there.get("steps"),
        "epsilon": there.get("epsilons"),
    }
    for name, value in there.items():
        if name in asked and _plain(value) != _plain(asked[name]):
            sys.exit(f"error: {out} has {name}={value}, not {asked[name]}: move it away")
    whole = [shard.source for shard in dataset.shards if shard.source["episodes"]]
    returns = [source["return_mean"] for source in whole]
    return {
        "transitions": dataset.num_transitions,
        "episodes": dataset.num_episodes,
        "return_mean": float(np.average(returns, weights=[x["episodes"] for x in whole])),
    }


def _plain(value: Any) -> str:
    return str(value).strip("[]").replace(" ", "").replace("'", "")


def results_of(directory: Path) -> dict[str, Any]:
    """The results of an offline run per seed: final and best return, and the curve."""
    summary = json.loads((directory / "summary.json").read_text())
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    curve = [
        [line["num_updates"], *np.round(np.atleast_1d(line["eval/return"]), 3).tolist()]
        for line in lines
        if "eval/return" in line
    ]
    return {
        "num_updates": summary["num_updates"],
        "updates_per_second": summary["updates_per_second"],
        "final": summary["eval_return_per_seed"],
        "best": summary["best_eval_return_per_seed"],
        "curve": curve,
        "commit": summary["commit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES, help="which games")
    parser.add_argument("override", nargs="*", help="overrides of scripts/train.py for learners")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each learner (default: 3)")
    parser.add_argument("--only", help="only games whose name contains this")
    parser.add_argument("--teacher-steps", type=int, help="default: by suite")
    parser.add_argument("--transitions", type=int, help="of data (default: by suite)")
    parser.add_argument("--teacher", type=Path, help="the run of a trained teacher (with --only)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "offline", help="directory")
    parser.add_argument("--out", type=Path, help="default: by suite, in benchmarks/results")
    args = parser.parse_intermixed_args()
    suite = SUITES[args.suite]
    teacher_steps = args.teacher_steps or suite.teacher_steps
    transitions = args.transitions or suite.transitions
    out = args.out or RESULTS / f"offline_{args.suite}.json"
    games: dict[str, Any] = json.loads(out.read_text())["games"] if out.exists() else {}
    chosen = {name: env for name, env in suite.games.items() if (args.only or "") in name}
    if args.teacher and len(chosen) != 1:
        parser.error("a --teacher is of one game: choose that with --only")
    for name, env in chosen.items():
        home = args.runs.resolve() / name
        teacher = (args.teacher or home / "teacher").resolve()
        if args.teacher is None:
            run(teacher, [*env, f"total_steps={teacher_steps}", "checkpoint.keep=null"])
        summary = json.loads((teacher / "summary.json").read_text())
        of_teacher = {"teacher": summary["eval_return_mean"], "teacher_steps": summary["env_steps"]}
        games[name] = {**of_teacher, "data": {}}
        for kind, options in {"narrow": ["epsilon=0.1"], "mixed": suite.mixed}.items():
            options = [f"run={teacher}", *options, f"steps={transitions}"]
            results = games[name]["data"][kind] = {
                "data": record(home / f"{kind}_data", options),
                "learners": {},
            }
            for agent in LEARNERS:
                directory = home / f"{kind}_{agent}"
                learning = [f"agent={agent}", f"data={home / f'{kind}_data'}"]
                learning += [*env, f"num_seeds={args.seeds}", "eval.time_fraction=null"]
                run(directory, [*learning, *suite.learners, *args.override])
                results["learners"][agent] = results_of(directory)
                write(out, {"suite": args.suite, "games": games})


if __name__ == "__main__":
    main()
