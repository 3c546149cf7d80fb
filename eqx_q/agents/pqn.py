"""PQN: parallelised Q-learning without replay buffer or target network.

Gallici et al., "Simplifying Deep Temporal Difference Learning", 2024 (arXiv 2407.04811). With a
network that has memory it is PQN-RNN, with a mixer PQN-VDN.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped, UInt

from ..errors import UsageError
from ..nets import AbstractQNetwork, NetworkOutput, as_network, make_network
from ..returns import q_lambda
from ..spaces import Box, Discrete, of_actions, of_observations
from ..types import AnyArray, Decision, Memory, Rollout, Scalar, TimeStep
from .acting import choose, lanes_of
from .agent import Agent, Rollouts
from .checks import check_network, check_ranges, check_sizes
from .exploration import legal
from .gradients import clip_by_global_norm
from .mixers import AbstractMixer, make_mixer
from .schedules import linear


class Batch(eqx.Module):
    """Flat transitions of `M` agents, with `K` targets (see `mixers`).

    `acting` says whose transition happened: neither into a reset, nor of an agent that was dead.
    """

    obs: Shaped[Array, "B M *obs"]
    action: Int[Array, "B M"]
    target: Float[Array, "B K"]
    acting: Bool[Array, "B M"]


class PQNMemory(eqx.Module):
    """What an agent remembers, a row per lane and agent.

    That is the network's memory, and the last action: -1 where there was none.
    """

    network: PyTree[Array]
    last_action: Int[Array, " B"]


class PQN(Agent):
    """Parallelised Q-learning with Q(λ) targets.

    Without memory it learns from single transitions, with targets computed once an update. A
    network with memory learns from whole lanes, unrolled from the memory at their start, with
    targets computed anew in every gradient step (PQN-RNN). In a team the mixer's values are
    learnt (PQN-VDN); an agent on its own is a team of one.

    Hyperparameters marked *traced* are array leaves: another value compiles nothing, and `vmap`
    runs over them. The others are static.

    **Attributes:**

    - `rollout_length`: steps per lane in one update.
    - `burn_in`: steps before those, to warm up memory with today's parameters: nothing is learnt
        from them, and no gradient flows through them (R2D2, Kapturowski et al. 2019, §3).
    - `num_epochs`, `num_minibatches`: passes over a rollout, and gradient steps in a pass.
    - `lane_groups`: every minibatch takes as much from each of so many equal groups of neighbouring
        lanes. Devices that share the groups then have all that they learn from: see
        `eqx_q.sharding`.
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
    mixer: AbstractMixer
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
        network: str | eqx.Module = "auto",
        network_options: dict[str, Any] | None = None,
        mixer: str | AbstractMixer = "independent",
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
        """A fresh agent.

        **Arguments:**

        - `observation_space`, `action_space`: Gymnasium spaces of one lane, in a team of one agent
            of it: `Box`, `Discrete`.
        - `key`: for the network's parameters.
        - `network`: the name of a shipped network (`eqx_q.nets.make_network`), or an Equinox
            module: an `AbstractQNetwork`, or any that maps one observation to Q-values `[A]`.
        - `num_agents`: `M` of a team, else `None`.
        - `network_options`: options of the named network.
        - `mixer`: `"vdn"`, `"independent"` or an `AbstractMixer`; without a team the first two are
            the same.
        - `learning_rate_end`: by default the learning rate stays constant.

        Every other argument is an attribute of the class.

        **Raises:** `UsageError` for spaces, names, options or sizes that cannot work.
        """
        observation_space = of_observations(observation_space)
        action_space = of_actions(action_space)
        sizes = {
            "rollout_length": rollout_length,
            "num_epochs": num_epochs,
            "num_minibatches": num_minibatches,
            "lane_groups": lane_groups,
            "num_agents": 1 if num_agents is None else num_agents,
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
        check_sizes(sizes)
        check_ranges(traced)
        if "num_agents" in (network_options or {}):
            raise UsageError("num_agents is no option of the network: give it to create itself")
        if isinstance(network, str):
            network = make_network(
                network,
                observation_space,
                int(action_space.n),
                key=key,
                num_agents=num_agents,
                **(network_options or {}),
            )
        elif network_options:
            raise UsageError("network_options are for named networks: drop them, or name a network")
        network = as_network(network)
        check_network(network, observation_space, action_space, num_agents or 1)
        if burn_in and network.initial_memory(num_agents or 1) is None:
            raise UsageError(
                f"burn_in={burn_in} warms up memory, and this network has none: set it to 0, or "
                "choose a memory (network_options.memory)"
            )
        if not isinstance(burn_in, int) or not 0 <= burn_in <= rollout_length:
            raise UsageError(
                f"burn_in={burn_in} must be a whole number from 0 to rollout_length="
                f"{rollout_length}: it comes from the rollout before"
            )
        parameters = eqx.filter(network, eqx.is_inexact_array)
        return cls(
            network=network,
            mixer=make_mixer(mixer) if isinstance(mixer, str) else mixer,
            statistics=network.initial_statistics(),
            optimizer_state=optax.radam(0.0).init(parameters),
            env_steps=jnp.zeros((), jnp.uint32),
            schedule_is_given=jnp.asarray(schedule_steps is not None),
            observation_space=observation_space,
            action_space=action_space,
            num_agents=num_agents,
            rollout_length=rollout_length,
            burn_in=burn_in,
            num_epochs=num_epochs,
            num_minibatches=num_minibatches,
            lane_groups=lane_groups,
            **jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), traced),
        )

    @property
    def num_members(self) -> None:
        """One agent, not a population."""
        return None

    @property
    def learns_from(self) -> Rollouts:
        """Rollouts of `rollout_length` steps."""
        return Rollouts(self.rollout_length, self.burn_in, self.lane_groups)

    @property
    def learnt(self) -> UInt[Array, "*S"]:
        """Lane-steps so far."""
        return self.env_steps

    @property
    def epsilon(self) -> Float[Array, ""]:
        """ε where the schedule stands."""
        progress = self.env_steps / self.schedule_steps
        return linear(self.epsilon_start, self.epsilon_end, progress, self.epsilon_decay)

    @property
    def has_memory(self) -> bool:
        """Whether the network has memory."""
        return self.network.initial_memory(self.num_agents or 1) is not None

    def initial_memory(self, num_envs: int) -> PQNMemory | None:
        """See `Agent`."""
        lanes = num_envs * (self.num_agents or 1)
        memory = self.network.initial_memory(lanes)
        return None if memory is None else PQNMemory(memory, jnp.full(lanes, -1, jnp.int32))

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
        lanes = lanes_of(obs.shape, self.observation_space, self.num_agents)
        if memory is None:
            memory = self.initial_memory(math.prod(lanes) // (self.num_agents or 1))
        self._check_memory(memory, math.prod(lanes))

        def rows(x):  # one step of all lanes and agents, as a network takes it
            if x is not None and jnp.shape(x) != lanes:
                x = self._of_each_agent(x)
            return None if x is None else jnp.reshape(jnp.asarray(x), (1, -1))

        obs = jnp.asarray(obs, self.observation_space.dtype)
        output = _compute(
            self.network,
            obs.reshape(1, -1, *self.observation_space.shape),
            self.statistics,
            memory,
            first=rows(first),
            last_reward=rows(reward),
        )
        q_values = output.q_values.reshape(*lanes, -1)
        epsilon = self.epsilon if epsilon is None else epsilon
        decision = choose(q_values, action_mask, epsilon, key)
        if memory is None:
            return decision
        memory = PQNMemory(output.memory, decision.action.reshape(-1))
        return Decision(decision.action, decision.value, memory)

    def _of_each_agent(self, x: Shaped[AnyArray, "*lanes"]) -> Shaped[Array, "*lanes_and_agents"]:
        """What a whole lane has, for each of its agents."""
        x = jnp.asarray(x)
        if self.num_agents is None:
            return x
        return jnp.broadcast_to(x[..., None], (*x.shape, self.num_agents))

    def with_schedule(self, steps: Float[Array, ""]) -> "PQN":
        """See `Agent`."""
        steps = jnp.where(
            self.schedule_is_given, self.schedule_steps, jnp.asarray(steps, jnp.float32)
        )
        return dataclasses.replace(self, schedule_steps=steps)

    def update(
        self, rollout: Rollout, *, key: PRNGKeyArray
    ) -> tuple["PQN", dict[str, Float[Array, ""]]]:
        """One PQN update (Algorithm 1): Q(λ) targets, then epochs of minibatch regression on them.

        **Raises:** `UsageError` where `lane_groups` does not divide the lanes, or `num_minibatches`
        the transitions of a group (with memory: its lanes), or where an agent with memory is given
        a rollout without.
        """
        rollout = self._as_team(jax.tree.map(jnp.asarray, rollout))
        num_steps, num_lanes, _ = rollout.actions.shape
        size = (num_steps - self.burn_in) * num_lanes
        if num_lanes % self.lane_groups:
            raise UsageError(
                f"lane_groups={self.lane_groups} does not divide the {num_lanes} lanes of a "
                "rollout: change lane_groups or num_envs"
            )
        if self.has_memory:
            num_items, loss, batch_of = num_lanes, self._sequence_loss, partial(_lanes_of, rollout)
        else:
            transitions = self._transitions(rollout)
            num_items, loss = size, self._transition_loss
            batch_of = lambda index: jax.tree.map(partial(_take, index=index), transitions)  # noqa: E731
        indices, learning_rates = self._minibatches(num_items, size, key)
        parameters, rest = eqx.partition(self.network, eqx.is_inexact_array)

        def gradient_step(carry, step):
            parameters, statistics, optimizer_state = carry
            index, learning_rate = step
            gradients, (statistics, metrics, scale) = jax.grad(loss, has_aux=True)(
                parameters, rest, statistics, batch_of(index)
            )
            if scale is not None:
                gradients, metrics = jax.tree.map(lambda x: scale * x, (gradients, metrics))
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
            env_steps=self.env_steps + jnp.uint32(size),
        )
        metrics = jax.tree.map(jnp.mean, metrics)
        metrics |= {"epsilon": self.epsilon, "learning_rate": jnp.mean(learning_rates)}
        return agent, metrics

    def targets(self, rollout: Rollout) -> Float[Array, "T N *M"]:
        """Q(λ) targets of a rollout; those of steps that are not `rollout.real` mean nothing.

        One a lane, or one for each agent of a team that learns independently.
        """
        targets = self._targets(self._as_team(jax.tree.map(jnp.asarray, rollout)))
        return targets[..., 0] if targets.shape[-1] == 1 else targets

    def _as_team(self, rollout: Rollout) -> Rollout:
        """An agent on its own as a team of one: with an agent axis after the lanes'.

        Refuses what is no rollout of this agent.
        """
        num_steps, *lanes = rollout.actions.shape
        team = [] if self.num_agents is None else [self.num_agents]
        if not lanes or lanes[1:] != team:
            expected = ", ".join(["steps", "lanes", *map(str, team)])
            raise UsageError(f"actions have shape {rollout.actions.shape}, not ({expected})")
        seen = (num_steps + 1, *lanes)
        obs_shape = self.observation_space.shape
        self._check_shape("timesteps.obs", rollout.timesteps.obs, (*seen, *obs_shape))
        num_actions = int(self.action_space.n)
        self._check_shape("action_mask", rollout.timesteps.action_mask, (*seen, num_actions))
        self._check_shape("agent_mask", rollout.timesteps.agent_mask, seen)
        if num_steps <= self.burn_in:
            raise UsageError(
                f"a rollout of {num_steps} steps leaves nothing after burn_in={self.burn_in}: give "
                "the last steps of the rollout before, then new ones"
            )
        if self.has_memory and rollout.memory is None:
            raise UsageError(
                "this agent has memory: give the rollout that before its first timestep, "
                "Rollout(timesteps, actions, memory)"
            )
        self._check_memory(rollout.memory, math.prod(lanes))
        if self.num_agents is not None:
            return rollout

        def parts(x: Rollout):
            return x.timesteps.obs, x.timesteps.action_mask, x.actions, x.values

        widened = jax.tree.map(lambda x: x[:, :, None], parts(rollout))
        return eqx.tree_at(parts, rollout, widened, is_leaf=lambda x: x is None)

    def _check_shape(self, name: str, x: AnyArray | None, expected: tuple[int, ...]) -> None:
        if x is not None and x.shape != expected:
            raise UsageError(
                f"{name} has shape {x.shape}, not {expected}: axes are steps (a rollout has one "
                "timestep more than actions), lanes, agents of a team, then one's own"
            )

    def _check_memory(self, memory: Memory, num_rows: int) -> None:
        if not self.has_memory:
            return
        if not isinstance(memory, PQNMemory) or memory.last_action.shape != (num_rows,):
            raise UsageError(
                f"this is no memory of {num_rows // (self.num_agents or 1)} lanes of this agent: "
                "give what agent.initial_memory or the decision before gave"
            )

    def _minibatches(
        self, num_items: int, num_steps: int, key: PRNGKeyArray
    ) -> tuple[Int[Array, "steps G B"], Float[Array, " steps"]]:
        """For each gradient step: which items to take of each lane group, and the learning rate."""
        num_items //= self.lane_groups
        if num_items % self.num_minibatches:
            items = "lanes" if self.has_memory else "transitions"
            or_length = "" if self.has_memory else " or rollout_length"
            group = "rollout" if self.lane_groups == 1 else "lane group"
            raise UsageError(
                f"num_minibatches={self.num_minibatches} does not divide the {num_items} {items} "
                f"of a {group}: change num_minibatches, num_envs{or_length}"
            )
        # A shuffle an epoch. One sort of random keys: `jax.random.permutation` sorts twice.
        shape = (self.num_epochs, self.lane_groups, num_items)
        shuffled = jnp.argsort(jax.random.bits(key, shape), axis=-1)
        parts = shuffled.reshape(*shape[:2], self.num_minibatches, -1)
        indices = jnp.moveaxis(parts, 1, 2).reshape(-1, self.lane_groups, parts.shape[-1])
        steps = self.env_steps + jnp.linspace(0, num_steps, len(indices), endpoint=False)
        progress = steps / self.schedule_steps
        return indices, linear(self.learning_rate, self.learning_rate_end, progress)

    def _transitions(self, rollout: Rollout) -> Batch:
        """All steps of all lanes in one row, lane group by lane group, with their targets."""
        columns = (
            rollout.timesteps.obs[:-1],
            rollout.actions,
            self._targets(rollout),
            _acting(rollout),
        )

        def row(x: Shaped[AnyArray, "T N ..."]) -> Shaped[Array, "TN ..."]:
            groups = jnp.reshape(x, (x.shape[0], self.lane_groups, -1, *x.shape[2:]))
            return jnp.moveaxis(groups, 1, 0).reshape(-1, *x.shape[2:])

        return Batch(*(row(x) for x in columns))

    def _transition_loss(self, parameters, rest, statistics, batch: Batch):
        """The loss of flat transitions, whose targets are there."""
        network = eqx.combine(parameters, rest)
        obs = batch.obs.reshape(1, -1, *batch.obs.shape[2:])
        output = network(obs, statistics, batch_mask=batch.acting.reshape(1, -1))
        q_values = output.q_values.reshape(*batch.action.shape, -1)
        loss, *told = self._loss(q_values, batch.action, batch.target, batch.acting)
        return loss, (output.statistics, *told)

    def _sequence_loss(self, parameters, rest, statistics, rollout: Rollout):
        """The loss of whole lanes; their targets come from the same pass over them."""
        network = eqx.combine(parameters, rest)

        def unroll(rollout: Rollout):
            rollout = self._warmed_up(network, statistics, rollout)
            acting = _acting(rollout)
            ahead = jnp.zeros_like(acting[:1])  # the last observation is only looked ahead to
            q_values, _, after = self._unroll(
                network, statistics, rollout, batch_mask=jnp.concatenate([acting, ahead])
            )
            values = self._values(jax.lax.stop_gradient(q_values), rollout.timesteps)
            targets = self._targets_of(values, rollout.timesteps)
            return (q_values[:-1], rollout.actions, targets, acting), after

        if self.lane_groups == 1 or jax.tree.leaves(statistics):
            learnt_from, statistics = unroll(rollout)
        else:
            # The same, and no step makes one axis of the time and the lanes of several groups:
            # devices that share the groups would have to exchange all that is on it.
            learnt_from, _ = jax.vmap(unroll)(_apart(rollout, self.lane_groups))
        loss, *told = self._loss(*learnt_from)
        return loss, (statistics, *told)

    def _loss(
        self,
        q_values: Float[Array, "*steps M A"],
        action: Int[AnyArray, "*steps M"],
        target: Float[Array, "*steps K"],
        acting: Bool[Array, "*steps M"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Float[Array, ""] | None]:
        """Half the mean squared TD error over what happened, metrics, and what both still lack.

        Of several lane groups the mean is over all transitions, happened or not, and that is the
        factor to the right one: devices that share the groups can then exchange gradients and
        count at once, where a count that is needed first would have them wait twice.
        """
        chosen = jnp.take_along_axis(q_values, jnp.asarray(action)[..., None], axis=-1)[..., 0]
        chosen = self.mixer.mix(jnp.where(acting, chosen, 0.0))
        real = self.mixer.acts(acting)
        count, scale = jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1), None
        if self.lane_groups > 1:
            count, scale = real.size, real.size / count
        weight = real / count
        td_error = jnp.where(real, target - chosen, 0.0)
        loss = 0.5 * jnp.sum(weight * td_error**2)
        metrics = {
            "loss": loss,
            "td_error": jnp.sum(weight * jnp.abs(td_error)),
            "q_value": jnp.sum(weight * chosen),
            "target": jnp.sum(jnp.where(real, weight * target, 0.0)),
        }
        return loss, metrics, scale

    def _targets(self, rollout: Rollout) -> Float[Array, "T N K"]:
        """Targets from the values that acting computed, where there are any."""
        if rollout.values is None or self.has_memory:
            rollout = self._warmed_up(self.network, self.statistics, rollout)
            q_values, *_ = self._unroll(self.network, self.statistics, rollout)
            return self._targets_of(self._values(q_values, rollout.timesteps), rollout.timesteps)
        last = jax.tree.map(lambda x: x[-1:], rollout.timesteps)
        output = self.network(last.obs.reshape(1, -1, *last.obs.shape[3:]), self.statistics)
        last_values = self._values(output.q_values.reshape(1, *rollout.values.shape[1:], -1), last)
        values = jnp.concatenate([rollout.values, last_values])
        return self._targets_of(values, rollout.timesteps)

    def _values(self, q_values: Float[Array, "T N M A"], timesteps) -> Float[Array, "T N M"]:
        """Each agent's best legal action's."""
        return jnp.max(legal(q_values, timesteps.action_mask), axis=-1)

    def _targets_of(
        self, values: Float[Array, "steps N M"], timesteps: TimeStep
    ) -> Float[Array, "T N K"]:
        """Targets, given the values at all timesteps. To the dead nothing more is to happen."""
        later = jax.tree.map(lambda x: x[1:], timesteps)
        values, terminated = values[1:], later.terminated[..., None]
        if later.agent_mask is not None:
            values = jnp.where(later.agent_mask, values, 0.0)
            terminated = terminated | ~self.mixer.acts(later.agent_mask)
        next_values = self.mixer.mix(values)
        reward, terminated, truncated = (
            jnp.broadcast_to(x, next_values.shape)
            for x in (
                self.mixer.reward(later) * self.reward_scale,
                terminated,
                later.truncated[..., None],
            )
        )
        return q_lambda(
            reward,
            terminated,
            truncated,
            next_values,
            discount=self.discount,
            lambda_=self.lambda_,
        )

    def _warmed_up(self, network, statistics, rollout: Rollout) -> Rollout:
        """The rollout after its burn-in, with the memory that today's parameters have there."""
        if not self.burn_in:
            return rollout
        timesteps, actions = rollout.timesteps, rollout.actions

        def part(steps: slice, memory: Memory) -> Rollout:
            return Rollout(jax.tree.map(lambda x: x[steps], timesteps), actions[steps], memory)

        before = part(slice(self.burn_in), rollout.memory)
        # Without a batch mask: only what is learnt from counts for normalisation.
        _, memory, _ = jax.lax.stop_gradient(self._unroll(network, statistics, before))
        memory = PQNMemory(memory, before.actions[-1].reshape(-1))
        return part(slice(self.burn_in, None), memory)

    def _unroll(
        self, network, statistics, rollout: Rollout, batch_mask=None
    ) -> tuple[Float[Array, "T N M A"], Memory, PyTree]:
        """Q-values at all timesteps, from the memory at their start; memory after; statistics."""
        steps = rollout.timesteps
        lengths = steps.obs.shape[:3]

        def rows(x):
            return x.reshape(x.shape[0], -1)

        output = _compute(
            network,
            jnp.reshape(steps.obs, (lengths[0], -1, *steps.obs.shape[3:])),
            statistics,
            rollout.memory,
            rows(rollout.actions),
            first=rows(self._of_each_agent(steps.first)),
            last_reward=rows(
                self._of_each_agent(steps.reward)
                if steps.agent_reward is None
                else jnp.asarray(steps.agent_reward)
            ),
            batch_mask=None if batch_mask is None else rows(batch_mask),
        )
        return output.q_values.reshape(*lengths, -1), output.memory, output.statistics


def _compute(
    network: AbstractQNetwork,
    obs: Shaped[Array, "T B *obs"],
    statistics: PyTree,
    memory: PQNMemory | None,
    actions: Int[AnyArray, "steps B"] | None = None,
    *,
    first: Bool[Array, "T B"] | None,
    last_reward: Float[Array, "T B"] | None,
    batch_mask: Bool[Array, "T B"] | None = None,
) -> NetworkOutput:
    """The network on `T` steps, between which `actions` were taken. A start has no last ones."""
    last_action = None
    if memory is not None:
        last_action = memory.last_action[None]
        if actions is not None:
            last_action = jnp.concatenate([last_action, actions])[: len(obs)]
        if first is not None:
            last_action = jnp.where(first, -1, last_action)
    if last_reward is not None and first is not None:
        last_reward = jnp.where(first, 0.0, last_reward)
    return network(
        obs,
        statistics,
        None if memory is None else memory.network,
        first=first,
        last_action=last_action,
        last_reward=last_reward,
        batch_mask=batch_mask,
    )


def _acting(rollout: Rollout) -> Bool[Array, "T N M"]:
    """Whose transition happened: it led into no reset, and the agent was alive."""
    acting = jnp.broadcast_to(rollout.real[..., None], rollout.actions.shape)
    mask = rollout.timesteps.agent_mask
    return acting if mask is None else acting & mask[:-1]


def _take(x: Shaped[Array, "..."], index: Int[Array, "G B"], axis: int = 0) -> Shaped[Array, "..."]:
    """Items of each lane group, by their places in it; along `axis` there is group after group."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    groups = x.reshape(*before, len(index), -1, *after)
    own = lambda x, i: x[(*[slice(None)] * axis, i)]  # noqa: E731
    taken = jax.vmap(own, in_axes=(axis, 0), out_axes=axis)(groups, index)
    return taken.reshape(*before, -1, *after)


def _lanes_of(rollout: Rollout, index: Int[Array, "G B"]) -> Rollout:
    """Some lanes of a rollout, of each lane group."""
    num_lanes = rollout.actions.shape[1]
    timesteps, actions = jax.tree.map(
        partial(_take, index=index, axis=1), (rollout.timesteps, rollout.actions)
    )

    def rows(x):  # of all agents of these lanes
        return _take(x.reshape(num_lanes, -1, *x.shape[1:]), index).reshape(-1, *x.shape[1:])

    return Rollout(timesteps, actions, jax.tree.map(rows, rollout.memory))


def _apart(rollout: Rollout, num_groups: int) -> Rollout:
    """A rollout of each lane group, on a leading axis."""

    def lanes(x, axis):
        x = x.reshape(*x.shape[:axis], num_groups, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    over_time = partial(lanes, axis=1)
    timesteps, actions = jax.tree.map(over_time, (rollout.timesteps, rollout.actions))
    return Rollout(timesteps, actions, jax.tree.map(partial(lanes, axis=0), rollout.memory))
