"""PQN's update against plain NumPy, and its acting."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_q
from eqx_q.agents.sequences import as_team
from eqx_q.errors import UsageError
from eqx_q.returns import q_lambda
from eqx_q.types import Episode, Rollout, TimeStep, Transitions

pytestmark = pytest.mark.quick

OBS = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = gymnasium.spaces.Discrete(2)
T, N = 6, 2


def make_rollout(seed=0):
    """Random numbers with a truncation and a termination, each followed by its reset step."""
    rng = np.random.default_rng(seed)
    shape = (T + 1, N)
    terminated, truncated, first = (np.zeros(shape, bool) for _ in range(3))
    truncated[2, 0] = first[3, 0] = True
    terminated[4, 1] = first[5, 1] = True
    # A learner that does not mask the reset step would see these.
    obs = rng.normal(size=(*shape, 3)).astype(np.float32)
    reward = rng.normal(size=shape).astype(np.float32)
    reward[first] = 100.0
    ended = terminated | truncated
    timesteps = TimeStep(
        obs=obs,
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        first=first,
        episode=Episode(ended, reward, np.zeros(shape, np.int32)),
    )
    actions = rng.integers(0, 2, size=(T, N)).astype(np.int32)
    return Rollout(*jax.tree.map(jnp.asarray, (timesteps, actions)))


def make_agent(key=0, **options):
    network = eqx.nn.Linear(3, 2, key=jax.random.key(key))
    defaults = {
        "rollout_length": T,
        "num_epochs": 2,
        "num_minibatches": 3,
        "learning_rate": 0.03,
        "learning_rate_end": 0.01,
        "schedule_steps": 100.0,
        "lambda_": 0.7,
        "discount": 0.9,
        "reward_scale": 0.5,
        "max_grad_norm": 0.5,
    }
    return eqx_q.PQN.create(
        OBS, ACT, key=jax.random.key(0), network=network, **(defaults | options)
    )


class SlowRAdam:
    """Rectified Adam as in Liu et al. 2020, Algorithm 2."""

    def __init__(self, parameters):
        self.first = [np.zeros_like(p) for p in parameters]
        self.second = [np.zeros_like(p) for p in parameters]
        self.t = 0

    def step(self, parameters, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-8):
        self.t += 1
        t = self.t
        rho_inf = 2 / (1 - b2) - 1
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        new = []
        for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            self.first[i] = b1 * self.first[i] + (1 - b1) * g
            self.second[i] = b2 * self.second[i] + (1 - b2) * g * g
            direction = self.first[i] / (1 - b1**t)
            if rho >= 5:
                rectify = np.sqrt(
                    (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
                )
                direction = rectify * direction / (np.sqrt(self.second[i] / (1 - b2**t)) + eps)
            new.append(p - learning_rate * direction)
        return new


def slow_update(agent, rollout, key, optimizer):
    """PQN with a linear network, all in float64 loops."""
    steps = jax.tree.map(np.asarray, rollout.timesteps)
    weight = np.asarray(agent.network.module.weight, np.float64)
    bias = np.asarray(agent.network.module.bias, np.float64)
    h = {
        name: float(getattr(agent, name))
        for name in ("discount", "lambda_", "reward_scale", "learning_rate", "learning_rate_end",
                     "max_grad_norm", "schedule_steps", "env_steps")
    }  # fmt: skip
    targets = np.zeros((T, N))
    for n in range(N):
        for t in reversed(range(T)):
            value = np.max(weight @ steps.obs[t + 1, n] + bias)
            ended = steps.terminated[t + 1, n] or steps.truncated[t + 1, n]
            trace = 0.0 if ended or t == T - 1 else h["lambda_"]
            later = targets[t + 1, n] if t < T - 1 else 0.0
            alive = 1.0 - steps.terminated[t + 1, n]
            targets[t, n] = h["reward_scale"] * steps.reward[t + 1, n] + h["discount"] * alive * (
                (1 - trace) * value + trace * later
            )
    obs = steps.obs[:-1].reshape(T * N, 3)
    actions = np.asarray(rollout.actions).reshape(T * N)
    real = ~steps.first[1:].reshape(T * N)
    targets = targets.reshape(T * N)
    losses = []
    step = 0
    groups = agent.lane_groups
    lanes = N // groups  # of a group
    size = T * lanes // agent.num_minibatches
    for random in np.asarray(jax.random.bits(key, (agent.num_epochs, groups, T * lanes))):
        order = np.argsort(random)
        for start in range(0, T * lanes, size):
            rows = []
            for group in range(groups):
                steps_there, lanes_there = np.divmod(order[group, start : start + size], lanes)
                rows += list(steps_there * N + group * lanes + lanes_there)
            rows = [i for i in rows if real[i]]
            grad_weight, grad_bias, loss = np.zeros_like(weight), np.zeros_like(bias), 0.0
            for i in rows:
                error = (weight @ obs[i] + bias)[actions[i]] - targets[i]
                loss += 0.5 * error**2 / len(rows)
                grad_weight[actions[i]] += error * obs[i] / len(rows)
                grad_bias[actions[i]] += error / len(rows)
            losses.append(loss)
            norm = np.sqrt((grad_weight**2).sum() + (grad_bias**2).sum())
            scale = min(1.0, h["max_grad_norm"] / norm)
            done = h["env_steps"] + step * T * N / (agent.num_epochs * agent.num_minibatches)
            rate = h["learning_rate"] + (h["learning_rate_end"] - h["learning_rate"]) * min(
                1.0, done / h["schedule_steps"]
            )
            weight, bias = optimizer.step(
                [weight, bias], [scale * grad_weight, scale * grad_bias], rate
            )
            step += 1
    return weight, bias, np.mean(losses)


@pytest.mark.parametrize("lane_groups", [1, 2])
def test_update_equals_a_slow_computation(lane_groups):
    agent = make_agent(lane_groups=lane_groups)
    optimizer = SlowRAdam([np.zeros((2, 3)), np.zeros(2)])
    for i in range(3):  # RAdam starts to rectify at its sixth step
        rollout, key = make_rollout(i), jax.random.key(i)
        weight, bias, loss = slow_update(agent, rollout, key, optimizer)
        agent, metrics = agent.update(rollout, key=key)
        np.testing.assert_allclose(agent.network.module.weight, weight, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(agent.network.module.bias, bias, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    assert int(agent.env_steps) == 3 * T * N


def test_values_from_acting_are_what_update_computes_itself():
    agent, rollout = make_agent(), make_rollout()
    values = jnp.stack([agent.act(obs).value for obs in rollout.timesteps.obs[:-1]])
    with_values = eqx.tree_at(lambda r: r.values, rollout, values, is_leaf=lambda x: x is None)
    a, _ = agent.update(rollout, key=jax.random.key(0))
    b, _ = agent.update(with_values, key=jax.random.key(0))
    np.testing.assert_allclose(a.network.module.weight, b.network.module.weight, rtol=1e-5)


@pytest.mark.parametrize("with_values", [False, True])
def test_targets_bootstrap_from_legal_actions_alone(with_values):
    """One lane, one step, then a window's end: the best action is illegal there."""
    agent, rollout = make_agent(reward_scale=1.0), make_rollout()
    rng = np.random.default_rng(3)
    mask = rng.random((T + 1, N, 2)) < 0.6
    timesteps = eqx.tree_at(
        lambda t: t.action_mask, rollout.timesteps, jnp.asarray(mask), is_leaf=lambda x: x is None
    )
    obs = np.asarray(timesteps.obs)
    q_values = obs @ np.asarray(agent.network.module.weight).T + agent.network.module.bias
    open_mask = mask | ~mask.any(-1, keepdims=True)  # nothing is legal: the game is over
    values = np.where(open_mask, q_values, -np.inf).max(-1)
    expected = q_lambda(
        timesteps.reward[1:],
        timesteps.terminated[1:],
        timesteps.truncated[1:],
        values[1:],
        discount=0.9,
        lambda_=0.7,
    )
    acted = jnp.asarray(values[:-1]) if with_values else None
    targets = agent._targets(as_team(agent, Rollout(timesteps, rollout.actions, None, acted), 0))
    np.testing.assert_allclose(targets[..., 0, 0], expected, rtol=1e-4, atol=1e-5)


def test_update_leaves_the_old_agent_alone():
    agent = make_agent()
    before = np.array(agent.network.module.weight)
    new, _ = agent.update(make_rollout(), key=jax.random.key(0))
    np.testing.assert_array_equal(agent.network.module.weight, before)
    assert not np.array_equal(new.network.module.weight, before)


def test_greedy_action_with_and_without_lanes():
    agent = make_agent()
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    q_values = obs @ np.asarray(agent.network.module.weight).T + agent.network.module.bias
    lanes = agent.act(obs)
    np.testing.assert_array_equal(lanes.action, q_values.argmax(-1))
    np.testing.assert_allclose(lanes.value, q_values.max(-1), rtol=1e-5)
    one = agent.act(obs[2])
    assert one.action.shape == ()
    assert int(one.action) == int(lanes.action[2])


def test_masks_hold_in_greedy_and_in_random_choice():
    agent = make_agent()
    obs = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    mask = np.zeros((400, 2), bool)
    mask[np.arange(400), np.arange(400) % 2] = True
    for options in ({}, {"epsilon": 1.0, "key": jax.random.key(0)}):
        decision = agent.act(obs, action_mask=mask, **options)
        np.testing.assert_array_equal(decision.action, np.arange(400) % 2)
    q_values = obs @ np.asarray(agent.network.module.weight).T + agent.network.module.bias
    np.testing.assert_allclose(
        decision.value, np.where(mask, q_values, -np.inf).max(-1), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("masked", [False, True])
def test_exploration_is_uniform_over_legal_actions(masked):
    space = gymnasium.spaces.Discrete(4)
    network = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    agent = eqx_q.PQN.create(OBS, space, key=jax.random.key(0), network=network)
    count = 20_000
    obs = np.ones((count, 3), np.float32)
    legal = np.array([True, False, True, True]) if masked else np.ones(4, bool)
    mask = np.broadcast_to(legal, (count, 4)) if masked else None
    decision = agent.act(obs, action_mask=mask, epsilon=0.6, key=jax.random.key(1))
    greedy = int(agent.act(obs[0], action_mask=None if mask is None else mask[0]).action)
    expected = 0.6 * legal / legal.sum() + 0.4 * (np.arange(4) == greedy)
    frequency = np.bincount(np.asarray(decision.action), minlength=4) / count
    np.testing.assert_allclose(frequency, expected, atol=4 * 0.5 / np.sqrt(count))


def test_schedules_follow_progress():
    agent = make_agent(epsilon_start=1.0, epsilon_end=0.2, epsilon_decay=0.5, schedule_steps=48.0)
    epsilons = []
    for i in range(4):
        epsilons.append(float(agent.epsilon))
        agent, _ = agent.update(make_rollout(i), key=jax.random.key(i))
    np.testing.assert_allclose(epsilons, [1.0, 0.6, 0.2, 0.2], rtol=1e-5)
    np.testing.assert_allclose(float(make_agent(schedule_steps=None).epsilon), 1.0)


@pytest.mark.parametrize(
    ("obs_space", "act_space", "options", "message"),
    [
        (OBS, OBS, {}, "a Box of actions is divided into bins, but .* has no bounds"),
        (OBS, gymnasium.spaces.Dict(a=ACT), {}, "MultiBinary or a bounded Box, got Dict"),
        (gymnasium.spaces.Text(3), ACT, {}, "a space of kind Text is not supported"),
        (OBS, gymnasium.spaces.Box(-1, 1, (2,)), {"bins": 1}, "bins=1: give a whole number of at"),
        (OBS, gymnasium.spaces.Box(-1, 1, (2,)), {"bins": [2, 3, 4]}, "3 numbers, but .* 2 dimen"),
        (OBS, ACT, {"rollout_length": 0}, "rollout_length must be a whole number"),
        (OBS, ACT, {"discount": 5}, "discount=5 is out of range: give a value from 0 to 1"),
        (OBS, ACT, {"learning_rate": float("nan")}, "learning_rate=nan is out of range"),
        (OBS, ACT, {"schedule_steps": 0}, "schedule_steps=0 is out of range"),
        (OBS, gymnasium.spaces.Discrete(5), {}, "there are 5 choices of action with 1 values each"),
        (
            gymnasium.spaces.Box(-1, 1, (7,)),
            ACT,
            {},
            r"cannot take observations of Box\(-1.0, 1.0, \(7,\)",
        ),
        (OBS, ACT, {"network_options": {"norm": "none"}}, "named networks"),
    ],
)
def test_bad_input_of_create(obs_space, act_space, options, message):
    network = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    with pytest.raises(UsageError, match=message):
        eqx_q.PQN.create(obs_space, act_space, key=jax.random.key(0), network=network, **options)


def test_bad_input_of_update_and_act():
    with pytest.raises(UsageError, match="num_minibatches=5 does not divide the 12 transitions"):
        make_agent(num_minibatches=5).update(make_rollout(), key=jax.random.key(0))
    with pytest.raises(UsageError, match="obs has shape"):
        make_agent().act(np.zeros((4, 7), np.float32))
    agent, rollout = make_agent(), make_rollout()
    short = jax.tree.map(lambda x: x[:-1], rollout.timesteps)
    with pytest.raises(
        UsageError, match=r"obs has leading axes \(6, 2\), not \(7, 2\): .*one more timestep"
    ):
        agent.update(eqx_q.Rollout(short, rollout.actions), key=jax.random.key(0))
    step = jax.tree.map(lambda x: x[0], rollout.timesteps)
    one = Transitions(
        obs=step.obs,
        action=rollout.actions[0],
        reward=step.reward[:, None],
        length=jnp.ones(2, jnp.int32),
        terminated=step.terminated,
        next_obs=step.obs,
    )
    with pytest.raises(UsageError, match="learns from rollouts: give it a Rollout"):
        agent.update(one, key=jax.random.key(0))
    with pytest.raises(UsageError, match="action_mask has shape"):
        agent.act(rollout.timesteps.obs[0], action_mask=np.ones(5, bool))


def test_traced_hyperparameters_compile_nothing_anew():
    traces = []

    @eqx.filter_jit
    def update(agent, rollout, key):
        traces.append(None)
        return agent.update(rollout, key=key)

    for change in (
        {}, {"learning_rate": 1e-3}, {"discount": 0.5}, {"lambda_": 0.1}, {"epsilon_end": 0.3},
        {"epsilon_decay": 0.9}, {"max_grad_norm": 1.0}, {"reward_scale": 2.0},
        {"schedule_steps": 1e6}, {"learning_rate_end": 1e-3}, {"epsilon_start": 0.5},
    ):  # fmt: skip
        update(make_agent(**change), make_rollout(), jax.random.key(0))
    assert len(traces) == 1
