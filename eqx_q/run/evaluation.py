"""Evaluates the agent of a finished run."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..agents import Agent, Population
from ..errors import UsageError
from ..loops.evaluation import play_episodes
from ..loops.media import record_episode, write_gif
from ..saving.checkpoint import load, newest_checkpoint
from ..wrappers.host import closing
from .making import (
    LANES_IN_JAX,
    LANES_ON_HOST,
    emulator_seed as seed_of_emulators,
    episode_cap,
    learnt,
    make_env,
)
from .settings import Config, env_name, given
from .summary import episode_means, provenance

logger = logging.getLogger(__name__)


def evaluate_run(
    config: Config,
    directory: Path,
    *,
    episodes: int,
    num_envs: int | None = None,
    seed: int = 0,
    epsilon: float = 0.0,
    max_episode_steps: int | None = None,
    min_steps: int = 0,
    protocol: Mapping[str, Any] | None = None,
    video: Path | None = None,
) -> dict[str, Any]:
    """Evaluates the agent of a finished run in its training environment.

    **Arguments:** `episodes`, `num_envs`: per member. `min_steps`: repeat rounds of `episodes`
    until this many steps were played. `protocol`: environment options that differ from training;
    by default those of the run's own evaluations. `video`: a file for a GIF of a greedy episode of
    the best member.

    **Returns:** returns per member with their statistics, and how they were obtained.
    """
    agent = trained_agent(directory)
    members = agent.num_members or 1
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(closing(make_env(config, members)))
        lanes = num_envs or min(episodes, LANES_ON_HOST if one.on_host else LANES_IN_JAX)
        options = given(config["protocol"] if protocol is None else protocol)
        emulator_seed = seed_of_emulators(seed, "afterwards")
        env = stack.enter_context(
            closing(one.replicate(members * lanes, seed=emulator_seed, **options))
        )
        cap = max_episode_steps or episode_cap(env)
        key = jax.random.key(seed)
        played = play_episodes(
            agent,
            env,
            num_episodes=episodes,
            key=key,
            epsilon=epsilon,
            max_episode_steps=cap,
            min_steps=min_steps,
        )
        if video:
            scene = stack.enter_context(closing(one.replicate(1, seed=emulator_seed, **options)))
            best = int(np.atleast_2d(played.returns).mean(1).argmax())
            player = agent.member(best) if isinstance(agent, Population) else agent
            frames, _ = record_episode(player, scene, key=key)
            if frames:
                write_gif(video, frames)
                of_whom = f" (member {best})" if members > 1 else ""
                logger.info("wrote %s%s", video, of_whom)
            else:
                logger.warning("no video: %s cannot be rendered", env_name(config))
    returns = np.atleast_2d(played.returns)
    return {
        "env": env_name(config),
        "env_options": options,
        **learnt(agent),
        "episodes": returns.shape[1],
        "epsilon": epsilon,
        "seed": seed,
        "max_episode_steps": cap,
        "return_mean": float(returns.mean()),
        "return_per_seed": returns.mean(1).tolist(),
        "return_std_per_seed": returns.std(1).tolist(),
        "per_seed": episode_means(played),
        "returns": returns.tolist(),
        **provenance(),
    }


def trained_agent(directory: Path) -> Agent:
    """Loads the agent of a run. Raises `UsageError` if it is missing, or the run not finished."""
    path = directory / "agent.eqx"
    if not path.exists() and newest_checkpoint(directory / "checkpoints"):
        raise UsageError(
            f"the run in '{directory}' is not finished: finish it with "
            f"`python scripts/train.py resume={directory}`"
        )
    return load(path)
