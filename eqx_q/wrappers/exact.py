"""Environments outside JAX that can be resumed, bit for bit.

An emulator's state cannot be saved, and most emulators cannot be reseeded in the middle of a run:
their noise, and in some games their memory, survive resets. But a new emulator with the same seed
and the same actions behaves the same. So all actions are kept, and replayed on resume.
"""

import logging
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Shaped, UInt8, UInt32

from ..errors import UsageError
from ..spaces import Box, Discrete, Leaf, MultiDiscrete, Space
from ..types import TimeStep
from .env import Env, Recording

_CHUNK = 512  # steps to replay at once; Ctrl-C is noticed between chunks
_SECONDS = 30.0  # between lines of the log

_MEND = "resume with exact_resume=false, which starts new episodes"

logger = logging.getLogger(__name__)


class Past(eqx.Module):
    """The environment's own state, and all actions taken in it. A checkpoint contains all of it.

    **Fields:** `actions`, with room for future ones; the number of `steps` made (the same in every
    lane); a `digest` of all resulting observations, rewards and episode ends.
    """

    inner: PyTree
    actions: Shaped[Array, "N T *M_and_action"]
    steps: Int[Array, " N"]
    digest: UInt32[Array, " N"]


class Exact(Env):
    """An environment outside JAX that keeps its actions, so that `resume` can restore it.

    It must be deterministic, given seed and actions. Call `reset` once, while it is new.

    **Arguments:** `env`: a new environment. `steps`: the maximum number of steps per lane; each
    takes the memory of one action, usually a byte for a `Discrete` space.

    **Raises:** `UsageError` if `env` is in JAX: its state is part of the run state.
    """

    env: Env
    capacity: int = eqx.field(static=True)
    observation_space: Space = eqx.field(static=True)
    action_space: Leaf = eqx.field(static=True)
    num_envs: int = eqx.field(static=True)
    num_agents: int | None = eqx.field(static=True)
    on_host: bool = eqx.field(static=True)
    max_episode_steps: int | None = eqx.field(static=True)

    def __init__(self, env: Env, steps: int):
        if not env.on_host:
            raise UsageError("an environment in JAX resumes exactly by itself: do not wrap it")
        self.env = env
        self.capacity = steps
        self.observation_space = env.observation_space
        self.action_space = env.action_space
        self.num_envs = env.num_envs
        self.num_agents = env.num_agents
        self.on_host = True
        self.max_episode_steps = env.max_episode_steps

    @property
    def recording(self) -> Recording:
        """See `Env`: that of the wrapped environment."""
        return self.env.recording

    @property
    def num_devices(self) -> int:
        return self.env.num_devices

    @property
    def agent_kinds(self) -> tuple[int, ...] | None:
        return self.env.agent_kinds

    @property
    def state_size(self) -> int | None:
        return self.env.state_size

    def reset(self, key: PRNGKeyArray) -> tuple[Past, TimeStep]:
        inner, timestep = self.env.reset(key)
        team = () if self.num_agents is None else (self.num_agents,)
        shape = (self.num_envs, self.capacity, *team, *(self.action_space.shape or ()))
        zero = jnp.zeros(self.num_envs, jnp.uint32)
        actions = jnp.zeros(shape, _narrowest(self.action_space))
        past = Past(inner, actions, jnp.zeros(self.num_envs, jnp.int32), _digest(zero, timestep))
        return past, timestep

    def step(
        self, state: Past, action: Shaped[Array, "N *M_and_action"], key: PRNGKeyArray
    ) -> tuple[Past, TimeStep]:
        inner, timestep = self.env.step(state.inner, action, key)
        kept = action.astype(state.actions.dtype)
        actions = state.actions.at[:, state.steps[0]].set(kept, mode="drop")
        return Past(inner, actions, state.steps + 1, _digest(state.digest, timestep)), timestep

    def resume(self, past: Past) -> Past:
        """Replays `past` in this environment, which must be new and made in the same way.

        **Raises:** `UsageError` if it does not behave the same.
        """
        steps = int(past.steps[0])
        lanes, kept, *_ = past.actions.shape
        if lanes != self.num_envs or steps > min(kept, self.capacity):
            raise UsageError(
                f"{steps:,} steps of {lanes} lanes cannot be replayed in {self.num_envs} lanes "
                f"with room for {min(kept, self.capacity):,} steps: {_MEND}"
            )
        logger.info("replaying %s steps of %s lanes", f"{steps:,}", lanes)
        started = told = time.perf_counter()
        state, _ = self.reset(jax.random.key(0))
        for begin in range(0, steps, _CHUNK):
            state = _replay(self, past.actions, state, jnp.asarray(min(begin + _CHUNK, steps)))
            jax.block_until_ready(state)
            if time.perf_counter() - told > _SECONDS:
                told = time.perf_counter()
                logger.info("replayed %.0f %%", 100 * begin / steps)
        wrong = np.flatnonzero(np.asarray(state.digest) != np.asarray(past.digest))
        if wrong.size:
            raise UsageError(
                f"{wrong.size} of {lanes} lanes (the first is {wrong[0]}) behaved differently when "
                "replayed, so this environment depends on more than its seed and actions, or "
                f"another version of it is installed: {_MEND}"
            )
        logger.info("replayed in %.1f s", time.perf_counter() - started)
        return state

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any) -> Env:
        """See `Env`; the new environment does not keep its actions."""
        return self.env.replicate(num_envs, seed=seed, **options)

    def render(self, state: Past, lane: int = 0) -> UInt8[np.ndarray, "height width 3"] | None:
        return self.env.render(state.inner, lane)

    def close(self) -> None:
        self.env.close()


@eqx.filter_jit
def _replay(env: Exact, actions: Array, state: Past, end: Int[Array, ""]) -> Past:
    """Replays `actions` from `state` up to step `end`."""

    def step(state: Past) -> Past:
        action = jax.lax.dynamic_index_in_dim(actions, state.steps[0], 1, keepdims=False)
        return env.step(state, action, jax.random.key(0))[0]  # emulators ignore their key

    return jax.lax.while_loop(lambda state: state.steps[0] < end, step, state)


def _digest(digest: UInt32[Array, " N"], timestep: TimeStep) -> UInt32[Array, " N"]:
    """Updates the checksum of each lane with the suite's part of a timestep."""
    said = (timestep.obs, timestep.reward, timestep.terminated, timestep.truncated)
    for x in jax.tree.leaves(said):
        x = jnp.asarray(x).reshape(len(digest), -1)
        if x.dtype == jnp.uint8 and x.shape[1] % 4 == 0:  # images: four bytes at a time
            x = x.reshape(len(digest), -1, 4)
        if x.dtype == jnp.float32 or x.ndim == 3:
            x = jax.lax.bitcast_convert_type(x, jnp.uint32)
        weights = jnp.arange(x.shape[1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B1) | 1
        words = jnp.sum(x.astype(jnp.uint32) * weights, 1, dtype=jnp.uint32)
        digest = digest * jnp.uint32(0x01000193) + words
    return digest


def _narrowest(space: Leaf) -> Any:
    """The smallest dtype that can hold the actions."""
    if isinstance(space, Box):
        return jax.dtypes.canonicalize_dtype(space.dtype)
    low, high = 0, 1
    if isinstance(space, Discrete):
        low, high = space.start, space.start + space.n - 1
    elif isinstance(space, MultiDiscrete):
        low, high = space.start.min(), (space.start + space.nvec).max() - 1
    kinds = (np.uint8, np.int8, np.uint16, np.int16, np.int32)
    return next(x for x in kinds if np.iinfo(x).min <= low and high <= np.iinfo(x).max)
