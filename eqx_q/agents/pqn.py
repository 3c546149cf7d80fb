"""PQN: parallelised Q-learning without replay buffer or target network.

Gallici et al., "Simplifying Deep Temporal Difference Learning", 2024 (arXiv 2407.04811). With
memory in the network it is PQN-RNN, with a joint mixer PQN-VDN or PQN-QMIX.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ..errors import UsageError, check_whole
from ..nets import AbstractQNetwork
from ..nets.parameters import split_parameters
from ..returns import q_lambda
from ..spaces import Leaf, Space
from ..types import Count, Observation, Rollout, Scalar, Transitions
from . import minibatches
from .acting import QAgent
from .actions import Bins
from .agent import Rollouts
from .assembly import Choice, check_burn_in, make_parts
from .compact import layout
from .exploration import AbstractExploration
from .gradients import averaged_scan, descend
from .hyperparameters import check_ranges
from .mixers import AbstractMixer
from .model import Model
from .optimizers import AnyOptimizer, Optimizer
from .regression import Items, acting_in, average, fit, items_of, outcome
from .schedules import linear
from .sequences import as_team, unroll, warmed_up
from .values import AbstractValue


class PQN(QAgent):
    """Parallelised Q-learning with Q(λ) targets.

    Without memory it learns from single transitions, with targets computed once per update. With
    memory it learns from whole lanes, unrolled from the memory at their start, with targets
    recomputed in every gradient step (PQN-RNN). In a team the mixer's values are learnt (PQN-VDN);
    a single agent is a team of one.

    Hyperparameters marked *traced* are array leaves: changing them does not recompile, and they can
    differ under `vmap`. The others are static.

    **Attributes:**

    - `network`, `mixer`, `value`, `exploration`, `optimizer`, `bins`, `precision`: its parts;
        see `create`.
    - `rollout_length`: steps per lane in one update.
    - `burn_in`: steps before those, to warm up memory with the current parameters: nothing is
        learnt from them, and no gradient flows through them (R2D2, Kapturowski et al. 2019, §3).
    - `num_epochs`, `num_minibatches`: passes over a rollout, and gradient steps per pass.
    - `lane_groups`: number of equal groups of neighbouring lanes. Every minibatch takes equally
        from each, so that devices that share the groups need no data of each other: see
        `eqx_q.sharding`.
    - `learning_rate`, `learning_rate_end`: *traced*; the rate changes linearly over the schedule.
    - `max_grad_norm`: *traced*; gradients are clipped by their global norm.
    - `discount`, `lambda_`: *traced*; γ and λ.
    - `epsilon_start`, `epsilon_end`, `epsilon_decay`: *traced*; ε falls linearly from start to end
        over the fraction `epsilon_decay` of the schedule.
    - `reward_scale`: *traced*; rewards are multiplied by it before targets are formed.
    - `schedule_steps`: *traced*; lane-steps of the schedules; infinite if unset, so that progress
        stays at 0. `train` fills it in, unless `schedule_is_given`.
    - `env_steps`: lane-steps learnt from so far.
    """

    network: AbstractQNetwork
    mixer: AbstractMixer
    value: AbstractValue
    exploration: AbstractExploration
    optimizer: Optimizer
    statistics: PyTree[Array]
    optimizer_state: PyTree[Array]
    env_steps: Count

    learning_rate: Float[Array, ""]
    learning_rate_end: Float[Array, ""]
    max_grad_norm: Float[Array, ""]
    discount: Float[Array, ""]
    lambda_: Float[Array, ""]
    epsilon_start: Float[Array, ""]
    epsilon_end: Float[Array, ""]
    epsilon_decay: Float[Array, ""]
    reward_scale: Float[Array, ""]
    schedule_steps: Float[Array, ""]
    schedule_is_given: Bool[Array, ""]

    observation_space: Space = eqx.field(static=True)
    action_space: Leaf = eqx.field(static=True)
    bins: Bins = eqx.field(static=True)
    precision: str = eqx.field(static=True)
    num_agents: int | None = eqx.field(static=True)
    rollout_length: int = eqx.field(static=True)
    burn_in: int = eqx.field(static=True)
    num_epochs: int = eqx.field(static=True)
    num_minibatches: int = eqx.field(static=True)
    lane_groups: int = eqx.field(static=True)

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
        optimizer: AnyOptimizer = "radam",
        precision: str = "float32",
        rollout_length: int = 32,
        burn_in: int = 0,
        num_epochs: int = 2,
        num_minibatches: int = 32,
        lane_groups: int = 1,
        learning_rate: Scalar = 5e-4,
        learning_rate_end: Scalar | None = None,
        max_grad_norm: Scalar = 10.0,
        discount: Scalar = 0.99,
        lambda_: Scalar = 0.65,
        epsilon_start: Scalar = 1.0,
        epsilon_end: Scalar = 0.05,
        epsilon_decay: Scalar = 0.1,
        reward_scale: Scalar = 1.0,
        schedule_steps: Scalar | None = None,
    ) -> "PQN":
        """Creates an untrained agent.

        **Arguments:**

        - `observation_space`, `action_space`, `num_agents`, `state_size`, `network`,
            `network_options`, `value`, `bins`, `mixer`, `exploration`, `optimizer`,
            `precision`: see
            `eqx_q.agents.assembly.make_parts`.
        - `key`: for the parameters.
        - `learning_rate_end`: by default the learning rate stays constant.

        Every other argument is an attribute of the class.

        **Raises:** `UsageError` for invalid spaces, names, options or sizes.
        """
        sizes = {
            "rollout_length": rollout_length,
            "num_epochs": num_epochs,
            "num_minibatches": num_minibatches,
            "lane_groups": lane_groups,
        }
        traced: dict[str, Any] = {
            "learning_rate": learning_rate,
            "learning_rate_end": learning_rate if learning_rate_end is None else learning_rate_end,
            "max_grad_norm": max_grad_norm,
            "discount": discount,
            "lambda_": lambda_,
            "epsilon_start": epsilon_start,
            "epsilon_end": epsilon_end,
            "epsilon_decay": epsilon_decay,
            "reward_scale": reward_scale,
            "schedule_steps": jnp.inf if schedule_steps is None else schedule_steps,
        }
        check_whole(**sizes)
        check_ranges(traced)
        parts = make_parts(
            observation_space,
            action_space,
            key=key,
            num_agents=num_agents,
            state_size=state_size,
            network=network,
            network_options=network_options,
            value=value,
            bins=bins,
            mixer=mixer,
            exploration=exploration,
            optimizer=optimizer,
            precision=precision,
        )
        agent = cls(
            env_steps=Count.of(0),
            schedule_is_given=jnp.asarray(schedule_steps is not None),
            burn_in=burn_in,
            **parts,
            **sizes,
            **jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), traced),
        )
        check_burn_in(burn_in, agent.has_memory)
        if burn_in > rollout_length:
            raise UsageError(
                f"burn_in={burn_in} exceeds rollout_length={rollout_length}, but its steps come "
                "from the previous rollout: lower burn_in"
            )
        return agent

    @property
    def learns_from(self) -> Rollouts:
        """See `Agent`."""
        return Rollouts(
            self.rollout_length,
            self.burn_in,
            self.lane_groups,
            self.num_minibatches,
            whole_lanes=self.has_memory,
        )

    @property
    def learnt(self) -> Count:
        """See `Agent`: the number of lane-steps."""
        return self.env_steps

    @property
    def epsilon(self) -> Float[Array, ""]:
        """The current ε of the schedule."""
        progress = self.env_steps.rounded() / self.schedule_steps
        return linear(self.epsilon_start, self.epsilon_end, progress, self.epsilon_decay)

    def with_schedule(self, steps: Float[Array, ""]) -> "PQN":
        """See `Agent`."""
        steps = jnp.where(
            self.schedule_is_given, self.schedule_steps, jnp.asarray(steps, jnp.float32)
        )
        return dataclasses.replace(self, schedule_steps=steps)

    def update(
        self, experience: Rollout | Transitions, *, key: PRNGKeyArray
    ) -> tuple["PQN", dict[str, Float[Array, ""]]]:
        """One PQN update (Algorithm 1): Q(λ) targets, then epochs of minibatch regression on them.

        **Raises:** `UsageError` if `lane_groups` does not divide the lanes, or `num_minibatches`
        the transitions of a group (with memory: its lanes), or if `experience` is not a rollout of
        this agent.
        """
        if not isinstance(experience, Rollout):
            raise UsageError("this agent learns from rollouts: give it a Rollout")
        rollout = as_team(self, jax.tree.map(jnp.asarray, experience), self.burn_in)
        num_steps, num_lanes = rollout.actions.shape[:2]
        length = num_steps - self.burn_in
        num_items = dataclasses.replace(self.learns_from, length=length).num_items(num_lanes)
        if self.has_memory:
            self._check_rollout_memory(rollout)
            loss, batch_of = self._sequence_loss, partial(minibatches.take_lanes, rollout)
        else:
            loss = self._transition_loss
            batch_of = partial(minibatches.take, self._transitions(rollout))
        size = length * num_lanes
        indices, learning_rates = self._minibatches(num_items, size, key)
        parameters, rest = split_parameters((self.network, self.mixer))
        compact = layout(self.optimizer, parameters)

        def gradient_step(carry, step):
            parameters, statistics, optimizer_state = carry
            index, learning_rate = step
            parameters, optimizer_state, statistics, metrics = descend(
                loss,
                parameters,
                self.optimizer,
                optimizer_state,
                learning_rate,
                self.max_grad_norm,
                rest,
                statistics,
                batch_of(index),
                layout=compact,
            )
            return (parameters, statistics, optimizer_state), metrics

        (parameters, statistics, optimizer_state), metrics = averaged_scan(
            gradient_step,
            (compact.pack(parameters), self.statistics, compact.pack(self.optimizer_state)),
            (indices, learning_rates),
        )
        parameters, optimizer_state = compact.unpack((parameters, optimizer_state))
        network, mixer = eqx.combine(parameters, rest)
        agent = dataclasses.replace(
            self,
            network=network,
            mixer=mixer,
            statistics=statistics,
            optimizer_state=optimizer_state,
            env_steps=self.env_steps.plus(size),
        )
        metrics |= {"epsilon": self.epsilon, "learning_rate": jnp.mean(learning_rates)}
        return agent, metrics

    def _check_rollout_memory(self, rollout: Rollout) -> None:
        if rollout.memory is None:
            raise UsageError(
                "this agent has memory but the rollout has none: give Rollout(timesteps, actions, "
                "memory), with the memory before its first timestep"
            )
        num_lanes = rollout.actions.shape[1]
        self._checked_memory(rollout.memory, num_lanes * (self.num_agents or 1))

    def _minibatches(
        self, num_items: int, num_steps: int, key: PRNGKeyArray
    ) -> tuple[Int[Array, "steps G B"], Float[Array, " steps"]]:
        """Indices of each gradient step's items within each lane group, and its learning rate."""
        indices = minibatches.shuffled(
            key,
            num_items // self.lane_groups,
            self.num_epochs,
            self.num_minibatches,
            self.lane_groups,
        )
        within = jnp.linspace(0, num_steps, len(indices), endpoint=False)
        steps = self.env_steps.rounded() + within
        progress = steps / self.schedule_steps
        return indices, linear(self.learning_rate, self.learning_rate_end, progress)

    def _transitions(self, rollout: Rollout) -> tuple[Observation, Items]:
        """Flattens all steps of all lanes, lane group by lane group, with their targets."""
        obs = jax.tree.map(lambda x: x[:-1], rollout.timesteps.obs)
        items = items_of(self.model, rollout, self._targets(rollout))
        row = partial(minibatches.as_row, num_groups=self.lane_groups)
        return jax.tree.map(row, (obs, items))

    def _transition_loss(self, parameters, rest, statistics, batch: tuple[Observation, Items]):
        """The loss of flat transitions with given targets."""
        model = self.model.having(*eqx.combine(parameters, rest))
        obs, items = batch
        output = model.evaluate(statistics, obs, items.acting)
        loss, *told = self._loss(model, output.values, items)
        return loss, (output.statistics, *told)

    def _sequence_loss(self, parameters, rest, statistics, rollout: Rollout):
        """The loss of whole lanes, with targets from the same forward pass."""
        model = self.model.having(*eqx.combine(parameters, rest))

        def learn_from(rollout: Rollout):
            rollout = warmed_up(model, statistics, rollout, self.burn_in)
            acting = acting_in(rollout)
            ahead = jnp.zeros_like(acting[:1])  # the last observation only serves targets
            unrolled = unroll(model, statistics, rollout, jnp.concatenate([acting, ahead]))
            values, action_mask = unrolled.values, rollout.timesteps.action_mask
            samples = model.samples(jax.lax.stop_gradient(values), action_mask)
            target = jax.lax.stop_gradient(self._targets_of(samples, rollout, model))
            return (values[:-1], items_of(model, rollout, target)), unrolled.statistics

        if self.lane_groups == 1 or jax.tree.leaves(statistics):
            learnt_from, statistics = learn_from(rollout)
        else:
            # The same, without flattening time and the lanes of several groups into one axis:
            # devices that share the groups would have to exchange that data.
            learnt_from, _ = jax.vmap(learn_from)(minibatches.apart(rollout, self.lane_groups))
        loss, *told = self._loss(model, *learnt_from)
        return loss, (statistics, *told)

    def _loss(
        self, model: Model, values: Float[Array, "*steps M A K"], items: Items
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Scalar]:
        """The mean loss over all transitions, real or not, metrics, and a scale to apply to both.

        The scale corrects that. So the gradient does not wait until the real ones are counted,
        which saves a kernel, and devices that share lane groups exchange both together.
        """
        losses, real, metrics = fit(model, values, items)
        weight = real / real.size
        loss = jnp.sum(weight * losses)
        scale = real.size / jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1)
        return loss, {"loss": loss, **average(weight, metrics)}, scale

    def _targets(self, rollout: Rollout) -> Float[Array, "T N P L"]:
        """Targets of transitions, from the values that acting computed if those suffice."""
        model, timesteps = self.model, rollout.timesteps
        if rollout.values is None or self.value.num_samples > 1:
            samples = model.samples(
                unroll(model, self.statistics, rollout).values, timesteps.action_mask
            )
            return self._targets_of(samples, rollout, model)
        last = jax.tree.map(lambda x: x[-1:], timesteps)
        last_values = model.unroll(self.statistics, last).values
        last_samples = model.samples(last_values, last.action_mask)
        samples = jnp.concatenate([rollout.values[..., None], last_samples])
        return self._targets_of(samples, rollout, model)

    def _targets_of(
        self, samples: Float[Array, "steps N M L"], rollout: Rollout, model: Model
    ) -> Float[Array, "T N P L"]:
        """Targets, given samples at all timesteps."""
        steps = outcome(model, samples, rollout.timesteps, self.reward_scale)
        return q_lambda(*steps, discount=self.discount, lambda_=self.lambda_)
