"""Hiding a part of what is observed, of any environment."""

import operator
from typing import Any

import equinox as eqx
import gymnasium
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, UInt8

from ..errors import UsageError
from ..spaces import Box, of_observations
from ..types import TimeStep
from .env import Env, Recording


class Observe(Env):
    """An environment of which only some entries of the observation's last axis are seen.

    `Observe(cartpole, [0, 2])` hides the velocities; of images it keeps channels.

    **Raises:** `UsageError` where `entries` is no list of whole numbers, or there is no such entry.
    """

    env: Env
    entries: tuple[int, ...] = eqx.field(static=True)
    observation_space: Box = eqx.field(static=True)
    action_space: gymnasium.spaces.Discrete = eqx.field(static=True)
    num_envs: int = eqx.field(static=True)
    num_agents: int | None = eqx.field(static=True)
    on_host: bool = eqx.field(static=True)
    max_episode_steps: int | None = eqx.field(static=True)

    def __init__(self, env: Env, entries: Any):
        self.env = env
        space = of_observations(env.observation_space)
        self.entries = _checked(entries, space.shape)
        part = np.s_[..., list(self.entries)]
        box = gymnasium.spaces.Box(space.low[part], space.high[part], dtype=space.dtype.type)
        self.observation_space = Box(box)
        self.action_space = env.action_space
        self.num_envs = env.num_envs
        self.num_agents = env.num_agents
        self.on_host = env.on_host
        self.max_episode_steps = env.max_episode_steps

    @property
    def state_size(self) -> int | None:
        """That of the environment, of which nothing is hidden."""
        return self.env.state_size

    @property
    def recording(self) -> Recording:
        """That of the environment; it hides nothing of the axis along which frames are stacked."""
        inner = self.env.recording
        return inner._replace(preprocessing={**inner.preprocessing, "observe": list(self.entries)})

    def reset(self, key: PRNGKeyArray) -> tuple[PyTree, TimeStep]:
        return self._see(*self.env.reset(key))

    def step(
        self, state: PyTree, action: Int[Array, "N *M"], key: PRNGKeyArray
    ) -> tuple[PyTree, TimeStep]:
        return self._see(*self.env.step(state, action, key))

    def replicate(
        self,
        num_envs: int,
        *,
        seed: int = 0,
        observe: Any = None,
        **options: Any,
    ) -> "Observe":
        env = self.env.replicate(num_envs, seed=seed, **options)
        return Observe(env, self.entries if observe is None else observe)

    def render(self, state: PyTree, lane: int = 0) -> UInt8[np.ndarray, "height width 3"] | None:
        return self.env.render(state, lane)

    def close(self) -> None:
        self.env.close()

    def _see(self, state: PyTree, timestep: TimeStep) -> tuple[PyTree, TimeStep]:
        seen = jnp.asarray(timestep.obs)[..., jnp.array(self.entries)]
        return state, eqx.tree_at(lambda t: t.obs, timestep, seen)


def _checked(observe: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    size = shape[-1] if shape else 0
    try:
        entries = tuple(operator.index(entry) for entry in observe)
    except TypeError:
        entries = ()
    if not entries or not all(0 <= entry < size for entry in entries):
        raise UsageError(
            f"observe is {observe!r}: the observation has shape {shape}, so give a list of "
            f"whole numbers from 0 to {size - 1}"
        )
    return entries
