"""The agent contract: acting, and learning online or offline."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import equinox as eqx
import gymnasium
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Shaped

from ..errors import UsageError
from ..spaces import Leaf
from ..types import (
    AnyArray,
    Count,
    Decision,
    Memory,
    Observation,
    Rollout,
    Scalar,
    TimeStep,
    Transitions,
)


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Online learning: the rollouts that one update takes.

    **Fields:**

    - `length`: `T`, the steps per lane to learn from.
    - `burn_in`: extra steps at the start of a rollout that only warm up memory.
    - `lane_groups`: number of lane groups. Every minibatch takes equally from each, so that devices
        can share them.
    - `num_minibatches`: minibatches per group; with `whole_lanes` they consist of whole lanes.
    """

    length: int
    burn_in: int = 0
    lane_groups: int = 1
    num_minibatches: int = 1
    whole_lanes: bool = False

    unit: ClassVar[str] = "env_steps"

    def units(self, num_envs: int) -> int:
        """Units that one update counts: the steps of `num_envs` lanes."""
        return self.length * num_envs

    @property
    def shared(self) -> tuple[int, str]:
        """The number that devices sharing one agent must divide equally, and its option's name."""
        return self.lane_groups, "lane_groups"

    def num_items(self, num_lanes: int) -> int:
        """The number of items (lanes or transitions) that are divided into minibatches.

        **Raises:** `UsageError` if they do not divide into groups or minibatches.
        """
        if num_lanes % self.lane_groups:
            raise UsageError(
                f"lane_groups={self.lane_groups} does not divide the {num_lanes} lanes of a "
                "rollout: change lane_groups or num_envs"
            )
        items = num_lanes if self.whole_lanes else self.units(num_lanes)
        if items // self.lane_groups % self.num_minibatches:
            what = "lanes" if self.whole_lanes else "transitions"
            or_length = "" if self.whole_lanes else " or rollout_length"
            group = "rollout" if self.lane_groups == 1 else "lane group"
            raise UsageError(
                f"num_minibatches={self.num_minibatches} does not divide the "
                f"{items // self.lane_groups} {what} of a {group}: change num_minibatches, "
                f"num_envs{or_length}"
            )
        return items


@dataclasses.dataclass(frozen=True)
class Batches:
    """Offline learning: the batches that one update takes.

    They are `Transitions`, or with a `sequence_length` a `Rollout` with one lane per sequence.

    **Fields:**

    - `size`: `B`, the items of a batch (of each member of a population).
    - `n_step`: steps of a transition.
    - `sequence_length`: steps of a sequence; the first `burn_in` of them only warm up memory.
    """

    size: int
    n_step: int = 1
    sequence_length: int | None = None
    burn_in: int = 0

    unit: ClassVar[str] = "num_updates"

    def units(self, num_envs: int) -> int:
        """Units that one update counts: 1."""
        return 1

    @property
    def shared(self) -> tuple[int, str]:
        """See `Rollouts`."""
        return self.size, "batch_size"


class Agent(eqx.Module):
    """An immutable PyTree that acts; learning returns a new agent.

    **Attributes:**

    - `observation_space`, `action_space`: Gymnasium spaces of one lane.
    - `num_choices`: `A`, summed over all factors of an action: the size of an action mask.
    - `num_agents`: `None`, or `M` for a team, whose observations and actions are `[N, M, ...]`.
    - `num_members`: `None`, or `S` for a population, whose lanes are `[S * N]`.
    - `learns_from`: the input of `update`, which makes the agent learn online or offline.
    - `learnt`: lane-steps (online) or updates (offline) so far (`[S]` in a population).
    """

    observation_space: AbstractVar[gymnasium.Space]
    action_space: AbstractVar[Leaf]
    num_choices: AbstractVar[int]
    num_agents: AbstractVar[int | None]
    num_members: AbstractVar[int | None]
    learns_from: AbstractVar[Rollouts | Batches]
    learnt: AbstractVar[Count]

    @abc.abstractmethod
    def initial_memory(self, num_envs: int) -> Memory:
        """Memory for `num_envs` lanes at the start of an episode; `None` without memory."""

    @abc.abstractmethod
    def act(
        self,
        obs: Observation,
        memory: Memory = None,
        *,
        first: Bool[AnyArray, "..."] | None = None,
        action_mask: Bool[AnyArray, "..."] | None = None,
        reward: Float[AnyArray, "..."] | None = None,
        epsilon: Float[AnyArray, "..."] | Scalar | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Decision:
        """Chooses an action for one observation, or for one per lane.

        **Arguments:**

        - `obs`: with or without a lane axis; NumPy or JAX.
        - `memory`: from the previous decision, or from `initial_memory` (for one lane if `obs` has
            no lane axis); by default that of an episode's start.
        - `first`: lanes in which an episode starts, which resets their memory.
        - `action_mask`: legal actions.
        - `reward`: the reward that came with `obs`, for networks that use it; for a team, one per
            agent or one for all.
        - `epsilon`: probability of a random legal action; by default the schedule's.
        - `key`: source of randomness. Without it actions are greedy.
        """

    @abc.abstractmethod
    def update(
        self, experience: Rollout | Transitions, *, key: PRNGKeyArray
    ) -> tuple["Agent", dict[str, Float[Array, "..."]]]:
        """Learns from a rollout, or from a batch (in a population: one per member).

        **Returns:** the new agent, and metrics by name: scalars, or distributions with their own
        axes (in a population, after the axis of members). For a batch they include `priority`,
        `[B]`: the absolute TD error of each item, for prioritised sampling.
        """

    @abc.abstractmethod
    def with_schedule(self, steps: Float[Array, "*S"]) -> "Agent":
        """The same agent with schedules over `steps` lane-steps, unless their length was set.

        An agent without schedules is returned as it is.
        """

    @abc.abstractmethod
    def hyperparameters(self) -> dict[str, Shaped[Array, "*S"]]:
        """Hyperparameters by path: see `eqx_q.agents.hyperparameters`."""

    @abc.abstractmethod
    def with_hyperparameters(
        self, values: Mapping[str, Scalar | Shaped[AnyArray, "*S"]]
    ) -> "Agent":
        """The same agent with other hyperparameters: see `eqx_q.agents.hyperparameters.replace`."""

    @abc.abstractmethod
    def measure(self, fn: Callable[[Rollout], PyTree[Array]], rollout: Rollout) -> PyTree[Array]:
        """`fn(rollout)`; in a population, stacked over the members' own lanes."""


def decide(
    agent: Agent,
    timestep: TimeStep,
    memory: Memory = None,
    *,
    epsilon: Float[AnyArray, "..."] | Scalar | None = None,
    key: PRNGKeyArray | None = None,
) -> Decision:
    """`agent.act` with all fields of a timestep."""
    return agent.act(
        timestep.obs,
        memory,
        first=timestep.first,
        action_mask=timestep.action_mask,
        reward=timestep.reward if timestep.agent_reward is None else timestep.agent_reward,
        epsilon=epsilon,
        key=key,
    )
