"""An environment driven step by step from Python."""

import warnings
from typing import Any

import gymnasium
import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray, UInt8

from ..errors import UnknownNameError
from ..types import AnyArray, TimeStep
from .env import Env


class Loop:
    """Keeps the state and the key of an environment, and compiles its functions once."""

    def __init__(self, env: Env, render_mode: str | None):
        if render_mode not in (None, "rgb_array"):
            raise UnknownNameError("render_mode", render_mode, ["rgb_array"])

        def reset(key: PRNGKeyArray) -> tuple[PRNGKeyArray, Any, TimeStep]:
            key, own = jax.random.split(key)
            return key, *env.reset(own)

        def step(key: PRNGKeyArray, state: Any, action: Array):
            key, own = jax.random.split(key)
            return key, *env.step(state, action, own)

        self.env = env
        self._kind = jax.dtypes.canonicalize_dtype(env.action_space.dtype)
        self._reset = reset if env.on_host else jax.jit(reset)  # emulators reset outside jit
        self._step = jax.jit(step)
        self._draws = render_mode is not None
        self._key: PRNGKeyArray | None = None
        self._state: Any = None

    def reset(self, seed: int | None) -> TimeStep:
        """Starts an episode in every lane. Without a seed, it continues with the current key."""
        if seed is not None and self.env.on_host:
            warnings.warn(
                "this environment was seeded when it was made: reset(seed=...) has no effect",
                stacklevel=3,
            )
        key = self._key
        if key is None or seed is not None:
            (entropy,) = np.random.SeedSequence().generate_state(1)
            key = jax.random.key(int(entropy) if seed is None else seed)
        self._key, self._state, timestep = self._reset(key)
        return _on_host(timestep)

    def step(self, action: AnyArray) -> TimeStep:
        """Acts in every lane."""
        if self._key is None:
            raise gymnasium.error.ResetNeeded("call reset before the first step")
        self._key, self._state, timestep = self._step(
            self._key, self._state, np.asarray(action, self._kind)
        )
        return _on_host(timestep)

    def render(self, lane: int) -> UInt8[np.ndarray, "height width 3"] | None:
        """A picture of a lane, if `render_mode` asks for one."""
        return self.env.render(self._state, lane) if self._draws else None


def _on_host(timestep: TimeStep) -> TimeStep:
    """Copies to NumPy arrays that the caller may write to."""
    return jax.tree.map(np.array, timestep)
