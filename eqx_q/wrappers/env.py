"""The environment contract."""

import abc
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import gymnasium
import numpy as np
from equinox import AbstractVar
from jaxtyping import Array, PRNGKeyArray, PyTree, Shaped, UInt8

from ..spaces import Leaf
from ..types import TimeStep


class Recording(NamedTuple):
    """How to record an environment; see `eqx_q.loops.recording`.

    - `options`: suite options (for `replicate`) with which it plays the game's own episodes with
        the game's own rewards.
    - `stack`: number of frames of an observation `[stack, height, width]`, a sliding window over
        time; `None` if observations are not stacks.
    - `stack_start`: padding before an episode's first frame: `"zeros"`, or `"repeat"` of it.
    - `preprocessing`: the processing of observations and actions, by option.
    """

    options: Mapping[str, Any] = {}
    stack: int | None = None
    stack_start: str = "zeros"
    preprocessing: Mapping[str, Any] = {}


class Env(eqx.Module):
    """A vectorised environment as a pair of pure functions over `num_envs` lanes.

    `reset` and `step` follow the boundary rule of [`eqx_q.types.TimeStep`][]: next-step reset.
    Both work inside `jit` and `scan`.

    **Attributes:**

    - `observation_space`, `action_space`: Gymnasium spaces of *one* lane (in a team, of one agent),
        of the kinds in [`eqx_q.spaces`][].
    - `num_envs`: lanes.
    - `num_agents`: `None`, or `M` for a team.
    - `on_host`: whether the environment lives outside JAX (an emulator, a Python object). Then its
        state is only a token that orders the calls: it cannot be vmapped, copied or saved.
    - `max_episode_steps`: the maximum episode length, if known.
    """

    observation_space: AbstractVar[gymnasium.Space]
    action_space: AbstractVar[Leaf]
    num_envs: AbstractVar[int]
    num_agents: AbstractVar[int | None]
    on_host: AbstractVar[bool]
    max_episode_steps: AbstractVar[int | None]

    @property
    def state_size(self) -> int | None:
        """`S` of `TimeStep.global_state`, or `None`. A suite that has one overrides this."""
        return None

    @property
    def recording(self) -> Recording:
        """How to record it. A suite overrides this if the defaults do not apply."""
        return Recording()

    @property
    def num_devices(self) -> int:
        """The number of devices that it was made for, if it lives outside JAX."""
        return 1

    @property
    def agent_kinds(self) -> tuple[int, ...] | None:
        """The kind of each agent of a team, from 0. Agents of one kind observe and act alike.

        A suite whose agents may differ overrides this.
        """
        return None if self.num_agents is None else (0,) * self.num_agents

    @abc.abstractmethod
    def reset(self, key: PRNGKeyArray) -> tuple[PyTree, TimeStep]:
        """Starts an episode in every lane.

        **Returns:** the environment's state, and a timestep with `first` everywhere.
        """

    @abc.abstractmethod
    def step(
        self, state: PyTree, action: Shaped[Array, "N *M_and_action"], key: PRNGKeyArray
    ) -> tuple[PyTree, TimeStep]:
        """Acts in every lane, but resets the lanes whose episode ended in the previous step.

        Actions are from `action_space`: integers of any type, or `float32` for a `Box`.
        """

    @property
    def parts(self) -> tuple["Env", ...]:
        """Environments with the lanes of this one, in order, that can be stepped in turns.

        If there are several, `state` is the tuple of theirs.
        """
        return (self,)

    def send(
        self, state: PyTree, action: Shaped[Array, "N *M_and_action"], key: PRNGKeyArray
    ) -> PyTree:
        """Begins a step that `recv` ends. What is computed in between need not wait for it."""
        return self.step(state, action, key)

    def recv(self, sent: PyTree, after: PyTree = None) -> tuple[PyTree, TimeStep]:
        """Ends a step.

        **Arguments:** `sent`: from `send`; `after`: what another environment of `parts` sent last,
        or its state: what this depends on is computed before this step ends.
        """
        return sent

    @abc.abstractmethod
    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any) -> "Env":
        """Makes another environment of the same kind, which shares no mutable state with this one.

        **Arguments:**

        - `num_envs`: its lanes.
        - `seed`: for emulators, which are seeded when they are made.
        - `options`: suite options that replace those of this environment.
        """

    @abc.abstractmethod
    def render(self, state: PyTree, lane: int = 0) -> UInt8[np.ndarray, "height width 3"] | None:
        """A picture of one lane, or `None` if the suite cannot draw."""

    @abc.abstractmethod
    def close(self) -> None:
        """Frees the environment's resources outside JAX."""


def kinds_of(agents: Iterable[Hashable]) -> tuple[int, ...]:
    """The kinds of agents, for `Env.agent_kinds`: agents with equal descriptions share a kind."""
    agents = list(agents)
    first = list(dict.fromkeys(agents))
    return tuple(first.index(agent) for agent in agents)
