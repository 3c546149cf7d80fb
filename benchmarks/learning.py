"""Trains in every environment of a suite with several seeds, and writes the results as JSON.

Each run is `python scripts/train.py` with the default configuration, in its own directory under
--runs: finished runs are skipped, interrupted ones continue. The result is rewritten after every
run, with final training and greedy returns per seed, their curves, and the return of random play;
what it holds of other environments stays.

  python benchmarks/learning.py classic --seeds 5
  python benchmarks/learning.py minatar --seeds 5 --only Breakout total_steps=1_000_000
  python benchmarks/learning.py atari-pong --collect     # writes existing results without training
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from omegaconf import OmegaConf
from record import RESULTS, ROOT, compose, write

import eqx_q
from eqx_q.run import make_agent, make_env, write_json

_MAX_POINTS = 100
_RANDOM_EPISODES = 64
_FINAL_FRACTION = 0.05  # last fraction of the run, whose episodes make the final training return


@dataclass(frozen=True)
class Suite:
    """Overrides of `scripts/train.py` per environment; protocols for evaluations afterwards.

    `score`: an episode metric to report beside the return. `also_at`: a number of steps at which
    peers publish their returns.
    """

    tasks: list[list[str]]
    protocols: tuple[str, ...] = ()
    score: str | None = None
    also_at: int | None = None


def _atari(*games: str) -> Suite:
    tasks = [["env=atari", f"env.name={game}-v5", "total_steps=10_000_000"] for game in games]
    return Suite(tasks, protocols=("life_loss", "sticky"))


_HL_GAUSS = [
    "agent.value=hl_gauss",
    "agent.value.v_min=-20",
    "agent.value.v_max=20",
    "agent.value.sigma=2",
    "agent.network_options.head=dueling",
]
_MULTI_SKIP = [
    "agent.network_options.torso=multi_skip",
    "agent.network_options.torso_options={size:128,num_blocks:3}",
]
_MINATAR = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
SUITES = {
    "classic": Suite([["env=cartpole"], ["env=acrobot"], ["env=mountain_car"]]),
    "minatar": Suite([["env=minatar", f"env.name={game}-MinAtar"] for game in _MINATAR]),
    "gymnasium": Suite([["env=gymnasium", "env.name=CartPole-v1"]]),
    "memory": Suite(
        [
            ["agent=pqn_rnn", "env=memory_chain", "total_steps=300_000"],
            [
                "agent=pqn_rnn",
                "env=memory_chain",
                "agent.network_options.memory=mingru",
                "total_steps=300_000",
            ],
            ["agent=pqn", "env=memory_chain", "tuned=pqn_cartpole", "total_steps=300_000"],
            ["agent=pqn_rnn", "env=cartpole"],
            ["agent=pqn_rnn", "env=cartpole", "+env.observe=[0,2]"],
            ["agent=pqn", "env=cartpole", "+env.observe=[0,2]"],
        ]
    ),
    "teams": Suite(
        [
            ["agent=pqn_vdn", f"env={env}", f"agent.mixer={mixer}"]
            for env in ("mpe", "overcooked", "pettingzoo")
            for mixer in ("vdn", "independent")
        ]
    ),
    "smax": Suite(
        [
            ["agent=pqn_vdn", "env=smax", "tuned=smax_small", f"agent.mixer={mixer}"]
            for mixer in ("vdn", "independent")
        ],
        score="won",
    ),
    "craftax": Suite(
        [[f"agent={agent}", "env=craftax_classic"] for agent in ("pqn", "pqn_rnn")],
        score="percent_of_maximum",
    ),
    "qmix": Suite(
        [
            ["agent=pqn_vdn", "env=smax", "tuned=smax_small", f"agent.mixer={mixer}"]
            for mixer in ("vdn", "qmix")
        ],
        score="won",
    ),
    "continuous": Suite(
        [[f"env={env}"] for env in ("pendulum", "half_cheetah", "hopper", "walker2d")],
        also_at=1_000_000,
    ),
    "minigrid": Suite(
        [
            *(
                ["env=minigrid", f"env.name=MiniGrid-{task}-v0"]
                for task in ("Empty-8x8", "DoorKey-5x5")
            ),
            *(
                [
                    f"agent={agent}",
                    "env=minigrid",
                    "env.name=MiniGrid-MemoryS7-v0",
                    "tuned=minigrid_memory",
                ]
                for agent in ("pqn", "pqn_rnn")
            ),
        ]
    ),
    "values": Suite(
        [
            ["env=minatar", f"env.name={game}-MinAtar", "total_steps=5_000_000", *options]
            for game in _MINATAR
            for options in ([], _HL_GAUSS, _MULTI_SKIP, [*_HL_GAUSS, *_MULTI_SKIP])
        ]
    ),
    "precision": Suite(
        [
            [*task, *options]
            for task in (
                ["env=cartpole"],
                ["env=minatar", "env.name=Breakout-MinAtar", "total_steps=5_000_000"],
                ["agent=pqn_vdn", "env=smax", "tuned=smax_small", "total_steps=1_000_000"],
                ["env=craftax_classic", "total_steps=1_000_000"],
            )
            for options in ([], ["agent.precision=bfloat16"])
        ]
    ),
    "transformer": Suite(
        [
            ["agent=pqn_rnn", *task, *memory]
            for task, context in (
                (["env=memory_chain", "total_steps=300_000"], 128),  # 100 steps are to be recalled
                (["env=minigrid", "env.name=MiniGrid-MemoryS7-v0", "tuned=minigrid_memory"], 64),
                (["env=craftax_classic", "total_steps=3_000_000"], 64),
            )
            for memory in (
                [],
                [
                    "agent.network_options.memory=gtrxl",
                    f"agent.network_options.memory_options={{context:{context}}}",
                ],
            )
        ]
    ),
    "exploration": Suite(
        [
            [*task, f"agent.exploration={name}"]
            for task in (
                ["env=acrobot"],
                ["env=mountain_car"],
                ["env=minatar", "env.name=Breakout-MinAtar", "total_steps=1_000_000"],
                ["env=minatar", "env.name=Asterix-MinAtar", "total_steps=1_000_000"],
            )
            for name in ("epsilon_greedy", "lane_epsilons", "ez_greedy")
        ]
    ),
    "atari-pong": _atari("Pong"),
    "atari-breakout": _atari("Breakout"),
    "atari-5": _atari("Pong", "Breakout", "SpaceInvaders", "BeamRider", "MsPacman"),
}


def task_name(suite: Suite, task: list[str], config: dict[str, Any]) -> str:
    """The environment's name, with further options if other tasks of the suite share it.

    These are all except `env=` and the length of the run.
    """
    name = f"{config['env']['suite']}/{config['env']['name']}"
    alike = [other for other in suite.tasks if _chosen(other) == _chosen(task)]
    more = [part for part in task if not part.startswith(("env=", "env.name=", "total_steps="))]
    return " ".join([name, *more]) if len(alike) > 1 else name


def _chosen(task: list[str]) -> list[str]:
    return [part for part in task if part.startswith(("env=", "env.name="))]


def run(directory: Path, overrides: list[str]) -> None:
    """Trains in `directory` unless that is done; continues after an interruption."""
    _check_same(directory, overrides)
    if _summary(directory).get("status") == "done":
        print(f"already done: {directory}", flush=True)
    elif any((directory / "checkpoints").glob("*")):
        script("train", f"resume={directory}")
    else:
        shutil.rmtree(directory, ignore_errors=True)  # interrupted before the first checkpoint
        script("train", *overrides, "tracker=jsonl", "video.every=0", f"hydra.run.dir={directory}")


def _check_same(directory: Path, overrides: list[str]) -> None:
    """Exits if the directory holds a run of another configuration."""
    if not (directory / "config.yaml").exists():
        return
    stored = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
    there, here = cast(dict[str, Any], stored), compose(overrides)
    names = ("total_steps", "num_envs", "seed", "num_seeds", "agent", "env")
    for name in (*names, "data", "num_updates", "sampling"):
        if name in there and _differ(there[name], here[name]):
            sys.exit(
                f"error: {directory} holds a run with {name} {there[name]}, not {here[name]}: "
                "move it away, or give another directory with --runs"
            )


def _differ(before: Any, now: Any) -> bool:
    """Whether two configurations differ, ignoring keys that only one has, which are newer."""
    if isinstance(before, dict) and isinstance(now, dict):
        return any(_differ(before[name], now[name]) for name in before.keys() & now.keys())
    return before != now


def evaluate(directory: Path, protocol: str, episodes: int) -> None:
    """Evaluates a finished run under a protocol unless that is done."""
    if not (directory / f"evaluation_{protocol}.json").exists():
        script("evaluate", f"run={directory}", f"protocol={protocol}", f"episodes={episodes}")


def random_return(config: dict[str, Any], path: Path) -> float:
    """The mean return of random legal actions in this environment; cached in a file."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("env") != config["env"]:
        env = make_env({**config, "num_seeds": 1}, _RANDOM_EPISODES)
        agent = make_agent({**config, "num_seeds": 1}, env)
        returns = eqx_q.evaluate(
            agent, env, num_episodes=_RANDOM_EPISODES, key=jax.random.key(0), epsilon=1.0
        )
        env.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"env": config["env"], "return": float(returns.mean())}
        write_json(path, kept)
    return kept["return"]


def script(name: str, *arguments: str) -> None:
    """Runs one of the scripts; exits if it fails."""
    print("+", f"scripts/{name}.py", *arguments, flush=True)
    command = [sys.executable, f"scripts/{name}.py", *arguments]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"error: scripts/{name}.py failed with the message above")


def collect(directory: Path, score: str | None = None) -> list[dict[str, Any]]:
    """The results of a run, finished or not, one per seed."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "episode_return" in row]
    summary = _summary(directory)
    members = len(np.atleast_1d(rows[-1]["episode_return"]))
    evaluations = {
        path.stem.removeprefix("evaluation_"): json.loads(path.read_text())["return_per_seed"]
        for path in sorted(directory.glob("evaluation_*.json"))
    }
    kept = ("status", "seed", "steps_per_second", "compile_seconds", "wall_seconds", "device")
    kept += ("commit",)
    return [
        {
            **{name: summary[name] for name in kept if name in summary},
            "env_steps": rows[-1]["env_steps"],
            "training_return": final_return(training(rows, member)),
            "greedy_return": (summary.get("eval_return_per_seed") or [None] * members)[member],
            "protocols": {name: returns[member] for name, returns in evaluations.items()},
            "training_curve": thin_out(training(rows, member)),
            "greedy_curve": thin_out(greedy(rows, member)),
        }
        | ({"seed": summary["seed"], "member": member} if "seed" in summary else {})
        | ({score: _scores(rows, score, member)} if score else {})
        for member in range(members)
    ]


def _scores(rows: list[dict[str, Any]], score: str, member: int) -> dict[str, Any]:
    in_training, greedily = training(rows, member, score), greedy(rows, member, score)
    return {
        "training": final_return(in_training),
        "greedy": float(greedily[-1, 1]) if len(greedily) else None,
        "training_curve": thin_out(in_training),
        "greedy_curve": thin_out(greedily),
    }


def training(rows: list[dict[str, Any]], member: int, name: str = "return") -> np.ndarray:
    """`[points, 3]`: steps, mean return of episodes since the previous point, their number."""
    points = [_point(row, f"episode_{name}", "episodes", member) for row in rows]
    return np.array([point for point in points if point[2] > 0]).reshape(-1, 3)


def greedy(rows: list[dict[str, Any]], member: int, name: str = "return") -> np.ndarray:
    """`[points, 3]`: steps, mean return of an evaluation, 1."""
    name = f"eval/{name}"
    points = [_point(row, name, None, member) for row in rows if name in row]
    return np.array(points).reshape(-1, 3)


def _point(row: dict[str, Any], name: str, weight: str | None, member: int) -> tuple:
    value = np.atleast_1d(row[name])[member]
    return row["env_steps"], value, np.atleast_1d(row[weight])[member] if weight else 1.0


def final_return(curve: np.ndarray) -> float | None:
    """Mean return over the episodes of the last part of the curve."""
    last = curve[curve[:, 0] > (1 - _FINAL_FRACTION) * curve[-1:, 0]]
    return float(np.average(last[:, 1], weights=last[:, 2])) if len(last) else None


def thin_out(curve: np.ndarray) -> list[list[float]]:
    """At most a hundred points `[steps, return]`: averages of neighbours by weight."""
    parts = np.array_split(curve, min(len(curve), _MAX_POINTS) or 1)
    return [
        [float(part[-1, 0]), round(float(np.average(part[:, 1], weights=part[:, 2])), 4)]
        for part in parts
        if len(part)
    ]


def _summary(directory: Path) -> dict[str, Any]:
    path = directory / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES, help="which environments")
    parser.add_argument("override", nargs="*", help="further overrides of scripts/train.py")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (default: 5)")
    parser.add_argument("--together", action="store_true", help="train all seeds as one population")
    parser.add_argument("--only", help="only environments whose name contains this")
    parser.add_argument("--episodes", type=int, default=16, help="per evaluation (default: 16)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning", help="directory")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/learning_SUITE.json")
    parser.add_argument("--collect", action="store_true", help="write results without training")
    args = parser.parse_intermixed_args()
    suite = SUITES[args.suite]
    out = args.out or RESULTS / f"learning_{args.suite}.json"
    environments = json.loads(out.read_text())["environments"] if out.exists() else {}
    configs = [(task, compose([*task, *args.override])) for task in suite.tasks]
    names = [task_name(suite, task, config) for task, config in configs]
    for name, (task, config) in zip(names, configs, strict=True):
        if args.only and args.only not in name:
            continue
        overrides = [*task, *args.override]
        runs = args.runs.resolve() / re.sub(r"[^\w/.-]+", "_", name)
        if args.collect and not any(runs.glob("seed*/metrics.jsonl")):
            continue
        results = environments[name] = {
            "overrides": overrides,
            "total_steps": config["total_steps"],
            "score": suite.score,
            "also_at": suite.also_at,
            "random_return": random_return(config, runs / "random.json"),
            "seeds": [],
        }
        if args.collect:  # regardless of how they were trained
            directories = {path.name: [] for path in sorted(runs.glob("seed*"))}
        elif args.together:
            directories = {f"seeds_{args.seeds}": ["seed=0", f"num_seeds={args.seeds}"]}
        else:
            directories = {f"seed_{i}": [f"seed={i}", "num_seeds=1"] for i in range(args.seeds)}
        for kind, of_seed in directories.items():
            directory = runs / kind
            if not args.collect:
                run(directory, [*overrides, *of_seed])
                for protocol in suite.protocols:
                    evaluate(directory, protocol, args.episodes)
            if (directory / "metrics.jsonl").exists():
                results["seeds"] += collect(directory, suite.score)
            kept = {name: environments[name] for name in names if name in environments}
            write(out, {"suite": args.suite, "environments": kept})


if __name__ == "__main__":
    main()
