"""Random Atari games, for benchmarks that need data."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp

import eqx_q
from eqx_q.data import Dataset, Writer
from eqx_q.loops.recording import describe, record


def play(game: str, path: Path, num_steps: int) -> Dataset:
    """Records a data set of whole games with unclipped rewards; the last game is cut."""
    env = eqx_q.make(f"envpool/{game}-v5", 1, episodic_life=False, reward_clip=False)
    num_actions = env.action_space.n  # pyright: ignore[reportAttributeAccessIssue]
    anyone = eqx_q.PQN.create(
        env.observation_space,
        env.action_space,
        key=jax.random.key(0),
        network=eqx.nn.Lambda(lambda obs: jnp.zeros(num_actions)),
    )
    with Writer(path, describe(env, f"envpool/{game}-v5")) as writer:
        key = jax.random.key(1)
        record(anyone, env, writer, num_steps=num_steps, key=key, shard="random", epsilon=1.0)
        env.close()
        return writer.finish()
