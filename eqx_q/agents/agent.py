"""The agent contract: what acts, and how it learns, online or offline."""

import abc
from collections.abc import Callable

import equinox as eqx
import gymnasium
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Shaped

from ..types import AnyArray, Decision, Memory, Rollout, Scalar, TimeStep, Transitions


class Agent(eqx.Module):
    """An immutable PyTree that acts, and that learns by giving back another one.

    What it learns from makes it an `OnlineAgent` or an `OfflineAgent`.

    **Attributes:**

    - `observation_space`, `action_space`: Gymnasium spaces of one lane.
    - `num_agents`: `None`, or `M` for a team, whose observations and actions are `[N, M, ...]`.
    - `num_members`: `None`, or `S` for a population, whose lanes are `[S * N]`.
    """

    observation_space: AbstractVar[gymnasium.Space]
    action_space: AbstractVar[gymnasium.spaces.Discrete]
    num_agents: AbstractVar[int | None]
    num_members: AbstractVar[int | None]

    @abc.abstractmethod
    def initial_memory(self, num_envs: int) -> Memory:
        """Memory for `num_envs` lanes at the start of an episode; `None` without memory."""

    @abc.abstractmethod
    def act(
        self,
        obs: Shaped[AnyArray, "..."],
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
        - `memory`: from the decision before, or from `initial_memory` (for one lane, without a lane
            axis in `obs`); by default that of an episode's start.
        - `first`: where an episode starts, so that memory is reset.
        - `action_mask`: legal actions.
        - `reward`: that came with `obs`, for networks that look at it; in a team each agent's, or
            one for all.
        - `epsilon`: probability of a random legal action; by default the schedule's.
        - `key`: randomness. Without it the choice is greedy.
        """


class OnlineAgent(Agent):
    """An agent that learns from what it has just done.

    **Attributes:**

    - `rollout_length`: `T`, the steps per lane that one `update` learns from.
    - `burn_in`: steps before those that a rollout must have too, to warm up memory.
    - `lane_groups`: groups of lanes that minibatches are drawn within; devices can share them.
    - `env_steps`: lane-steps learnt from so far (`[S]` in a population).
    - `schedule_steps`: lane-steps over which schedules run; not finite where unset.
    """

    rollout_length: AbstractVar[int]
    burn_in: AbstractVar[int]
    lane_groups: AbstractVar[int]
    env_steps: AbstractVar[Shaped[Array, "*S"]]
    schedule_steps: AbstractVar[Float[Array, "*S"]]

    @abc.abstractmethod
    def update(
        self, rollout: Rollout, *, key: PRNGKeyArray
    ) -> tuple["OnlineAgent", dict[str, Float[Array, "..."]]]:
        """Learns from a rollout.

        **Returns:** the new agent, and named scalars (one per member in a population).
        """

    @abc.abstractmethod
    def with_schedule(self, steps: Float[Array, "*S"]) -> "OnlineAgent":
        """The same agent with `schedule_steps` set to `steps`, unless its creator has set it."""

    @abc.abstractmethod
    def measure(self, fn: Callable[[Rollout], PyTree[Array]], rollout: Rollout) -> PyTree[Array]:
        """`fn(rollout)`, or that of every member's own lanes, stacked, in a population."""


class OfflineAgent(Agent):
    """An agent that learns from transitions that somebody recorded.

    **Attributes:**

    - `batch_size`: `B`, the transitions that one `update` learns from (of each member).
    - `n_step`: how many steps each of them has.
    - `num_updates`: so far (`[S]` in a population).
    """

    batch_size: AbstractVar[int]
    n_step: AbstractVar[int]
    num_updates: AbstractVar[Shaped[Array, "*S"]]

    @abc.abstractmethod
    def update(
        self, batch: Transitions, *, key: PRNGKeyArray
    ) -> tuple["OfflineAgent", dict[str, Float[Array, "..."]], Float[Array, "*S B"]]:
        """Learns from a batch (in a population: one for each member, with a leading axis).

        **Returns:** the new agent, named scalars (one per member in a population), and the
        absolute TD error of each transition, by which one may choose what to learn from next.
        """


def decide(
    agent: Agent,
    timestep: TimeStep,
    memory: Memory = None,
    *,
    epsilon: Float[AnyArray, "..."] | Scalar | None = None,
    key: PRNGKeyArray | None = None,
) -> Decision:
    """`agent.act` on all that a timestep says."""
    return agent.act(
        timestep.obs,
        memory,
        first=timestep.first,
        action_mask=timestep.action_mask,
        reward=timestep.reward if timestep.agent_reward is None else timestep.agent_reward,
        epsilon=epsilon,
        key=key,
    )
