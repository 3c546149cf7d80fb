"""Targets and losses against their definitions, written as loops: Q(λ), n-step, quantiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_q.returns import n_step, q_lambda, quantile_huber

pytestmark = pytest.mark.quick


def of_n_steps(reward, terminated, next_value, t, n, discount):
    rewards = sum(discount**i * reward[t + i] for i in range(n))
    last = t + n - 1
    return rewards + discount**n * next_value[last] * (not terminated[last])


def by_definition(reward, terminated, truncated, next_value, discount, lambda_):
    """One lane. G_t = (1 - λ) Σ_{n<N} λ^{n-1} G^(n)_t + λ^{N-1} G^(N)_t, N steps to the cut."""
    length = len(reward)
    targets = np.zeros(length)
    for t in range(length):
        ends = [k for k in range(t, length) if terminated[k] or truncated[k] or k == length - 1]
        longest = ends[0] - t + 1
        returns = [
            of_n_steps(reward, terminated, next_value, t, n, discount)
            for n in range(1, longest + 1)
        ]
        targets[t] = lambda_ ** (longest - 1) * returns[-1] + (1 - lambda_) * sum(
            lambda_**i * g for i, g in enumerate(returns[:-1])
        )
    return targets


@pytest.mark.parametrize("lambda_", [0.0, 0.65, 1.0])
@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_equals_the_definition(length, discount, lambda_):
    rng = np.random.default_rng(length)
    lanes = 7
    reward, next_value = rng.normal(size=(2, length, lanes)).astype(np.float32)
    ending = rng.choice(3, p=[0.6, 0.2, 0.2], size=(length, lanes))
    terminated, truncated = ending == 1, ending == 2
    targets = q_lambda(
        *map(jnp.asarray, (reward, terminated, truncated, next_value)),
        discount=discount,
        lambda_=lambda_,
    )
    expected = np.stack(
        [
            by_definition(*(x[:, lane] for x in (reward, terminated, truncated, next_value)),
                          discount, lambda_)
            for lane in range(lanes)
        ],
        axis=1,
    )  # fmt: skip
    np.testing.assert_allclose(targets, expected, rtol=2e-5, atol=2e-5)


def test_the_step_that_resets_a_lane_reaches_no_other_target():
    """What the reset step carries is never seen by the targets of real transitions."""
    reward = jnp.array([1.0, 1.0, 100.0, 1.0])[:, None]
    value = jnp.array([5.0, 7.0, 1000.0, 2.0])[:, None]
    truncated = jnp.array([False, True, False, False])[:, None]
    targets = q_lambda(
        reward, jnp.zeros_like(truncated), truncated, value, discount=0.5, lambda_=0.9
    )
    second = 1 + 0.5 * 7  # bootstrapped from the true final observation, not cut to 1
    first = 1 + 0.5 * (0.1 * 5 + 0.9 * second)
    np.testing.assert_allclose(targets[:2, 0], [first, second], rtol=1e-6)
    np.testing.assert_allclose(targets[3, 0], 1 + 0.5 * 2, rtol=1e-6)


def test_trailing_axes_are_independent():
    rng = np.random.default_rng(0)
    reward, value = jnp.asarray(rng.normal(size=(2, 5, 3, 2)), jnp.float32)
    no = jnp.zeros(reward.shape, bool)
    together = q_lambda(reward, no, no, value, discount=0.9, lambda_=0.5)
    alone = q_lambda(
        reward[:, 1, 0], no[:, 1, 0], no[:, 1, 0], value[:, 1, 0], discount=0.9, lambda_=0.5
    )
    np.testing.assert_allclose(together[:, 1, 0], alone, rtol=1e-6)


def test_the_value_of_a_terminal_observation_is_never_looked_at():
    terminated = jnp.array([False, True, False])
    value = jnp.array([2.0, jnp.nan, 4.0])
    targets = q_lambda(
        jnp.ones(3), terminated, jnp.zeros(3, bool), value, discount=0.5, lambda_=0.9
    )
    np.testing.assert_allclose(targets, [1 + 0.5 * (0.1 * 2 + 0.9 * 1), 1, 3], rtol=1e-6)


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_n_step_targets_equal_a_loop(n, discount):
    rng = np.random.default_rng(n)
    shape = (20, 3)
    length = rng.integers(1, n + 1, shape)
    terminated = rng.random(shape) < 0.4
    value = rng.normal(size=shape).astype(np.float32)
    reward = rng.normal(size=(*shape, n)).astype(np.float32)
    reward[np.arange(n) >= length[..., None]] = 0.0
    ours = n_step(reward, length, terminated, value, discount=discount)
    compiled = jax.jit(n_step)(reward, length, terminated, value, discount=discount)
    for i in np.ndindex(shape):
        target = 0.0 if terminated[i] else value[i]
        for step in reversed(range(length[i])):
            target = reward[i][step] + discount * target
        np.testing.assert_allclose(ours[i], target, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(compiled, ours, rtol=1e-5, atol=1e-6)


def test_n_step_targets_of_many_samples_of_a_return():
    """One reward, several values: each is a sample of its own."""
    value = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    reward = jnp.array([[[1.0, 1.0]], [[2.0, 0.0]]])
    length, terminated = jnp.array([[2], [1]]), jnp.array([[False], [True]])
    targets = n_step(reward, length, terminated, value, discount=0.5)
    np.testing.assert_allclose(targets, [[1.75, 2.0, 2.25], [2.0, 2.0, 2.0]])


def test_n_step_never_looks_at_the_value_of_a_terminal_observation():
    targets = n_step(
        jnp.ones((2, 1)),
        jnp.ones(2, jnp.int32),
        jnp.array([True, False]),
        jnp.array([jnp.nan, 2.0]),
        discount=0.5,
    )
    np.testing.assert_array_equal(targets, [1.0, 2.0])


@pytest.mark.parametrize(("num", "num_targets"), [(1, 1), (5, 5), (4, 7)])
def test_quantile_huber_equals_a_double_loop(num, num_targets):
    rng = np.random.default_rng(num)
    quantiles = rng.normal(scale=2, size=(6, num)).astype(np.float32)
    targets = rng.normal(scale=2, size=(6, num_targets)).astype(np.float32)
    ours = quantile_huber(jnp.asarray(quantiles), jnp.asarray(targets))
    slopes = jax.grad(lambda q: quantile_huber(q, jnp.asarray(targets)).sum())(
        jnp.asarray(quantiles)
    )
    for row in range(6):
        loss = 0.0
        for i in range(num):
            fraction, slope = (2 * i + 1) / (2 * num), 0.0
            for j in range(num_targets):
                u = targets[row, j] - quantiles[row, i]
                huber = 0.5 * u * u if abs(u) <= 1 else abs(u) - 0.5
                weight = (1 - fraction) if u < 0 else fraction
                loss += weight * huber / num_targets
                slope -= weight * np.clip(u, -1, 1) / num_targets
            np.testing.assert_allclose(slopes[row, i], slope, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(ours[row], loss, rtol=1e-5)


def test_quantile_huber_is_least_at_the_quantiles():
    """Of many samples, its descent finds their quantiles: what it is for."""
    samples = jnp.asarray(np.random.default_rng(0).exponential(scale=20, size=1001), jnp.float32)
    slope = jax.jit(jax.grad(lambda q: quantile_huber(q, samples)))
    quantiles = jnp.zeros(4)
    for rate in (50.0, 5.0):
        for _ in range(300):
            quantiles -= rate * slope(quantiles)
    expected = np.quantile(samples, [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(quantiles, expected, rtol=0.02, atol=0.5)
