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
    """What a data set holds of an environment; see `eqx_q.loops.recording`.

    - `options`: suite options (for `replicate`) with which it plays the game's own episodes and
        pays the game's own rewards.
    - `stack`: how many frames an observation `[stack, height, width]` has, each the one before
        shifted by a frame; `None` where observations are no stacks.
    - `stack_start`: what stands before an episode's first frame: `"zeros"`, or `"repeat"` of it.
    - `preprocessing`: by option, what is done to observations and actions.
    """

    options: Mapping[str, Any] = {}
    stack: int | None = None
    stack_start: str = "zeros"
    preprocessing: Mapping[str, Any] = {}


class Env(eqx.Module):
    """A vectorised environment as a pair of pure functions over `num_envs` lanes.

    `reset` and `step` keep the boundary rule of [`eqx_q.types.TimeStep`][]: next-step reset.
    Both work inside `jit` and `scan`.

    **Attributes:**

    - `observation_space`, `action_space`: Gymnasium spaces of *one* lane (of one agent of it), of
        the kinds in [`eqx_q.spaces`][].
    - `num_envs`: lanes.
    - `num_agents`: `None`, or `M` for a team.
    - `on_host`: whether the environment lives outside JAX (an emulator, a Python object). Then its
        state is only a token that orders the calls: it cannot be vmapped, copied or saved.
    - `max_episode_steps`: the longest an episode can be, where that is known.
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
        """What a data set holds of it. A suite overrides this where there is something to say."""
        return Recording()

    @property
    def num_devices(self) -> int:
        """How many devices it was made for, where it lives outside JAX."""
        return 1

    @property
    def agent_kinds(self) -> tuple[int, ...] | None:
        """Of a team, the kind of each agent, from 0: those of a kind see and act in one way.

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
        """Acts in every lane; resets a lane instead where its episode ended in the step before.

        Actions are what `action_space` has: numbers of any whole kind, or `float32` of a `Box`.
        """

    @abc.abstractmethod
    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any) -> "Env":
        """Another environment of the same kind, sharing nothing that changes with this one.

        **Arguments:**

        - `num_envs`: its lanes.
        - `seed`: for emulators, which are seeded when they are made.
        - `options`: suite options that replace those this environment was made with.
        """

    @abc.abstractmethod
    def render(self, state: PyTree, lane: int = 0) -> UInt8[np.ndarray, "height width 3"] | None:
        """A picture of one lane, or `None` where the suite cannot draw."""

    @abc.abstractmethod
    def close(self) -> None:
        """Frees what the environment holds outside JAX."""


def kinds_of(agents: Iterable[Hashable]) -> tuple[int, ...]:
    """The kinds of agents, for `Env.agent_kinds`: those of which the same is said are of one."""
    agents = list(agents)
    first = list(dict.fromkeys(agents))
    return tuple(first.index(agent) for agent in agents)
