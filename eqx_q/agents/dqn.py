"""DQN and what is learnt offline with it: CQL, behaviour cloning, and their quantile forms.

Mnih et al. 2015 (DQN); Kumar et al., "Conservative Q-Learning for Offline Reinforcement Learning",
2020 (arXiv 2006.04779); Dabney et al. 2018 (QR-DQN, arXiv 1710.10044).
"""

import dataclasses
import math
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Shaped, UInt

from ..errors import UnknownNameError, UsageError
from ..nets import AbstractQNetwork, NetworkOutput, as_network, make_network
from ..returns import n_step, quantile_huber
from ..spaces import Box, Discrete, of_actions, of_observations
from ..types import AnyArray, Decision, Memory, Scalar, Transitions
from .acting import choose, lanes_of
from .agent import Agent, Batches
from .checks import check_network, check_ranges, check_sizes
from .gradients import clip_by_global_norm

_LOSSES = ("squared", "huber")


class DQN(Agent):
    """Q-learning from recorded transitions with a target network, conservative where asked.

        loss = td_weight * TD(s, a) + alpha * (logsumexp_b Q(s, b) - Q(s, a))

    averaged over the batch. With `alpha=0` that is DQN, with more it is CQL (CQL(H), Kumar et al.
    2020, equation 4 and §4.1), and with `td_weight=0` behaviour cloning, whose logits are the
    Q-values. `CQL` and `BC` create those. TD is the squared or Huber loss of the n-step error; of
    a network that computes quantiles (`network_options={"num_quantiles": 200}`) the quantile Huber
    loss, and the conservative term is then that of their means.

    Hyperparameters marked *traced* are array leaves: another value compiles nothing, and `vmap`
    runs over them. The others are static.

    **Attributes:**

    - `batch_size`: transitions in one update.
    - `n_step`: steps of each of them.
    - `target_update_period`: updates between copies of the network to the target network.
    - `double`: whether the network, not its target, chooses the next action (van Hasselt et al.
        2016).
    - `td_loss`: `"squared"` (the error's square, not half of it) or `"huber"` (with δ = 1).
    - `learning_rate`, `adam_epsilon`: *traced*; of Adam (Kingma & Ba 2015).
    - `max_grad_norm`: *traced*; gradients are clipped by their global norm.
    - `discount`: *traced*; γ.
    - `alpha`, `td_weight`: *traced*; of the two terms of the loss.
    - `reward_scale`: *traced*; rewards are multiplied by it before targets are formed.
    - `epsilon`: *traced*; of acting with a key, where none is given.
    - `num_updates`: learnt so far.
    """

    network: AbstractQNetwork
    target_network: AbstractQNetwork
    statistics: PyTree[Array]
    optimizer_state: PyTree[Array]
    num_updates: UInt[Array, ""]

    learning_rate: Float[Array, ""]
    adam_epsilon: Float[Array, ""]
    max_grad_norm: Float[Array, ""]
    discount: Float[Array, ""]
    alpha: Float[Array, ""]
    td_weight: Float[Array, ""]
    reward_scale: Float[Array, ""]
    epsilon: Float[Array, ""]

    observation_space: Box = eqx.field(static=True)
    action_space: Discrete = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    n_step: int = eqx.field(static=True)
    target_update_period: int = eqx.field(static=True)
    double: bool = eqx.field(static=True)
    td_loss: str = eqx.field(static=True)

    @classmethod
    def create(
        cls,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        *,
        key: PRNGKeyArray,
        network: str | eqx.Module = "auto",
        network_options: dict[str, Any] | None = None,
        batch_size: int = 32,
        n_step: int = 1,
        target_update_period: int = 2000,
        double: bool = False,
        td_loss: str = "huber",
        learning_rate: Scalar = 5e-5,
        adam_epsilon: Scalar = 1.5e-4,
        max_grad_norm: Scalar = math.inf,
        discount: Scalar = 0.99,
        alpha: Scalar = 0.0,
        td_weight: Scalar = 1.0,
        reward_scale: Scalar = 1.0,
        epsilon: Scalar = 0.001,
    ) -> "DQN":
        """A fresh agent.

        **Arguments:**

        - `observation_space`, `action_space`: Gymnasium spaces of one lane: `Box`, `Discrete`.
        - `key`: for the network's parameters.
        - `network`: the name of a shipped network (`eqx_q.nets.make_network`), or an Equinox
            module: an `AbstractQNetwork` without memory, that of a trained PQN for example, or any
            that maps one observation to Q-values `[A]`.
        - `network_options`: options of the named network.

        Every other argument is an attribute of the class.

        **Raises:** `UsageError` for spaces, names, options or sizes that cannot work.
        """
        observation_space = of_observations(observation_space)
        action_space = of_actions(action_space)
        sizes = {
            "batch_size": batch_size,
            "n_step": n_step,
            "target_update_period": target_update_period,
        }
        traced: dict[str, Any] = {
            "learning_rate": learning_rate,
            "adam_epsilon": adam_epsilon,
            "max_grad_norm": max_grad_norm,
            "discount": discount,
            "alpha": alpha,
            "td_weight": td_weight,
            "reward_scale": reward_scale,
            "epsilon": epsilon,
        }
        check_sizes(sizes)
        check_ranges(traced)
        if td_loss not in _LOSSES:
            raise UnknownNameError("td_loss", td_loss, _LOSSES)
        if isinstance(network, str):
            network = make_network(
                network,
                observation_space,
                int(action_space.n),
                key=key,
                **(network_options or {}),
            )
        elif network_options:
            raise UsageError("network_options are for named networks: drop them, or name a network")
        network = as_network(network)
        check_network(network, observation_space, action_space, 1)
        if network.initial_memory(1) is not None:
            raise UsageError(
                "transitions are learnt one by one, and this network has memory: choose one "
                "without (network_options.memory=none)"
            )
        parameters, rest = eqx.partition(network, eqx.is_inexact_array)
        return cls(
            network=network,
            target_network=eqx.combine(jax.tree.map(jnp.copy, parameters), rest),
            statistics=network.initial_statistics(),
            optimizer_state=optax.scale_by_adam().init(parameters),
            num_updates=jnp.zeros((), jnp.uint32),
            observation_space=observation_space,
            action_space=action_space,
            double=double,
            td_loss=td_loss,
            **sizes,
            **jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), traced),
        )

    @property
    def num_members(self) -> None:
        """One agent, not a population."""
        return None

    @property
    def learns_from(self) -> Batches:
        """Transitions of `n_step` steps."""
        return Batches(self.batch_size, self.n_step)

    @property
    def learnt(self) -> UInt[Array, "*S"]:
        """Updates so far."""
        return self.num_updates

    @property
    def num_agents(self) -> None:
        """No team."""
        return None

    def initial_memory(self, num_envs: int) -> None:
        """See `Agent`: there is none."""
        return

    def act(
        self,
        obs: Shaped[AnyArray, "..."],
        memory: Memory = None,
        *,
        first: Bool[AnyArray, "..."] | None = None,
        action_mask: Bool[AnyArray, "..."] | None = None,
        reward: Float[AnyArray, "..."] | None = None,
        epsilon: Scalar | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Decision:
        """See `Agent`. Raises `UsageError` where `obs` does not fit the observation space."""
        lanes = lanes_of(obs.shape, self.observation_space, None)
        obs = jnp.asarray(obs, self.observation_space.dtype)
        rows = obs.reshape(1, -1, *self.observation_space.shape)
        q_values = self.network(rows, self.statistics).q_values.reshape(*lanes, -1)
        return choose(q_values, action_mask, self.epsilon if epsilon is None else epsilon, key)

    def update(
        self, batch: Transitions, *, key: PRNGKeyArray
    ) -> tuple["DQN", dict[str, Float[Array, "..."]]]:
        """One gradient step, and every `target_update_period` of them a new target network.

        See `Agent`. There is no randomness in it: `key` is not used.
        """
        batch = jax.tree.map(jnp.asarray, batch)
        targets = self._targets(batch)
        parameters, rest = eqx.partition(self.network, eqx.is_inexact_array)
        gradients, (statistics, metrics, td_error) = jax.grad(self._loss, has_aux=True)(
            parameters, rest, batch, targets
        )
        gradients, metrics["grad_norm"] = clip_by_global_norm(gradients, self.max_grad_norm)
        adam = optax.scale_by_adam(eps=self.adam_epsilon)  # pyright: ignore[reportArgumentType]
        updates, optimizer_state = adam.update(gradients, self.optimizer_state)
        parameters = jax.tree.map(lambda p, u: p - self.learning_rate * u, parameters, updates)
        num_updates = self.num_updates + 1
        is_due = num_updates % self.target_update_period == 0
        target_parameters, target_rest = eqx.partition(self.target_network, eqx.is_inexact_array)
        target_parameters = jax.lax.cond(
            is_due, lambda new, old: new, lambda new, old: old, parameters, target_parameters
        )
        agent = dataclasses.replace(
            self,
            network=eqx.combine(parameters, rest),
            target_network=eqx.combine(target_parameters, target_rest),
            statistics=statistics,
            optimizer_state=optimizer_state,
            num_updates=num_updates,
        )
        return agent, metrics | {"priority": td_error}

    def targets(self, batch: Transitions) -> Float[Array, " B"]:
        """The n-step targets of a batch; of quantiles, their means."""
        targets = self._targets(jax.tree.map(jnp.asarray, batch))
        return targets if targets.ndim == 1 else jnp.mean(targets, axis=-1)

    def _targets(self, batch: Transitions) -> Float[Array, "B *K"]:
        """Targets by the target network: one each, or one for each quantile."""
        next_obs = jnp.asarray(batch.next_obs)[None]
        output = self.target_network(next_obs, self.statistics)
        chooser = self.network(next_obs, self.statistics) if self.double else output
        action = jnp.argmax(chooser.q_values[0], axis=-1)
        values = _of_actions(output, action)
        reward, length, terminated = (
            batch.reward * self.reward_scale,
            batch.length,
            batch.terminated,
        )
        if values.ndim > 1:  # every quantile is a sample of the return
            reward, length, terminated = (x[:, None] for x in (reward, length, terminated))
        return n_step(reward, length, terminated, values, discount=self.discount)

    def _loss(self, parameters, rest, batch: Transitions, targets: Float[Array, "B *K"]):
        """The mean loss of a batch; statistics, metrics and each absolute TD error."""
        network = eqx.combine(parameters, rest)
        obs, action = jnp.asarray(batch.obs), jnp.asarray(batch.action)
        output = network(obs[None], self.statistics, batch_mask=jnp.ones((1, len(obs)), bool))
        q_values = output.q_values[0]
        chosen = jnp.take_along_axis(q_values, action[:, None], axis=-1)[:, 0]
        values = _of_actions(output, action)
        if values.ndim > 1:
            td_losses = quantile_huber(values, targets)
            targets = jnp.mean(targets, axis=-1)
        elif self.td_loss == "squared":
            td_losses = (targets - values) ** 2
        else:
            td_losses = optax.huber_loss(values, targets)
        gap = jax.nn.logsumexp(q_values, axis=-1) - chosen
        losses = self.td_weight * td_losses + self.alpha * gap
        loss = jnp.mean(losses if batch.weight is None else batch.weight * losses)
        td_error = jnp.abs(targets - chosen)
        metrics = {
            "loss": loss,
            "td_error": jnp.mean(td_error),
            "q_value": jnp.mean(chosen),
            "q_max": jnp.mean(jnp.max(q_values, axis=-1)),
            "conservative_gap": jnp.mean(gap),
            "agreement": jnp.mean(jnp.argmax(q_values, axis=-1) == action),
            "target": jnp.mean(targets),
        }
        if output.features is not None:  # Sokar et al. 2023 (arXiv 2302.12902), with tau = 0
            metrics["dead_units"] = jnp.mean(jnp.all(output.features == 0, axis=(0, 1)))
        return loss, (output.statistics, metrics, td_error)


def _of_actions(output: NetworkOutput, action: Shaped[Array, " B"]) -> Float[Array, "B *K"]:
    """What a network says of one action of each row: its value, or its quantiles."""
    if output.quantiles is None:
        return jnp.take_along_axis(output.q_values[0], action[:, None], axis=-1)[:, 0]
    return jnp.take_along_axis(output.quantiles[0], action[:, None, None], axis=1)[:, 0]


class CQL:
    """Conservative Q-learning: `DQN` with a conservative term (Kumar et al. 2020)."""

    @staticmethod
    def create(
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        *,
        key: PRNGKeyArray,
        alpha: Scalar = 0.1,
        td_loss: str = "squared",
        adam_epsilon: Scalar = 3.125e-4,
        **hyperparameters: Any,
    ) -> DQN:
        """See `DQN.create`; the defaults are slimCQL's."""
        return DQN.create(
            observation_space,
            action_space,
            key=key,
            alpha=alpha,
            td_loss=td_loss,
            adam_epsilon=adam_epsilon,
            **hyperparameters,
        )


class BC:
    """Behaviour cloning: what is left of `CQL` without temporal differences."""

    @staticmethod
    def create(
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        *,
        key: PRNGKeyArray,
        **hyperparameters: Any,
    ) -> DQN:
        """See `DQN.create`. The loss is the cross entropy of the data's actions."""
        hyperparameters = {"alpha": 1.0, "td_weight": 0.0, **hyperparameters}
        return DQN.create(observation_space, action_space, key=key, **hyperparameters)
