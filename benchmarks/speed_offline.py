"""Compares offline training with slimCQL: same data, network and hyperparameters, in turn.

Both learn from the same frames of Pong, played at random. What is timed: gradient steps with all
that belongs to them, and drawing batches alone; reading the data and compiling are told apart.

  python benchmarks/speed_offline.py cql --peer slimcql=DIR --peer-python DIR/.venv/bin/python
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
from record import LOAD, RESULTS, commit, compose, write
from speed import drive

import eqx_q
from eqx_q.data import Description, Rows, Writer

_FIGURES = ("updates_per_second", "batches_per_second")


def play(num_rows: int) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Discrete, list[Rows]]:
    """Whole games of Pong, played at random, as rows of frames."""
    env = eqx_q.make("envpool/Pong-v5", num_envs=1, episodic_life=False, reward_clip=False)
    state, timestep = env.reset(jax.random.key(0))
    step = jax.jit(env.step)
    rng = np.random.default_rng(0)
    games, frames, actions, rewards = [], [], [], []
    while sum(len(rows.action) for rows in games) < num_rows:
        frames.append(np.asarray(timestep.obs)[0, -1])
        actions.append(rng.integers(env.action_space.n))
        state, timestep = step(state, np.array(actions[-1:]), jax.random.key(0))
        rewards.append(float(timestep.reward[0]))
        if timestep.ended[0]:
            frames.append(np.asarray(timestep.obs)[0, -1])
            terminated = bool(timestep.terminated[0])
            game = (np.stack(frames), np.array(actions), np.array(rewards))
            games.append(Rows.of_episode(*game, terminated=terminated))
            state, timestep = step(state, np.zeros(1, int), jax.random.key(0))  # resets
            frames, actions, rewards = [], [], []
    env.close()
    return env.observation_space, env.action_space, games  # pyright: ignore[reportReturnType]


def write_both(directory: Path, num_rows: int) -> int:
    """The same transitions for both; returns the number of actions."""
    observation_space, action_space, games = play(num_rows)
    description = Description("envpool/Pong-v5", observation_space, action_space, stack=4)
    with Writer(directory / "data", description) as writer:
        for rows in games:
            writer.append(rows)
        writer.commit("random")
        writer.finish()
    kept = [Rows(*(x[:-1] for x in rows)) for rows in games]  # the peer has no final observations
    arrays = Rows(*(np.concatenate(x) for x in zip(*kept, strict=True)))
    np.savez(
        directory / "arrays.npz",
        frames=arrays.obs,
        actions=arrays.action,
        rewards=arrays.reward,
        terminals=arrays.terminated,
        ends=arrays.terminated | arrays.truncated,
    )
    return int(action_space.n)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("algorithm", choices=("cql", "dqn"), help="what both learn with")
    parser.add_argument("--peer", metavar="slimcql=PATH", help="a checkout")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that runs it")
    parser.add_argument("--repetitions", type=int, default=3, help="pairs of runs (default: 3)")
    parser.add_argument("--rows", type=int, default=20_000, help="of the data (default: 20,000)")
    parser.add_argument("--num-updates", type=int, default=2_000, help="of ours (default: 2,000)")
    parser.add_argument("--peer-updates", type=int, default=200, help="default: 200")
    parser.add_argument("--out", type=Path, help="default: by algorithm, in benchmarks/results")
    args = parser.parse_args()
    if LOAD > 0.5:
        print(f"warning: the machine is busy (load {LOAD:.1f}): these figures will not hold")
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
