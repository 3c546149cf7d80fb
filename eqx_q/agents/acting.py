"""From observations to decisions: the code that all agents with Q-values share."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from .. import spaces
from ..errors import UsageError
from ..nets import AbstractQNetwork
from ..nets.parameters import split_parameters
from ..spaces import Leaf
from ..types import AnyArray, Decision, Memory, Observation, Rollout, Scalar
from . import hyperparameters
from .actions import Actions, Bins
from .agent import Agent
from .exploration import AbstractExploration
from .mixers import AbstractMixer
from .model import Model
from .optimizers import Optimizer
from .values import AbstractValue


class AgentMemory(eqx.Module):
    """An agent's memory, with a row per lane and agent.

    It holds the network's memory, the last choice of each factor (-1 if there was none), and the
    memory of the exploration.
    """

    network: PyTree[Array]
    last_action: Int[Array, "R F"]
    exploration: PyTree[Array] = ()


class QAgent(Agent):
    """Acts by the Q-values of a network.

    **Attributes:** its parts; see their classes. `statistics`: running statistics of the network's
    normalisation. `bins`: see `Actions`. `epsilon`: the default for acting with a key.
    """

    action_space: AbstractVar[Leaf]
    network: AbstractVar[AbstractQNetwork]
    mixer: AbstractVar[AbstractMixer]
    value: AbstractVar[AbstractValue]
    exploration: AbstractVar[AbstractExploration]
    optimizer: AbstractVar[Optimizer]
    statistics: AbstractVar[PyTree[Array]]
    optimizer_state: AbstractVar[PyTree[Array]]
    bins: AbstractVar[Bins]
    precision: AbstractVar[str]
    epsilon: AbstractVar[Float[Array, ""]]

    @property
    def actions(self) -> Actions:
        """Converts between choices and actions."""
        return Actions(self.action_space, self.bins)

    @property
    def num_choices(self) -> int:
        """See `Agent`."""
        return self.actions.num_choices

    @property
    def model(self) -> Model:
        """The agent's computation as a `Model`."""
        return Model(
            self.network,
            self.mixer,
            self.value,
            self.actions,
            self.observation_space,
            self.precision,
        )

    @property
    def num_members(self) -> None:
        """One agent, not a population."""
        return None

    @property
    def has_memory(self) -> bool:
        """Whether the network has memory."""
        return bool(jax.tree.leaves(self.network.initial_memory(self.num_agents or 1)))

    def initial_memory(self, num_envs: int) -> AgentMemory | None:
        """See `Agent`."""
        rows = num_envs * (self.num_agents or 1)
        network = self.network.initial_memory(rows)
        exploration = self.exploration.initial_memory(rows, self.actions.num_factors)
        if not jax.tree.leaves((network, exploration)):
            return None
        last_action = jnp.full((rows, self.actions.num_factors), -1, jnp.int32)
        return AgentMemory(network, last_action, exploration)

    def act(
        self,
        obs: Observation,
        memory: Memory = None,
        *,
        first: Bool[AnyArray, "..."] | None = None,
        action_mask: Bool[AnyArray, "..."] | None = None,
        reward: Float[AnyArray, "..."] | None = None,
        epsilon: Scalar | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Decision:
        """See `Agent`. Raises `UsageError` if `obs` does not fit the observation space."""
        space, actions = self.observation_space, self.actions
        obs = spaces.cast(space, spaces.select(space, obs))
        lanes = self._lanes(obs)
        rows = math.prod(lanes)
        memory = self._checked_memory(memory, rows)
        _check_mask(action_mask, (*lanes, actions.num_choices))

        def of_rows(x: Any) -> Array | None:
            if x is None:
                return None
            x = jnp.asarray(x)
            x = x if x.shape == lanes else jnp.broadcast_to(x[..., None], lanes)
            return x.reshape(1, rows)

        starts, model = of_rows(first), self.model
        output = model.compute(
            self.statistics,
            () if memory is None else memory.network,
            spaces.as_rows(space, obs, 1, rows),
            first=starts,
            last_action=None if memory is None else memory.last_action[None],
            last_reward=of_rows(reward),
        )
        mask = None if action_mask is None else jnp.reshape(action_mask, (rows, -1))
        q_values = model.q_values(output.values[0], mask)
        after = () if memory is None else memory.exploration
        if key is None:
            index = jnp.argmax(q_values, axis=-1)
        else:
            epsilon = self.epsilon if epsilon is None else epsilon
            is_legal = actions.legal(mask)
            if is_legal is not None:  # one per row, since each row draws its own
                is_legal = jnp.broadcast_to(is_legal, q_values.shape)
            starts = None if starts is None else starts[0]
            index, after = self.exploration(q_values, epsilon, key, after, starts, is_legal)
        action = actions.decode(index)
        # The maximum by its index, which exploration has, too: this saves a reduction.
        best = jnp.argmax(q_values, axis=-1, keepdims=True)
        value = jnp.mean(jnp.take_along_axis(q_values, best, axis=-1)[..., 0], axis=-1)
        return Decision(
            action.reshape(*lanes, *action.shape[1:]),
            value.reshape(lanes),
            None if memory is None else AgentMemory(output.memory, index, after),
        )

    def _lanes(self, obs: Observation) -> tuple[int, ...]:
        """The leading axes of an observation: lanes, if any, then the agents of a team."""
        lanes = spaces.leading_axes(self.observation_space, obs)
        team = () if self.num_agents is None else (self.num_agents,)
        if len(lanes) - len(team) not in (0, 1) or lanes[len(lanes) - len(team) :] != team:
            expected = f"({', '.join(map(str, ('lanes', *team)))}), or {team} for one lane"
            raise UsageError(
                f"obs has leading axes {lanes} before those of its space: the agent expects "
                f"{expected}"
            )
        return lanes

    def hyperparameters(self) -> dict[str, Shaped[Array, "*S"]]:
        """See `Agent`."""
        return hyperparameters.leaves(self)

    def with_hyperparameters(
        self, values: Mapping[str, Scalar | Shaped[AnyArray, "*S"]]
    ) -> "QAgent":
        """See `Agent`."""
        return hyperparameters.replace(self, values)

    def with_fresh_optimizer(self) -> "QAgent":
        """The same agent with a fresh optimiser state.

        Zeros take no space in files, so that this agent's file is a third as large with Adam.
        """
        parameters, _ = split_parameters((self.network, self.mixer))
        return dataclasses.replace(self, optimizer_state=self.optimizer.init(parameters))

    def measure(self, fn: Callable[[Rollout], PyTree[Array]], rollout: Rollout) -> PyTree[Array]:
        """See `Agent`."""
        return fn(rollout)

    def _checked_memory(self, memory: Memory, rows: int) -> Memory:
        """The given memory, or that of an episode's start.

        **Raises:** `UsageError` if it does not match this agent or the number of rows.
        """
        num_lanes = rows // (self.num_agents or 1)
        start = self.initial_memory(num_lanes)
        if memory is None:
            return start
        if _shapes(memory) != _shapes(start):
            raise UsageError(
                f"memory does not match {num_lanes} lanes of this agent: pass the result of "
                "agent.initial_memory or the memory of the previous decision"
            )
        return memory


def _shapes(memory: Memory) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(memory), [jnp.shape(x) for x in jax.tree.leaves(memory)]


def _check_mask(mask: AnyArray | None, shape: tuple[int, ...]) -> None:
    if mask is not None and jnp.shape(mask) != shape:
        raise UsageError(
            f"action_mask has shape {jnp.shape(mask)}, not {shape}: give it axes for lanes, agents "
            "of a team, and choices"
        )
