"""Offline agents: DQN, CQL and behaviour cloning.

Mnih et al. 2015 (DQN); Kumar et al., "Conservative Q-Learning for Offline Reinforcement Learning",
2020 (arXiv 2006.04779); with `value="quantile"` Dabney et al. 2018 (QR-DQN, arXiv 1710.10044).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import optax
from equinox import AbstractClassVar
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Shaped, UInt

from ..errors import UsageError, check_whole
from ..nets import AbstractQNetwork
from ..nets.parameters import split_parameters
from ..returns import n_step, n_step_sequence
from ..spaces import Leaf, Space
from ..types import AnyArray, Count, Rollout, Scalar, Transitions
from .acting import QAgent
from .actions import Bins
from .agent import Batches
from .assembly import Choice, check_burn_in, make_parts
from .exploration import AbstractExploration
from .gradients import descend
from .hyperparameters import check_ranges
from .mixers import AbstractMixer
from .model import Model
from .optimizers import OPTIMIZERS, AnyOptimizer, Optimizer
from .parts import with_default
from .regression import Items, average, fit, items_of, outcome
from .sequences import as_team, part, unroll, warmed_up
from .values import VALUES, AbstractValue


class Defaults(NamedTuple):
    """Defaults per agent class: the loss of a scalar value, Adam's `eps`, and two loss weights."""

    td_loss: str
    eps: float
    alpha: float
    td_weight: float


class OfflineQ(QAgent):
    """Q-learning from recorded experience with a target network, optionally conservative.

        loss = td_weight * TD(s, a) + alpha * (logsumexp_b Q(s, b) - Q(s, a))

    averaged over the batch. TD is the value's loss on the n-step target. The conservative term is
    that of CQL(H) (Kumar et al. 2020, equation 4 and §4.1) on expected values, averaged over the
    factors of an action. `DQN` has the first term, `CQL` both, and `BC` the second, with Q-values
    as logits.

    A single agent without memory learns from transitions. With memory, or in a team, it learns from
    sequences: `burn_in` steps warm up the memory, `sequence_length` steps are learnt from, and the
    last `n_step - 1` steps serve only their targets.

    Hyperparameters marked *traced* are array leaves: changing them does not recompile, and they can
    differ under `vmap`. The others are static.

    **Attributes:**

    - `network`, `mixer`, `value`, `exploration`, `optimizer`, `bins`, `precision`: its parts;
        see `create`.
    - `target_network`, `target_mixer`: copies of the trained parts.
    - `batch_size`: transitions, or sequences, in one update.
    - `n_step`: steps of each transition.
    - `sequence_length`: steps of a sequence to learn from; `None`: learn from transitions.
    - `burn_in`: steps before those.
    - `target_update_period`: updates between copies of the network to the target network.
    - `double`: whether the network, not its target, chooses the next action (van Hasselt et al.
        2016).
    - `learning_rate`: *traced*.
    - `max_grad_norm`: *traced*; gradients are clipped by their global norm.
    - `discount`: *traced*; γ.
    - `alpha`, `td_weight`: *traced*; weights of the two terms of the loss.
    - `reward_scale`: *traced*; rewards are multiplied by it before targets are formed.
    - `epsilon`: *traced*; the default for acting with a key.
    - `num_updates`: number of updates so far.
    """

    defaults: AbstractClassVar[Defaults]

    network: AbstractQNetwork
    mixer: AbstractMixer
    target_network: AbstractQNetwork
    target_mixer: AbstractMixer
    value: AbstractValue
    exploration: AbstractExploration
    optimizer: Optimizer
    statistics: PyTree[Array]
    optimizer_state: PyTree[Array]
    num_updates: UInt[Array, ""]

    learning_rate: Float[Array, ""]
    max_grad_norm: Float[Array, ""]
    discount: Float[Array, ""]
    alpha: Float[Array, ""]
    td_weight: Float[Array, ""]
    reward_scale: Float[Array, ""]
    epsilon: Float[Array, ""]

    observation_space: Space = eqx.field(static=True)
    action_space: Leaf = eqx.field(static=True)
    bins: Bins = eqx.field(static=True)
    precision: str = eqx.field(static=True)
    num_agents: int | None = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    n_step: int = eqx.field(static=True)
    sequence_length: int | None = eqx.field(static=True)
    burn_in: int = eqx.field(static=True)
    target_update_period: int = eqx.field(static=True)
    double: bool = eqx.field(static=True)

    @classmethod
    def create(
        cls,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        *,
        key: PRNGKeyArray,
        num_agents: int | None = None,
        state_size: int | None = None,
        network: str | eqx.Module = "auto",
        network_options: dict[str, Any] | None = None,
        value: Choice | AbstractValue = "scalar",
        bins: int | Sequence[int] = 2,
        mixer: Choice | AbstractMixer = "independent",
        exploration: Choice | AbstractExploration = "epsilon_greedy",
        optimizer: AnyOptimizer = "adam",
        precision: str = "float32",
        batch_size: int = 32,
        n_step: int = 1,
        sequence_length: int | None = None,
        burn_in: int = 0,
        target_update_period: int = 2000,
        double: bool = False,
        learning_rate: Scalar = 5e-5,
        max_grad_norm: Scalar = math.inf,
        discount: Scalar = 0.99,
        alpha: Scalar | None = None,
        td_weight: Scalar | None = None,
        reward_scale: Scalar = 1.0,
        epsilon: Scalar = 0.001,
    ) -> "OfflineQ":
        """Creates an untrained agent.

        **Arguments:**

        - `observation_space`, `action_space`, `num_agents`, `state_size`, `network`,
            `network_options`, `value`, `bins`, `mixer`, `exploration`, `optimizer`,
            `precision`: see
            `eqx_q.agents.assembly.make_parts`. The network may come from a trained PQN.
        - `key`: for the parameters.
        - `value`, `optimizer`: the class's `defaults` give the defaults of their `td_loss` and
            `eps`, and of `alpha` and `td_weight`.
        - `sequence_length`: by default 32 with memory, 1 in a team without memory.

        Every other argument is an attribute of the class.

        **Raises:** `UsageError` for invalid spaces, names, options or sizes.
        """
        sizes = {
            "batch_size": batch_size,
            "n_step": n_step,
            "target_update_period": target_update_period,
        }
        check_whole(**sizes)
        if not isinstance(double, bool):
            raise UsageError(f"double={double!r}: give true or false")
        traced: dict[str, Any] = {
            "learning_rate": learning_rate,
            "max_grad_norm": max_grad_norm,
            "discount": discount,
            "alpha": cls.defaults.alpha if alpha is None else alpha,
            "td_weight": cls.defaults.td_weight if td_weight is None else td_weight,
            "reward_scale": reward_scale,
            "epsilon": epsilon,
        }
        check_ranges(traced)
        parts = make_parts(
            observation_space,
            action_space,
            key=key,
            num_agents=num_agents,
            state_size=state_size,
            network=network,
            network_options=network_options,
            value=with_default(value, VALUES, td_loss=cls.defaults.td_loss),
            bins=bins,
            mixer=mixer,
            exploration=exploration,
            optimizer=with_default(optimizer, OPTIMIZERS, eps=cls.defaults.eps),
            precision=precision,
        )
        has_memory = bool(jax.tree.leaves(parts["network"].initial_memory(num_agents or 1)))
        if sequence_length is None and (has_memory or num_agents is not None):
            sequence_length = 32 if has_memory else 1
        if sequence_length is not None:
            check_whole(sequence_length=sequence_length)
        check_burn_in(burn_in, has_memory)
        parameters, rest = split_parameters((parts["network"], parts["mixer"]))
        target_network, target_mixer = eqx.combine(jax.tree.map(jnp.copy, parameters), rest)
        return cls(
            target_network=target_network,
            target_mixer=target_mixer,
            num_updates=jnp.zeros((), jnp.uint32),
            sequence_length=sequence_length,
            burn_in=burn_in,
            double=double,
            **parts,
            **sizes,
            **jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), traced),
        )

    @property
    def learns_from(self) -> Batches:
        """See `Agent`."""
        length = self.sequence_length
        if length is not None:
            length += self.burn_in + self.n_step - 1
        return Batches(self.batch_size, self.n_step, length, self.burn_in)

    @property
    def learnt(self) -> Count:
        """See `Agent`: the number of updates."""
        return Count.of(self.num_updates)

    def with_schedule(self, steps: Float[Array, ""]) -> "OfflineQ":
        """See `Agent`: this agent has no schedule."""
        return self

    def update(
        self, experience: Transitions | Rollout, *, key: PRNGKeyArray
    ) -> tuple["OfflineQ", dict[str, Array]]:
        """Takes a gradient step, and updates the target network every `target_update_period` steps.

        See `Agent`. The update is deterministic: `key` is not used.

        **Raises:** `UsageError` if an agent with memory, or a team, is given transitions.
        """
        experience = jax.tree.map(jnp.asarray, experience)
        if isinstance(experience, Rollout):
            loss, batch = self._sequence_loss, self._with_targets(experience)
        elif self.sequence_length is not None:
            raise UsageError(
                "this agent learns from sequences, not from single transitions: give it a Rollout"
            )
        else:
            loss, batch = self._transition_loss, (experience, self._items(experience))
        parameters, rest = split_parameters((self.network, self.mixer))
        parameters, optimizer_state, statistics, metrics = descend(
            loss,
            parameters,
            self.optimizer,
            self.optimizer_state,
            self.learning_rate,
            self.max_grad_norm,
            rest,
            *batch,
        )
        num_updates = self.num_updates + 1
        targets, target_rest = split_parameters((self.target_network, self.target_mixer))
        period = self.target_update_period
        targets: Any = optax.periodic_update(parameters, targets, num_updates, period)
        network, mixer = eqx.combine(parameters, rest)
        target_network, target_mixer = eqx.combine(targets, target_rest)
        agent = dataclasses.replace(
            self,
            network=network,
            mixer=mixer,
            target_network=target_network,
            target_mixer=target_mixer,
            statistics=statistics,
            optimizer_state=optimizer_state,
            num_updates=num_updates,
        )
        return agent, metrics

    @property
    def target_model(self) -> Model:
        """The model that computes targets."""
        return self.model.having(self.target_network, self.target_mixer)

    def _items(self, batch: Transitions) -> Items:
        """Regression items from transitions, each a team of one."""
        values = self.target_model.evaluate(self.statistics, batch.next_obs).values
        mask, chooser = batch.next_action_mask, None
        if self.double:
            own = self.model.evaluate(self.statistics, batch.next_obs).values
            chooser = self.model.q_values(own, mask)
        samples = self.target_model.samples(values, mask, chooser)
        reward, length, terminated = (
            x[:, None] for x in (batch.reward * self.reward_scale, batch.length, batch.terminated)
        )
        target = n_step(reward, length, terminated, samples, discount=self.discount)
        return Items(
            index=self.actions.encode(batch.action)[:, None],
            target=target[:, None],
            acting=jnp.ones((len(target), 1), bool),
            global_state=None,
        )

    def _with_targets(self, rollout: Rollout) -> tuple[Rollout, Items]:
        """Sequences with an axis of agents, and their regression items."""
        rollout = as_team(self, rollout, self.burn_in)
        if rollout.memory is None and self.has_memory:
            rollout = dataclasses.replace(
                rollout, memory=self.initial_memory(rollout.actions.shape[1])
            )
        model = self.target_model
        warmed = warmed_up(model, self.statistics, rollout, self.burn_in)
        mask, chooser = warmed.timesteps.action_mask, None
        if self.double:
            own = warmed_up(self.model, self.statistics, rollout, self.burn_in)
            chooser = self.model.q_values(unroll(self.model, self.statistics, own).values, mask)
        samples = model.samples(unroll(model, self.statistics, warmed).values, mask, chooser)
        steps = outcome(model, samples, warmed.timesteps, self.reward_scale)
        target = n_step_sequence(*steps, discount=self.discount, n=self.n_step)
        items = items_of(self.model, warmed, target)
        length = len(target) - (self.n_step - 1)
        if length < 1:
            raise UsageError(
                f"a sequence of {len(target)} steps after its burn-in is too short for "
                f"n_step={self.n_step}: give at least {self.n_step} steps"
            )
        return rollout, jax.tree.map(lambda x: x[:length], items)

    def _transition_loss(self, parameters, rest, batch: Transitions, items: Items):
        """The loss of transitions."""
        model = self.model.having(*eqx.combine(parameters, rest))
        output = model.evaluate(self.statistics, batch.obs, items.acting)
        values = output.values[:, None]
        mask = None if batch.action_mask is None else batch.action_mask[:, None]
        loss, metrics = self._loss(model, values, items, batch.weight, mask)
        metrics |= self._further_metrics(output.features, batch.action[:, None], items.acting)
        return loss, (output.statistics, metrics, 1.0)

    def _sequence_loss(self, parameters, rest, rollout: Rollout, items: Items):
        """The loss of sequences."""
        model = self.model.having(*eqx.combine(parameters, rest))
        warmed = warmed_up(model, self.statistics, rollout, self.burn_in)
        learnt = part(warmed, slice(len(items.acting)), warmed.memory)
        steps = dataclasses.replace(learnt, actions=learnt.actions[:-1])
        unrolled = unroll(model, self.statistics, steps, items.acting)
        mask = learnt.timesteps.action_mask
        loss, metrics = self._loss(model, unrolled.values, items, rollout.weight, mask)
        metrics |= self._further_metrics(unrolled.features, learnt.actions, items.acting)
        return loss, (unrolled.statistics, metrics, 1.0)

    def _loss(
        self,
        model: Model,
        values: Float[Array, "*steps B M A K"],
        items: Items,
        importance: Float[AnyArray, " B"] | None,
        action_mask: Bool[AnyArray, "*steps B M A"] | None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "..."]]]:
        """The mean loss of a batch, and metrics, including the absolute TD error of each item."""
        losses, real, of_predictions = fit(model, values, items)
        scale = 1.0 if importance is None else importance[:, None]
        weight, acting = _shares(real), _shares(items.acting)
        q_values = model.q_values(values, None)
        chosen = jnp.take_along_axis(q_values, items.index[..., None], axis=-1)[..., 0]
        if action_mask is not None:  # the action taken was legal, whatever the data's mask says
            done = jnp.arange(q_values.shape[-1]) == items.index[..., None]
            q_values = jnp.where(done, q_values, model.q_values(values, action_mask))
        gap = jnp.mean(jax.nn.logsumexp(q_values, axis=-1) - chosen, axis=-1)
        conservative = jnp.sum(jnp.where(items.acting, acting * scale * gap, 0.0))
        loss = self.td_weight * jnp.sum(weight * scale * losses) + self.alpha * conservative
        agreement = jnp.mean(jnp.argmax(q_values, axis=-1) == items.index, axis=-1)
        of_agents = {
            "q_max": jnp.mean(jnp.max(q_values, axis=-1), axis=-1),
            "conservative_gap": gap,
            "agreement": agreement,
        }
        metrics = {"loss": loss, **average(weight, of_predictions), **average(acting, of_agents)}
        error = jnp.where(real, of_predictions["td_error"], 0.0)
        axes = (*range(real.ndim - 2), real.ndim - 1)  # all but the axis of items
        metrics["priority"] = jnp.sum(error, axes) / jnp.maximum(jnp.sum(real, axes), 1)
        return loss, metrics

    def _further_metrics(
        self,
        features: Float[Array, "T R H"] | None,
        action: Shaped[AnyArray, "*steps_and_action"],
        acting: Bool[Array, "*steps M"],
    ) -> dict[str, Float[Array, ""]]:
        """Further metrics of a batch."""
        metrics = {}
        if features is not None:  # Sokar et al. 2023 (arXiv 2302.12902), with tau = 0
            metrics["dead_units"] = jnp.mean(jnp.all(features == 0, axis=(0, 1)))
        if self.actions.is_rounded:
            rounding = self.actions.rounding(action)
            metrics |= average(_shares(acting), {"action_rounding": rounding})
        return metrics


def _shares(counts: Bool[Array, "*steps P"]) -> Float[Array, "*steps P"]:
    """Weights for a mean over the true entries."""
    return counts / jnp.maximum(jnp.sum(counts, dtype=jnp.float32), 1)


class DQN(OfflineQ):
    """Q-learning with a target network (Mnih et al. 2015). See `OfflineQ`."""

    defaults: ClassVar[Defaults] = Defaults(td_loss="huber", eps=1.5e-4, alpha=0.0, td_weight=1.0)


class CQL(OfflineQ):
    """Conservative Q-learning (Kumar et al. 2020). See `OfflineQ`; the defaults are slimCQL's."""

    defaults: ClassVar[Defaults] = Defaults("squared", eps=3.125e-4, alpha=0.1, td_weight=1.0)


class BC(OfflineQ):
    """Behaviour cloning: `CQL` without the TD term. See `OfflineQ`.

    The loss is the cross entropy of the data's actions.
    """

    defaults: ClassVar[Defaults] = Defaults("huber", eps=1.5e-4, alpha=1.0, td_weight=0.0)
