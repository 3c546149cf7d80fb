"""PQN: parallelised Q-learning without replay buffer or target network.

Gallici et al., "Simplifying Deep Temporal Difference Learning", 2024 (arXiv 2407.04811).
"""

import dataclasses
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped, UInt

from ..errors import UsageError
from ..nets import AbstractQNetwork, as_network, make_network
from ..returns import q_lambda
from ..spaces import Box, Discrete, action_discrete, observation_box
from ..types import AnyArray, Decision, Memory, Rollout, Scalar
from .agent import Agent
from .exploration import epsilon_greedy, legal
from .schedules import linear


class Batch(eqx.Module):
    """Flat transitions with their targets; `real` says which of them happened."""

    obs: Shaped[Array, "B *obs"]
    action: Int[Array, " B"]
    target: Float[Array, " B"]
    real: Bool[Array, " B"]


class PQN(Agent):
    """Parallelised Q-learning with Q(λ) targets.

    Hyperparameters marked *traced* are array leaves: another value compiles nothing, and `vmap`
    runs over them. The others are static.

    **Attributes:**

    - `rollout_length`: steps per lane in one update.
    - `num_epochs`, `num_minibatches`: passes over a rollout, and gradient steps in a pass.
    - `learning_rate`, `learning_rate_end`: *traced*; of rectified Adam (Liu et al. 2020), falling
        linearly over the schedule.
    - `max_grad_norm`: *traced*; gradients are clipped by their global norm.
    - `discount`, `lambda_`: *traced*; γ and λ.
    - `epsilon_start`, `epsilon_end`, `epsilon_decay`: *traced*; ε falls linearly from start to end
        over the fraction `epsilon_decay` of the schedule.
    - `reward_scale`: *traced*; rewards are multiplied by it before targets are formed.
    - `schedule_steps`: *traced*; lane-steps of the schedules, infinite where unset: progress then
        stays at 0. `train` fills it in, unless it `schedule_is_given`.
    - `env_steps`: lane-steps learnt from so far.
    """

    network: AbstractQNetwork
    statistics: PyTree[Array]
    optimizer_state: PyTree[Array]
    env_steps: UInt[Array, ""]

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

    observation_space: Box = eqx.field(static=True)
    action_space: Discrete = eqx.field(static=True)
    rollout_length: int = eqx.field(static=True)
    num_epochs: int = eqx.field(static=True)
    num_minibatches: int = eqx.field(static=True)

    @classmethod
    def create(
        cls,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        *,
        key: PRNGKeyArray,
        network: str | eqx.Module = "auto",
        network_options: dict[str, Any] | None = None,
        rollout_length: int = 32,
        num_epochs: int = 2,
        num_minibatches: int = 32,
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
        """A fresh agent.

        **Arguments:**

        - `observation_space`, `action_space`: Gymnasium spaces of one lane: `Box`, `Discrete`.
        - `key`: for the network's parameters.
        - `network`: the name of a shipped network (`eqx_q.nets.make_network`), or an Equinox
            module: an `AbstractQNetwork`, or any that maps one observation to Q-values `[A]`.
        - `network_options`: options of the named network.
        - `learning_rate_end`: by default the learning rate stays constant.

        Every other argument is an attribute of the class.

        **Raises:** `UsageError` for spaces, names, options or sizes that cannot work.
        """
        observation_space = observation_box(observation_space)
        action_space = action_discrete(action_space)
        sizes = {
            "rollout_length": rollout_length,
            "num_epochs": num_epochs,
            "num_minibatches": num_minibatches,
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
        _check_sizes(sizes)
        _check_ranges(traced)
        if isinstance(network, str):
            network = make_network(
                network, observation_space, int(action_space.n), key=key, **(network_options or {})
            )
        elif network_options:
            raise UsageError("network_options are for named networks: drop them, or name a network")
        network = as_network(network)
        _check_network(network, observation_space, action_space)
        parameters = eqx.filter(network, eqx.is_inexact_array)
        return cls(
            network=network,
            statistics=network.initial_statistics(),
            optimizer_state=optax.radam(0.0).init(parameters),
            env_steps=jnp.zeros((), jnp.uint32),
            schedule_is_given=jnp.asarray(schedule_steps is not None),
            observation_space=observation_space,
            action_space=action_space,
            rollout_length=rollout_length,
            num_epochs=num_epochs,
            num_minibatches=num_minibatches,
            **jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), traced),
        )

    @property
    def num_members(self) -> None:
        """One agent, not a population."""
        return None

    @property
    def epsilon(self) -> Float[Array, ""]:
        """ε where the schedule stands."""
        progress = self.env_steps / self.schedule_steps
        return linear(self.epsilon_start, self.epsilon_end, progress, self.epsilon_decay)

    def initial_memory(self, num_envs: int) -> Memory:
        """See `Agent`."""
        return self.network.initial_memory(num_envs)

    def act(
        self,
        obs: Shaped[AnyArray, "..."],
        memory: Memory = None,
        *,
        first: Bool[AnyArray, "..."] | None = None,
        action_mask: Bool[AnyArray, "..."] | None = None,
        epsilon: Scalar | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Decision:
        """See `Agent`. Raises `UsageError` where `obs` does not fit the observation space."""
        shape = self.observation_space.shape
        if obs.shape[-len(shape) :] != shape or obs.ndim - len(shape) not in (0, 1):
            raise UsageError(
                f"obs has shape {tuple(obs.shape)}; the agent expects {shape}, "
                f"or (lanes, {', '.join(map(str, shape))})"
            )
        single = obs.ndim == len(shape)
        obs = jnp.asarray(obs, self.observation_space.dtype)
        start = None if first is None else jnp.asarray(first)
        mask = None if action_mask is None else jnp.asarray(action_mask)
        if single:
            obs, start, mask = jax.tree.map(lambda x: x[None], (obs, start, mask))
        sequence, start = jax.tree.map(lambda x: x[None], (obs, start))
        output = self.network(sequence, self.statistics, memory, first=start)
        q_values = legal(output.q_values[0], mask)
        if key is None:
            action = jnp.argmax(q_values, axis=-1)
        else:
            epsilon = self.epsilon if epsilon is None else epsilon
            action = epsilon_greedy(q_values, epsilon, key, mask)
        value = jnp.max(q_values, axis=-1)
        if single:
            action, value = action[0], value[0]
        return Decision(action, value, output.memory)

    def with_schedule(self, steps: Float[Array, ""]) -> "PQN":
        """See `Agent`."""
        steps = jnp.where(
            self.schedule_is_given, self.schedule_steps, jnp.asarray(steps, jnp.float32)
        )
        return dataclasses.replace(self, schedule_steps=steps)

    def measure(self, fn, rollout):
        """See `Agent`."""
        return fn(rollout)

    def update(
        self, rollout: Rollout, *, key: PRNGKeyArray
    ) -> tuple["PQN", dict[str, Float[Array, ""]]]:
        """One PQN update (Algorithm 1): Q(λ) targets, then epochs of minibatch regression on them.

        **Raises:** `UsageError` where `num_minibatches` does not divide the transitions.
        """
        transitions = self._transitions(jax.tree.map(jnp.asarray, rollout))
        indices, learning_rates = self._minibatches(rollout.actions.size, key)
        parameters, rest = eqx.partition(self.network, eqx.is_inexact_array)

        def gradient_step(carry, step):
            parameters, statistics, optimizer_state = carry
            index, learning_rate = step
            batch = jax.tree.map(lambda x: x[index], transitions)
            gradients, (statistics, metrics) = jax.grad(_loss, has_aux=True)(
                parameters, rest, statistics, batch
            )
            gradients, metrics["grad_norm"] = clip_by_global_norm(gradients, self.max_grad_norm)
            updates, optimizer_state = optax.radam(learning_rate).update(gradients, optimizer_state)
            parameters = optax.apply_updates(parameters, updates)
            return (parameters, statistics, optimizer_state), metrics

        (parameters, statistics, optimizer_state), metrics = jax.lax.scan(
            gradient_step,
            (parameters, self.statistics, self.optimizer_state),
            (indices, learning_rates),
        )
        agent = dataclasses.replace(
            self,
            network=eqx.combine(parameters, rest),
            statistics=statistics,
            optimizer_state=optimizer_state,
            env_steps=self.env_steps + jnp.uint32(rollout.actions.size),
        )
        metrics = jax.tree.map(jnp.mean, metrics)
        metrics |= {"epsilon": self.epsilon, "learning_rate": jnp.mean(learning_rates)}
        return agent, metrics

    def _transitions(self, rollout: Rollout) -> Batch:
        """All steps of all lanes in one row."""
        num_steps, num_lanes = rollout.actions.shape
        size = num_steps * num_lanes
        if size % self.num_minibatches:
            raise UsageError(
                f"num_minibatches={self.num_minibatches} does not divide the {size} transitions of "
                f"a rollout ({num_steps} steps x {num_lanes} lanes): change num_minibatches, "
                "num_envs or rollout_length"
            )
        columns = (rollout.timesteps.obs[:-1], rollout.actions, self.targets(rollout), rollout.real)
        return Batch(*(jnp.reshape(x, (size, *x.shape[2:])) for x in columns))

    def _minibatches(
        self, size: int, key: PRNGKeyArray
    ) -> tuple[Int[Array, "G B"], Float[Array, " G"]]:
        """For each of `G` gradient steps: which transitions to take, and the learning rate."""
        # A shuffle an epoch. One sort of random keys: `jax.random.permutation` sorts twice.
        shuffled = jnp.argsort(jax.random.bits(key, (self.num_epochs, size)), axis=-1)
        indices = shuffled.reshape(self.num_epochs * self.num_minibatches, -1)
        steps = self.env_steps + jnp.linspace(0, size, len(indices), endpoint=False)
        progress = steps / self.schedule_steps
        return indices, linear(self.learning_rate, self.learning_rate_end, progress)

    def targets(self, rollout: Rollout) -> Float[Array, "T N"]:
        """Q(λ) targets of a rollout; those of steps that are not `rollout.real` mean nothing."""
        timesteps = rollout.timesteps

        def values(steps: slice) -> Float[Array, "steps N"]:
            obs, mask = jax.tree.map(
                lambda x: jnp.asarray(x)[steps], (timesteps.obs, timesteps.action_mask)
            )
            q_values = self.network(obs, self.statistics).q_values
            return jnp.max(legal(q_values, mask), axis=-1)

        if rollout.values is None:
            next_values = values(slice(1, None))
        else:
            next_values = jnp.concatenate([rollout.values[1:], values(slice(-1, None))])
        return q_lambda(
            timesteps.reward[1:] * self.reward_scale,
            timesteps.terminated[1:],
            timesteps.truncated[1:],
            next_values,
            discount=self.discount,
            lambda_=self.lambda_,
        )


def clip_by_global_norm(
    gradients: PyTree[Array], max_norm: Scalar
) -> tuple[PyTree[Array], Float[Array, ""]]:
    """Scales gradients down to a global norm of `max_norm`, and tells the norm they had.

    Like `optax.clip_by_global_norm`, with dot products for the norm: on CPU XLA runs those in half
    the time of a sum of squares.
    """
    norm = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradients)))
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda x: scale * x, gradients), norm


def _loss(parameters, rest, statistics, batch: Batch):
    """Half the mean squared TD error over the transitions that happened."""
    network = eqx.combine(parameters, rest)
    output = network(batch.obs[None], statistics, batch_mask=batch.real[None])
    q_values = output.q_values[0]
    chosen = jnp.take_along_axis(q_values, batch.action[:, None], axis=-1)[:, 0]
    weight = batch.real / jnp.maximum(jnp.sum(batch.real), 1)
    td_error = jnp.where(batch.real, jax.lax.stop_gradient(batch.target) - chosen, 0.0)
    loss = 0.5 * jnp.sum(weight * td_error**2)
    metrics = {
        "loss": loss,
        "td_error": jnp.sum(weight * jnp.abs(td_error)),
        "q_value": jnp.sum(weight * chosen),
        "target": jnp.sum(jnp.where(batch.real, weight * batch.target, 0.0)),
    }
    return loss, (output.statistics, metrics)


# Where a hyperparameter makes sense.
_RANGES = {
    "learning_rate": (0.0, jnp.inf),
    "learning_rate_end": (0.0, jnp.inf),
    "max_grad_norm": (0.0, jnp.inf),
    "discount": (0.0, 1.0),
    "lambda_": (0.0, 1.0),
    "epsilon_start": (0.0, 1.0),
    "epsilon_end": (0.0, 1.0),
    "epsilon_decay": (0.0, jnp.inf),
    "schedule_steps": (1.0, jnp.inf),
}


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {size!r}")


def _check_ranges(traced: dict[str, Scalar]) -> None:
    """Checks what is known before tracing: under `vmap` values are not."""
    for name, (low, high) in _RANGES.items():
        value = traced[name]
        if not isinstance(value, Tracer) and not low <= float(value) <= high:
            raise UsageError(f"{name}={value} makes no sense: choose it from {low:g} to {high:g}")


def _check_network(network, observation_space: Box, action_space: Discrete) -> None:
    """Refuses a network that does not map one observation to one Q-value per action."""
    obs = jax.ShapeDtypeStruct((1, 1, *observation_space.shape), observation_space.dtype)
    try:
        output = eqx.filter_eval_shape(
            lambda obs: network(obs, network.initial_statistics(), network.initial_memory(1)), obs
        )
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the network cannot take observations of shape {observation_space.shape}: {error}"
        ) from error
    expected = (1, 1, int(action_space.n))
    if output.q_values.shape != expected:
        raise UsageError(
            f"the network gives Q-values of shape {output.q_values.shape[2:]}, but the environment "
            f"has {expected[-1]} actions: its output size must be {expected[-1]}"
        )
