"""PQN with memory against a loop over single steps of single lanes."""

from collections.abc import Callable

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

import eqx_q
from eqx_q.agents.sequences import as_team
from eqx_q.errors import UsageError
from eqx_q.nets import AbstractQNetwork, NetworkOutput
from eqx_q.types import Episode, Rollout, TimeStep

OBS = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = gymnasium.spaces.Discrete(2)
T, N, W, H = 5, 4, 2, 3


class Elman(AbstractQNetwork):
    """h = tanh(W_x x + W_h h + W_a onehot(last action) + w_r last reward); Q = W_q h."""

    w_x: Array
    w_h: Array
    w_a: Array
    w_r: Array
    w_q: Array

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        shapes = ((H, 3), (H, H), (H, 2), (H,), (2, H))
        self.w_x, self.w_h, self.w_a, self.w_r, self.w_q = (
            0.6 * jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)
        )

    def initial_statistics(self):
        return None

    def initial_memory(self, num_lanes):
        return jnp.zeros((num_lanes, H))

    def step(self, memory, obs, first, last_action, last_reward):
        """One step of one lane."""
        memory = jnp.where(first, 0.0, memory)
        extra = self.w_a @ jax.nn.one_hot(last_action, 2) + self.w_r * last_reward
        memory = jnp.tanh(self.w_x @ obs + self.w_h @ memory + extra)
        return memory, self.w_q @ memory

    def __call__(self, inputs, statistics, memory):
        first, last_reward = inputs.first, inputs.last_reward
        if first is None:
            first = jnp.zeros(inputs.num_steps_and_rows, bool)
        if last_reward is None:
            last_reward = jnp.zeros(inputs.num_steps_and_rows)
        steps = (inputs.obs, first, inputs.last_action[..., 0], last_reward)
        memory, q_values = jax.lax.scan(
            lambda memory, step: jax.vmap(self.step)(memory, *step), memory, steps
        )
        return NetworkOutput(q_values[..., None], memory)


def make_agent(**options):
    defaults = {
        "rollout_length": T,
        "num_epochs": 2,
        "num_minibatches": 2,
        "learning_rate": 0.05,
        "schedule_steps": 1000.0,
        "lambda_": 0.7,
        "discount": 0.9,
        "reward_scale": 0.5,
        "max_grad_norm": 0.3,
    }
    network = Elman(jax.random.key(1))
    return eqx_q.PQN.create(
        OBS, ACT, key=jax.random.key(0), network=network, **(defaults | options)
    )


def make_rollout(agent, seed=0, steps=T):
    """Random numbers, with episodes that end and start inside, and memory at the start."""
    rng = np.random.default_rng(seed)
    shape = (steps + 1, N)
    ended = rng.random(shape) < 0.3
    first = np.concatenate([rng.random((1, N)) < 0.5, ended[:-1]])
    ended &= ~first
    first[1:] = ended[:-1]
    truncated = ended & (rng.random(shape) < 0.5)
    reward = rng.normal(size=shape).astype(np.float32)
    timesteps = TimeStep(
        obs=rng.normal(size=(*shape, 3)).astype(np.float32),
        reward=reward,
        terminated=ended & ~truncated,
        truncated=truncated,
        first=first,
        episode=Episode(ended, reward, np.zeros(shape, np.int32)),
    )
    assert truncated.any() and (ended & ~truncated).any()
    actions = rng.integers(0, 2, size=(steps, N)).astype(np.int32)
    memory = eqx.tree_at(
        lambda m: (m.network, m.last_action),
        agent.initial_memory(N),
        (rng.normal(size=(N, H)).astype(np.float32), rng.integers(0, 2, (N, 1)).astype(np.int32)),
    )
    return jax.tree.map(jnp.asarray, Rollout(timesteps, actions, memory))


def slow_loss(network, agent, rollout, lanes, burn_in=0):
    """The loss of some lanes, step by step; targets are constants of the same pass."""
    steps = rollout.timesteps
    num_steps = len(rollout.actions)
    errors = []
    for n in lanes:
        memory, last_action = rollout.memory.network[n], rollout.memory.last_action[n, 0]
        q_values = []
        for t in range(num_steps + 1):
            first = bool(steps.first[t, n])
            memory, q = network.step(
                memory,
                steps.obs[t, n],
                first,
                -1 if first else last_action,  # which is no action
                0.0 if first else steps.reward[t, n],
            )
            if t < burn_in:
                memory = jax.lax.stop_gradient(memory)
            last_action = rollout.actions[min(t, num_steps - 1), n]
            q_values.append(q)
        target = 0.0
        for t in reversed(range(burn_in, num_steps)):
            terminated = bool(steps.terminated[t + 1, n])
            ended = terminated or bool(steps.truncated[t + 1, n])
            trace = 0.0 if ended or t == num_steps - 1 else agent.lambda_
            value = jax.lax.stop_gradient(q_values[t + 1].max())
            later = (1 - trace) * value + trace * target
            reward = agent.reward_scale * steps.reward[t + 1, n]
            target = reward + agent.discount * (0.0 if terminated else later)
            if not steps.first[t + 1, n]:
                errors.append(q_values[t][rollout.actions[t, n]] - target)
    return 0.5 * sum(error**2 for error in errors) / len(errors)


def slow_update(agent, rollout, key, burn_in=0):
    network, optimizer = agent.network, optax.radam(float(agent.learning_rate))
    state = optimizer.init(eqx.filter(network, eqx.is_inexact_array))
    losses = []
    groups = agent.lane_groups
    for random in np.asarray(jax.random.bits(key, (agent.num_epochs, groups, N // groups))):
        order = np.argsort(random) + N // groups * np.arange(groups)[:, None]
        for lanes in np.split(order, agent.num_minibatches, axis=1):
            lanes = lanes.flatten()
            loss, gradients = eqx.filter_value_and_grad(slow_loss)(
                network, agent, rollout, lanes, burn_in
            )
            norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradients)))
            scale = min(1.0, float(agent.max_grad_norm) / norm)
            gradients = jax.tree.map(lambda g, scale=scale: scale * g, gradients)
            updates, state = optimizer.update(gradients, state)
            network = eqx.apply_updates(network, updates)
            losses.append(float(loss))
    return network, np.mean(losses)


@pytest.mark.parametrize(("burn_in", "lane_groups"), [(0, 1), (W, 1), (W, 2)])
def test_update_equals_a_loop_over_steps(burn_in, lane_groups):
    agent = make_agent(burn_in=burn_in, lane_groups=lane_groups)
    rollout, key = make_rollout(agent, steps=T + burn_in), jax.random.key(7)
    expected, loss = slow_update(agent, rollout, key, burn_in)
    learnt, metrics = agent.update(rollout, key=key)
    for ours, theirs in zip(
        jax.tree.leaves(learnt.network), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert int(learnt.env_steps) == T * N


def test_acting_step_by_step_is_what_update_unrolls():
    """Values that acting saw make the targets that `update` unrolls by itself."""
    agent = make_agent()
    rollout = make_rollout(agent)
    memory, values = rollout.memory, []
    for t in range(T + 1):
        steps = jax.tree.map(lambda x, t=t: x[t], rollout.timesteps)
        decision = agent.act(steps.obs, memory, first=steps.first, reward=steps.reward)
        values.append(decision.value)
        if t < T:  # the action that was taken, not the one that would be now
            taken = rollout.actions[t, :, None]
            memory = eqx.tree_at(lambda m: m.last_action, decision.memory, taken)
    expected = eqx_q.returns.q_lambda(
        rollout.timesteps.reward[1:] * 0.5,
        rollout.timesteps.terminated[1:],
        rollout.timesteps.truncated[1:],
        jnp.stack(values)[1:],
        discount=0.9,
        lambda_=0.7,
    )
    targets = agent._targets(as_team(agent, rollout, 0))[..., 0, 0]
    np.testing.assert_allclose(targets, expected, rtol=1e-5, atol=1e-6)


def test_memory_after_a_reset_is_fresh_memory():
    agent = make_agent()
    obs = np.ones((N, 3), np.float32)
    used = agent.act(obs, agent.act(3 * obs).memory, first=np.ones(N, bool), reward=np.ones(N))
    fresh = agent.act(obs)
    np.testing.assert_array_equal(used.memory.network, fresh.memory.network)
    later = agent.act(obs, agent.act(3 * obs).memory, reward=np.ones(N))
    assert not np.allclose(later.memory.network, fresh.memory.network)


def test_memory_goes_on_without_a_lane_axis():
    agent = make_agent()
    obs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    memory, lane_memory = agent.initial_memory(1), agent.initial_memory(N)
    for o in obs:
        one = agent.act(o, memory)
        lanes = agent.act(np.tile(o, (N, 1)), lane_memory)
        assert one.action.shape == ()
        np.testing.assert_array_equal(one.action, lanes.action[0])
        np.testing.assert_allclose(one.value, lanes.value[0], rtol=1e-6)
        memory, lane_memory = one.memory, lanes.memory


def test_what_cannot_work_is_refused():
    agent = make_agent()
    rollout = make_rollout(agent)
    with pytest.raises(UsageError, match="with the memory before its first timestep"):
        agent.update(Rollout(rollout.timesteps, rollout.actions), key=jax.random.key(0))
    with pytest.raises(UsageError, match="num_minibatches=3 does not divide the 4 lanes"):
        make_agent(num_minibatches=3).update(rollout, key=jax.random.key(0))
    with pytest.raises(UsageError, match="burn_in=2 warms up memory, but this network has none"):
        eqx_q.PQN.create(OBS, ACT, key=jax.random.key(0), burn_in=2)
    for burn_in, message in (
        (6, "burn_in=6 exceeds rollout_length=5"),
        (-1, "at least 0"),
    ):
        with pytest.raises(UsageError, match=message):
            make_agent(burn_in=burn_in)
    with pytest.raises(UsageError, match="5 steps leaves nothing after burn_in=5"):
        make_agent(burn_in=5).update(rollout, key=jax.random.key(0))
    for memory in (rollout.memory.network, agent.initial_memory(N + 1)):
        with pytest.raises(UsageError, match="memory does not match 4 lanes of this agent"):
            agent.act(rollout.timesteps.obs[0], memory)
        with pytest.raises(UsageError, match="memory does not match 4 lanes of this agent"):
            agent.update(Rollout(rollout.timesteps, rollout.actions, memory), key=jax.random.key(0))


class Wrong(Elman):
    """Gives what `output` makes of an output."""

    output: Callable = eqx.field(static=True)

    def __init__(self, key, output):
        super().__init__(key)
        self.output = output

    def __call__(self, *args, **options):
        return self.output(super().__call__(*args, **options))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda o: (o.values, o.memory), "a network must return a NetworkOutput, not tuple"),
        (lambda o: NetworkOutput(o.values), "memory must keep its shapes and types"),
        (lambda o: NetworkOutput(o.values, o.memory, 1.0), "statistics must keep its shapes"),
        (lambda o: NetworkOutput(o.values[..., :1, :], o.memory), "there are 2 choices of action"),
        (lambda o: o[0], "the network cannot take observations"),
    ],
)
def test_networks_that_break_the_contract_are_refused(output, message):
    network = Wrong(jax.random.key(0), output)
    with pytest.raises(UsageError, match=message):
        eqx_q.PQN.create(OBS, ACT, key=jax.random.key(0), network=network)


def test_memory_of_another_agent_is_refused():
    def make(**options):
        return eqx_q.PQN.create(OBS, ACT, key=jax.random.key(0), network="mlp", **options)

    gru = {"network_options": {"memory": "gru"}}
    agents = [make(), make(**gru), make(**gru, exploration="ez_greedy")]
    for agent in agents:
        for other in agents:
            memory = other.initial_memory(N)
            if other is agent:
                agent.act(np.zeros((N, 3), np.float32), memory)
            elif memory is not None:
                with pytest.raises(UsageError, match=f"memory does not match {N} lanes of this"):
                    agent.act(np.zeros((N, 3), np.float32), memory)


def test_acting_from_nothing_is_acting_at_an_episodes_start():
    agent = make_agent()
    obs = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
    start = agent.act(obs, first=np.ones(N, bool))
    for memory in (None, agent.initial_memory(N)):
        np.testing.assert_array_equal(agent.act(obs, memory).value, start.value)
