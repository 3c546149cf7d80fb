"""Hides parts of the observations of any environment."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree, Shaped, UInt8

from .. import spaces
from ..errors import UnknownNameError, UsageError
from ..spaces import Box, Leaf, Space
from ..types import TimeStep
from .env import Env, Recording


class Observe(Env):
    """An environment that shows only parts of its observations.

    `Observe(cartpole, [0, 2])` hides the velocities; for images, such a list selects channels.

    **Arguments:**

    - `observe`: a list of entries of the last axis, or such lists by path of an array.
    - `leave_out`: paths of entries that are hidden entirely.

    **Raises:** `UsageError` if an entry does not exist, or a list is not of whole numbers.
    """

    env: Env
    observe: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    leave_out: tuple[str, ...] = eqx.field(static=True)
    whole_space: Space = eqx.field(static=True)
    observation_space: Space = eqx.field(static=True)
    action_space: Leaf = eqx.field(static=True)
    num_envs: int = eqx.field(static=True)
    num_agents: int | None = eqx.field(static=True)
    on_host: bool = eqx.field(static=True)
    max_episode_steps: int | None = eqx.field(static=True)

    def __init__(self, env: Env, observe: Any = None, leave_out: Iterable[str] = ()):
        self.env = env
        self.leave_out = tuple(leave_out)
        left = spaces.without(env.observation_space, self.leave_out)
        self.whole_space = spaces.of_observations(left)
        self.observe = _checked(observe, self.whole_space)
        entries = dict(self.observe)
        self.observation_space = spaces.map_leaves(
            lambda path, leaf: _part(leaf, entries.get(path)), self.whole_space
        )
        self.action_space = env.action_space
        self.num_envs = env.num_envs
        self.num_agents = env.num_agents
        self.on_host = env.on_host
        self.max_episode_steps = env.max_episode_steps

    @property
    def recording(self) -> Recording:
        """That of the environment; the axis of stacked frames is never hidden."""
        inner, hidden = self.env.recording, {}
        if self.observe:
            hidden["observe"] = _as_given(self.observe)
        if self.leave_out:
            hidden["leave_out"] = list(self.leave_out)
        return inner._replace(preprocessing={**inner.preprocessing, **hidden})

    @property
    def agent_kinds(self) -> tuple[int, ...] | None:
        return self.env.agent_kinds

    @property
    def state_size(self) -> int | None:
        return self.env.state_size

    def reset(self, key: PRNGKeyArray) -> tuple[PyTree, TimeStep]:
        return self._see(*self.env.reset(key))

    def step(
        self, state: PyTree, action: Shaped[Array, "N *M_and_action"], key: PRNGKeyArray
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
        observe = _as_given(self.observe) if observe is None else observe
        return Observe(env, observe, self.leave_out)

    def render(self, state: PyTree, lane: int = 0) -> UInt8[np.ndarray, "height width 3"] | None:
        return self.env.render(state, lane)

    def close(self) -> None:
        self.env.close()

    def _see(self, state: PyTree, timestep: TimeStep) -> tuple[PyTree, TimeStep]:
        whole, structure = jax.tree.flatten(spaces.select(self.whole_space, timestep.obs))
        entries, seen = dict(self.observe), []
        for (path, _), x in zip(spaces.leaves(self.whole_space), whole, strict=True):
            seen.append(jnp.asarray(x)[..., jnp.array(entries[path])] if path in entries else x)
        obs = jax.tree.unflatten(structure, seen)
        return state, eqx.tree_at(lambda t: t.obs, timestep, obs)


def _as_given(observe: tuple[tuple[str, tuple[int, ...]], ...]) -> Any:
    lists = {path: list(entries) for path, entries in observe}
    return lists.get("", lists)


def _checked(observe: Any, space: Space) -> tuple[tuple[str, tuple[int, ...]], ...]:
    leaves = dict(spaces.leaves(space))
    if observe is None:
        return ()
    if not isinstance(observe, Mapping):
        if "" not in leaves:
            paths = list(leaves)
            raise UsageError(
                f"observe={observe!r}, but observations have several arrays: give lists by "
                f"path, such as {{{paths[0]!r}: [0]}}; paths are {', '.join(paths)}"
            )
        observe = {"": observe}
    for path in observe:
        if path not in leaves:
            raise UnknownNameError("array of observations", path, leaves)
    return tuple((path, _entries(observe[path], leaves[path])) for path in observe)


def _entries(observe: Any, leaf: Leaf) -> tuple[int, ...]:
    shape = leaf.shape if isinstance(leaf, Box) else ()
    size = shape[-1] if shape else 0
    try:
        entries = tuple(operator.index(entry) for entry in observe)
    except TypeError:
        entries = ()
    if not entries or not all(0 <= entry < size for entry in entries):
        raise UsageError(
            f"observe={observe!r}: the observation has shape {shape}, so give a list of "
            f"whole numbers from 0 to {size - 1}"
        )
    return entries


def _part(leaf: Leaf, entries: tuple[int, ...] | None) -> Leaf:
    if entries is None:
        return leaf
    assert isinstance(leaf, Box)
    part = np.s_[..., list(entries)]
    return Box(gymnasium.spaces.Box(leaf.low[part], leaf.high[part], dtype=leaf.dtype.type))
