"""An agent's computation: raw values of choices, Q-values, and predictions to regress on targets.

Shapes: `T` steps, `N` lanes, `M` agents per lane (1 without a team), `F` factors of an action, `A`
choices of all factors, `K` raw values per choice, `P` predictions per lane (one for a team with a
joint mixer, else one per agent), `L` samples of each target.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .. import spaces
from ..errors import explained
from ..nets import AbstractQNetwork, Inputs, NetworkOutput
from ..nets.precision import products_in
from ..types import AnyArray, Observation, TimeStep
from .actions import Actions
from .mixers import AbstractMixer
from .values import AbstractValue


class Unrolled(NamedTuple):
    """A network's output over `T` steps."""

    values: Float[Array, "T N M A K"]
    memory: PyTree[Array]
    statistics: PyTree[Array]
    features: Float[Array, "T R H"] | None


class Predictions(NamedTuple):
    """Predictions to regress on targets, and the value that defines the loss."""

    raw: Float[Array, "*steps P K"]
    value: AbstractValue


class Model(eqx.Module):
    """Network, mixer, value and actions of an agent, with all axes `[T, N, M, ...]`.

    The network gets rows: the agents of all lanes on one axis.
    """

    network: AbstractQNetwork
    mixer: AbstractMixer
    value: AbstractValue
    actions: Actions
    observation_space: spaces.Space = eqx.field(static=True)
    precision: str = eqx.field(static=True)

    def having(self, network: AbstractQNetwork, mixer: AbstractMixer) -> "Model":
        """The same model with this network and mixer."""
        return dataclasses.replace(self, network=network, mixer=mixer)

    def compute(
        self,
        statistics: PyTree[Array],
        memory: PyTree[Array],
        obs: Observation,
        *,
        first: Bool[Array, "T R"] | None = None,
        last_action: Int[Array, "T R F"] | None = None,
        last_reward: Float[Array, "T R"] | None = None,
        batch_mask: Bool[Array, "T R"] | None = None,
    ) -> NetworkOutput:
        """Applies the network to rows. Clears last actions and rewards where an episode starts."""
        if first is not None:
            if last_action is not None:
                last_action = jnp.where(first[..., None], -1, last_action)
            if last_reward is not None:
                last_reward = jnp.where(first, 0.0, last_reward)
        inputs = Inputs(obs, first, last_action, last_reward, batch_mask)
        return self._apply(inputs, statistics, memory)

    def _apply(
        self, inputs: Inputs, statistics: PyTree[Array], memory: PyTree[Array]
    ) -> NetworkOutput:
        with products_in(self.precision):
            return self.network(inputs, statistics, memory)

    def evaluate(
        self,
        statistics: PyTree[Array],
        obs: Observation,
        acting: Bool[Array, "*lanes M"] | None = None,
    ) -> Unrolled:
        """Raw values `[*lanes, M, A, K]` of single observations, for a network without memory."""
        lengths = spaces.leading_axes(self.observation_space, obs)
        mask = None if acting is None else acting.reshape(1, -1)
        rows = spaces.as_rows(self.observation_space, obs, 1, -1)
        output = self._apply(Inputs(rows, batch_mask=mask), statistics, ())
        values = output.values.reshape(*lengths, *output.values.shape[2:])
        return Unrolled(values, output.memory, output.statistics, output.features)

    def unroll(
        self,
        statistics: PyTree[Array],
        timesteps: TimeStep,
        memory: PyTree[Array] = (),
        last_action: Int[Array, "T N M F"] | None = None,
        acting: Bool[Array, "T N M"] | None = None,
    ) -> Unrolled:
        """Raw values at all timesteps of teams (`obs` is `[T, N, M, ...]`).

        **Arguments:**

        - `statistics`: running statistics of normalisation.
        - `timesteps`: networks with memory also use their `first` and rewards.
        - `memory`: the network's memory before the first timestep; by default none.
        - `last_action`: choices that led to each timestep, for networks with memory.
        - `acting`: in training, mask of the rows that count for normalisation.
        """
        lengths = spaces.leading_axes(self.observation_space, timesteps.obs)

        def rows(x: AnyArray) -> Array:  # x has values per agent, or per lane
            x = jnp.asarray(x)
            x = x if x.ndim > 2 else jnp.broadcast_to(x[..., None], lengths)
            return x.reshape(lengths[0], -1, *x.shape[3:])

        reward = timesteps.reward if timesteps.agent_reward is None else timesteps.agent_reward
        output = self.compute(
            statistics,
            memory,
            spaces.as_rows(self.observation_space, timesteps.obs, lengths[0], -1),
            first=rows(timesteps.first),
            last_action=None if last_action is None else rows(last_action),
            last_reward=None if last_action is None else rows(reward),
            batch_mask=None if acting is None else rows(acting),
        )
        values = output.values.reshape(*lengths, *output.values.shape[2:])
        return Unrolled(values, output.memory, output.statistics, output.features)

    def q_values(
        self, values: Float[Array, "*lanes A K"], action_mask: Bool[AnyArray, "*lanes A"] | None
    ) -> Float[Array, "*lanes F C"]:
        """Q-values by factor, -inf where a choice is illegal or padding."""
        q_values = self.actions.by_factor(self.value.expected(values), -jnp.inf)
        is_legal = self.actions.legal(action_mask)
        return q_values if is_legal is None else jnp.where(is_legal, q_values, -jnp.inf)

    def of_action(
        self, values: Float[Array, "*lanes A K"], index: Int[Array, "*lanes F"]
    ) -> Float[Array, "*lanes K"]:
        """Raw values of a joint action; with a single factor, that factor's own."""
        taken = self.actions.take(values, index)
        return taken[..., 0, :] if self.actions.num_factors == 1 else self.value.join(taken)

    def samples(
        self,
        values: Float[Array, "*lanes A K"],
        action_mask: Bool[AnyArray, "*lanes A"] | None,
        chooser: Float[Array, "*lanes F C"] | None = None,
    ) -> Float[Array, "*lanes L"]:
        """Return samples of the best legal action, by these Q-values or those of `chooser`."""
        q_values = self.q_values(values, action_mask)
        if chooser is None and self.value.num_samples == 1:  # only the maximum is needed
            return jnp.mean(jnp.max(q_values, axis=-1), axis=-1, keepdims=True)
        index = jnp.argmax(q_values if chooser is None else chooser, axis=-1)
        return self.value.samples(self.of_action(values, index))

    def mixed_samples(
        self, samples: Float[Array, "*lanes M L"], timesteps: TimeStep
    ) -> Float[Array, "*lanes P L"]:
        """Samples per prediction, from those per agent (0 for dead agents)."""
        if not self.mixer.is_joint:
            return samples
        return self._mix(samples[..., 0], self.global_state(timesteps))[..., None]

    def predict(
        self,
        raw: Float[Array, "*steps M K"],
        acting: Bool[Array, "*steps M"],
        global_state: Float[Array, "*steps S"] | None,
    ) -> Predictions:
        """Predictions from raw values of the agents' actions.

        A joint mixer mixes expected values, so its prediction is an expected value too.
        """
        if not self.mixer.is_joint:
            return Predictions(raw, self.value)
        chosen = jnp.where(acting, self.value.expected(raw), 0.0)
        return Predictions(*self.value.of_means(self._mix(chosen, global_state)))

    def _mix(
        self, values: Float[Array, "*lanes M"], global_state: Float[Array, "*lanes S"] | None
    ) -> Float[Array, "*lanes P"]:
        size = None if global_state is None else global_state.shape[-1]
        with explained(
            f"{type(self.mixer).__name__} does not fit a global state of {size} numbers: create "
            f"the agent with state_size={size}"
        ):
            return self.mixer.mix(values, global_state)

    def reward(self, timesteps: TimeStep) -> Float[Array, "*lanes P"]:
        """The reward of each prediction: the team's, or each agent's own if there is one."""
        if self.mixer.is_joint or timesteps.agent_reward is None:
            return jnp.asarray(timesteps.reward)[..., None]
        return jnp.asarray(timesteps.agent_reward)

    def acts(self, acting: Bool[Array, "*lanes M"]) -> Bool[Array, "*lanes P"]:
        """Mask of predictions that count, given which agents act: a team's while any agent does."""
        return jnp.any(acting, axis=-1, keepdims=True) if self.mixer.is_joint else acting

    def global_state(self, timesteps: TimeStep) -> Float[Array, "*lanes S"] | None:
        """Input of a joint mixer: the environment's state, or all observations concatenated."""
        if not self.mixer.is_joint:
            return None
        if timesteps.global_state is not None:
            return jnp.asarray(timesteps.global_state)
        axes = spaces.leading_axes(self.observation_space, timesteps.obs)[:-1]
        leaves = [jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(timesteps.obs)]
        return jnp.concatenate([x.reshape(*axes, -1) for x in leaves], axis=-1)


def size_of_observations(space: spaces.Space, num_agents: int | None) -> int:
    """The size of all observations of a team, concatenated."""
    sizes = [x.size for x in jax.tree.leaves(spaces.shapes(space))]
    return sum(sizes) * (num_agents or 1)
