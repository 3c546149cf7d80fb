"""Values against their definitions in NumPy: projection, losses, expectations, joint actions."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_q.agents.values import (
    AbstractValue,
    HLGauss,
    Quantile,
    Rescaled,
    Scalar,
    make_value,
    symexp,
    symlog,
)
from eqx_q.errors import UnknownNameError, UsageError

pytestmark = pytest.mark.quick

EVERY = [
    Scalar(),
    Scalar("squared"),
    Scalar("huber"),
    Rescaled(),
    HLGauss(7, -3.0, 5.0),
    HLGauss(11, -1e3, 1e4, symlog=True),
    Quantile(5),
]


# Compiled: in eager mode every operation is compiled for itself.
project = eqx.filter_jit(lambda value, targets: value.project(jnp.asarray(targets)))
loss_of = eqx.filter_jit(
    lambda value, raw, targets: value.loss(jnp.asarray(raw), jnp.asarray(targets))[0]
)
expected_of = eqx.filter_jit(lambda value, raw: value.expected(jnp.asarray(raw)))
samples_of = eqx.filter_jit(lambda value, raw: value.samples(jnp.asarray(raw)))
join = eqx.filter_jit(lambda value, raw: value.join(jnp.asarray(raw)))
slope_of = eqx.filter_jit(
    lambda value, raw, targets: jax.grad(lambda *x: value.loss(*x)[0].sum(), (0, 1))(
        jnp.asarray(raw), jnp.asarray(targets)
    )
)


def of_float(function):
    return np.vectorize(function, otypes=[np.float64])


cdf = of_float(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))
np_symlog = of_float(lambda x: math.copysign(math.log1p(abs(x)), x))
np_symexp = of_float(lambda x: math.copysign(math.expm1(abs(x)), x))


def bins(value):
    """Edges and what they stand for, as the class says."""
    low, high = float(value.v_min), float(value.v_max)
    if not value.symlog:
        edges = np.linspace(low, high, value.num_bins + 1)
        return edges, (edges[1:] + edges[:-1]) / 2
    edges = np.linspace(np_symlog(low), np_symlog(high), value.num_bins + 1)
    return edges, np_symexp((edges[1:] + edges[:-1]) / 2)


def gaussian(value, location):
    """The mass of each bin of a Gaussian cut to the range, one bin at a time."""
    edges, _ = bins(value)
    deviation = float(value.sigma) * (edges[1] - edges[0])
    mass = np.array(
        [
            cdf((right - location) / deviation) - cdf((left - location) / deviation)
            for left, right in itertools.pairwise(edges)
        ]
    )
    return mass / mass.sum()


def slow_projection(value, target):
    """The mixture of two Gaussians that keeps the mean."""
    edges, centres = bins(value)
    width = edges[1] - edges[0]
    target = np.clip(target, float(value.v_min), float(value.v_max))
    location = np_symlog(target) if value.symlog else target
    first = gaussian(value, location)
    step = max(1.0, float(value.sigma)) * width
    step = step if first @ centres < target else -step
    second = gaussian(value, np.clip(location + step, edges[0], edges[-1]))
    low, high = first @ centres, second @ centres
    weight = 0.0 if low == high else np.clip((target - low) / (high - low), 0, 1)
    return (1 - weight) * first + weight * second


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random(*shape, scale=1.0, seed=0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32)


HISTOGRAMS = [
    HLGauss(),
    HLGauss(11, -1.0, 3.0, sigma=0.3),
    HLGauss(21, 0.0, 1.0, sigma=2.0),
    HLGauss(51, -1e3, 1e3, symlog=True),
    HLGauss(31, -10.0, 1e5, symlog=True, sigma=1.5),
]


def targets_of(value, number=150):
    """Over all of the range, ends included, and some beyond."""
    edges, _ = bins(value)
    beyond = 0.05 * (edges[-1] - edges[0])
    x = np.linspace(edges[0] - beyond, edges[-1] + beyond, number)
    return (np_symexp(x) if value.symlog else x).astype(np.float32)


@pytest.mark.parametrize("value", HISTOGRAMS)
def test_projection_equals_a_slow_one(value):
    targets = targets_of(value)
    expected = np.stack([slow_projection(value, target) for target in targets])
    # Half a dozen roundings of numbers up to 1, and of the location by as much as it is precise.
    edges, _ = bins(value)
    location = np.abs(edges).max() / (edges[1] - edges[0]) / float(value.sigma)
    tolerance = (20 + 4 * location) * np.finfo(np.float32).eps
    np.testing.assert_allclose(project(value, targets), expected, atol=tolerance)


@pytest.mark.parametrize("value", HISTOGRAMS)
def test_mass_sums_to_one_and_keeps_the_mean(value):
    targets = targets_of(value)
    mass = np.asarray(project(value, targets), np.float64)
    assert np.all(mass >= 0)
    np.testing.assert_allclose(mass.sum(-1), 1, atol=2e-6)
    edges, centres = bins(value)
    # The mean can be that of any target between those of Gaussians around the ends.
    low, high = (gaussian(value, end) @ centres for end in (edges[0], edges[-1]))
    inside = (targets > low) & (targets < high)
    assert inside.mean() > 0.7
    means = mass @ centres
    # Rounding, of locations as precise as the edges: under symlog it is relative to the target.
    precision = 50 * np.finfo(np.float32).eps * np.abs(edges).max()
    slope = 1 + np.abs(targets) if value.symlog else np.ones_like(targets)
    np.testing.assert_array_less(np.abs(means - targets)[inside], (precision * slope)[inside])
    np.testing.assert_allclose(means[targets <= low], low, rtol=1e-3)
    np.testing.assert_allclose(means[targets >= high], high, rtol=1e-3)


def test_away_from_the_ends_it_is_the_papers():
    """There a Gaussian keeps its mean to exp(-2π²σ²) / π widths, the first Fourier coefficient
    of what rounding to the centres of bins does to it, and the mixture differs by no more."""
    value = HLGauss(41, -4.0, 4.0)
    edges, centres = bins(value)
    width = edges[1] - edges[0]
    targets = np.linspace(-3, 3, 101)
    plain = np.stack([gaussian(value, target) for target in targets])
    bound = np.exp(-2 * np.pi**2 * 0.75**2) / np.pi
    assert np.abs(plain @ centres - targets).max() <= 1.01 * bound * width
    ours = project(value, targets.astype(np.float32))
    np.testing.assert_allclose(ours, plain, atol=bound + 2e-5)


def test_without_width_it_is_two_hot():
    value = HLGauss(4, 0.0, 4.0, sigma=1e-3)
    mass = project(value, jnp.array([0.5, 0.8, 2.1, 3.5]))
    expected = [[1, 0, 0, 0], [0.7, 0.3, 0, 0], [0, 0.4, 0.6, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(mass, expected, atol=1e-5)


@pytest.mark.parametrize("value", HISTOGRAMS[2:4])
def test_cross_entropy_and_its_gradient(value):
    raw = random(20, value.num_bins, scale=3)
    targets = random(20, 2, scale=4, seed=1)
    mass = np.asarray(project(value, targets), np.float64)
    expected = np.zeros(20)
    for row in range(20):
        for sample in range(2):
            expected[row] -= mass[row, sample] @ log_softmax(raw[row]) / 2
    np.testing.assert_allclose(loss_of(value, raw, targets), expected, 1e-4)
    gradient, to_targets = slope_of(value, raw, targets)
    np.testing.assert_allclose(gradient, np.exp(log_softmax(raw)) - mass.mean(1), atol=1e-5)
    np.testing.assert_array_equal(to_targets, 0)


def test_expected_returns_of_histograms():
    for value in HISTOGRAMS:
        raw = random(9, value.num_bins, scale=2)
        expected = np.exp(log_softmax(raw)) @ bins(value)[1]
        ours = expected_of(value, raw)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(samples_of(value, raw)[:, 0], ours, rtol=1e-5, atol=1e-6)


def test_a_histogram_learns_its_target():
    """Descent of the loss leads to the expected return: also where a plain Gaussian's is off."""
    value = HLGauss(51, -1e3, 1e3, symlog=True)
    targets = jnp.array([-500.0, -3.0, 0.0, 0.2, 70.0, 600.0])
    slope = jax.grad(lambda raw: value.loss(raw, targets[:, None])[0].sum())
    raw = jax.lax.fori_loop(0, 3000, lambda _, raw: raw - slope(raw), jnp.zeros((6, 51)))
    np.testing.assert_allclose(value.expected(raw), targets, rtol=0.01, atol=0.01)
    plain = np.array([gaussian(value, np_symlog(x)) @ bins(value)[1] for x in (70.0, 600.0)])
    assert np.all(plain > 1.015 * np.array([70.0, 600.0]))


def test_symlog_and_back():
    x = np.concatenate([-np.logspace(-6, 8, 50), [0.0], np.logspace(-6, 8, 50)]).astype(np.float32)
    np.testing.assert_allclose(symlog(jnp.asarray(x)), np_symlog(x), rtol=1e-5)
    np.testing.assert_allclose(symexp(symlog(jnp.asarray(x))), x, rtol=1e-5)


def test_targets_out_of_range_are_counted_and_clipped():
    value = HLGauss(11, -1.0, 2.0)
    targets = jnp.array([[-1.0, 2.0], [-1.1, 0.0], [5.0, -jnp.inf]])
    _, metrics = value.loss(jnp.zeros((3, 11)), targets)
    np.testing.assert_array_equal(metrics["out_of_range"], [0, 0.5, 1])
    clipped = project(value, jnp.array([-1.0, 2.0]))
    np.testing.assert_array_equal(project(value, jnp.array([-jnp.inf, 7.0])), clipped)


@pytest.mark.parametrize("value", EVERY)
def test_a_joint_action_is_worth_the_mean_of_its_factors(value):
    raw = random(6, 3, value.num_outputs, scale=2)
    joined = join(value, raw)
    assert joined.shape == (6, value.num_outputs)
    expected = expected_of(value, raw)
    np.testing.assert_allclose(expected_of(value, joined), expected.mean(-1), rtol=1e-4, atol=1e-4)
    alone = expected_of(value, join(value, raw[:, :1]))  # of one factor, the action itself
    np.testing.assert_allclose(alone, expected[:, 0], rtol=1e-4, atol=1e-4)


def test_join_of_histograms_mixes_distributions_and_of_quantiles_their_values():
    raw = random(4, 3, 7)
    mixed = np.exp(log_softmax(raw)).mean(1)
    np.testing.assert_allclose(np.exp(join(HLGauss(7, -3.0, 5.0), raw)), mixed, rtol=1e-5)
    raw = random(4, 3, 5)
    np.testing.assert_allclose(join(Quantile(5), raw), raw.mean(1), rtol=1e-5)


def huber(error):
    return 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5


@pytest.mark.parametrize(
    ("name", "loss", "slope"),
    [
        ("half_squared", lambda e: 0.5 * e**2, lambda e: -e),
        ("squared", lambda e: e**2, lambda e: -2 * e),
        ("huber", huber, lambda e: -np.clip(e, -1, 1)),
    ],
)
def test_scalar_losses(name, loss, slope):
    value, raw, targets = Scalar(name), random(30, 1, scale=2), random(30, 1, scale=2, seed=1)
    ours = loss_of(value, raw, targets)
    gradient, _ = slope_of(value, raw, targets)
    for i, error in enumerate((targets - raw)[:, 0].astype(np.float64)):
        np.testing.assert_allclose(ours[i], loss(error), rtol=1e-5)
        np.testing.assert_allclose(gradient[i, 0], slope(error), rtol=1e-5)
    np.testing.assert_array_equal(expected_of(value, raw), raw[:, 0])
    np.testing.assert_array_equal(value.samples(jnp.asarray(raw)), raw)
    assert value.loss(jnp.asarray(raw), jnp.asarray(targets))[1] == {}


def test_rescaled_returns():
    """h and its inverse in double precision, and the loss between what h makes of returns."""

    def h(x):
        return np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + 1e-3 * x

    def inverse(x):
        root = (np.sqrt(1 + 4e-3 * (np.abs(x) + 1 + 1e-3)) - 1) / 2e-3
        return np.sign(x) * (root**2 - 1)

    value = Rescaled()
    returns = np.array([-3e4, -12.0, -1e-3, 0.0, 0.5, 7.0, 1e5])
    np.testing.assert_allclose(inverse(h(returns)), returns, rtol=1e-9, atol=1e-9)
    raw = h(returns).astype(np.float32)[:, None]
    np.testing.assert_allclose(expected_of(value, raw), returns, rtol=1e-5, atol=1e-6)
    targets = returns[::-1, None].astype(np.float32)
    loss = 0.5 * (h(returns[::-1]) - h(returns)) ** 2
    np.testing.assert_allclose(loss_of(value, raw, targets), loss, rtol=1e-4, atol=1e-8)
    small = np.array([[1e-6], [-1e-4]], np.float32)
    np.testing.assert_allclose(
        expected_of(value, small), inverse(small[:, 0].astype(float)), rtol=1e-4
    )
    slopes = jax.grad(value.expand)(0.0), jax.grad(value.squash)(0.0)
    np.testing.assert_allclose(slopes, (1 / 0.501, 0.501), rtol=1e-6)


@pytest.mark.parametrize("value", EVERY, ids=str)
def test_raw_numbers_of_means_expect_them(value):
    means = jnp.array([-40.0, 0.0, 3.5])
    raw, learnt_as = value.of_means(means)
    np.testing.assert_allclose(learnt_as.expected(raw), means, rtol=1e-5)
    assert type(learnt_as) is (type(value) if value.num_outputs == 1 else Scalar)


def test_quantile_loss_equals_loops():
    value, raw, targets = Quantile(5), random(4, 5, scale=2), random(4, 3, scale=2, seed=1)
    ours = loss_of(value, raw, targets)
    for row in range(4):
        loss = 0.0
        for i in range(5):
            for target in targets[row]:
                error = target - raw[row, i]
                loss += abs((i + 0.5) / 5 - (error < 0)) * huber(error) / 3
        np.testing.assert_allclose(ours[row], loss, rtol=1e-5)
    np.testing.assert_array_equal(value.samples(jnp.asarray(raw)), raw)
    np.testing.assert_allclose(expected_of(value, raw), raw.mean(1), rtol=1e-6)


@pytest.mark.parametrize("value", EVERY)
def test_losses_and_gradients_of_extreme_inputs_are_finite(value):
    numbers = jnp.array([-1e15, -1.0, 0.0, 1e-20, 1e15])
    raw = jnp.stack(jnp.meshgrid(numbers, numbers), -1).reshape(-1, 2)
    raw = jnp.resize(raw, (25, value.num_outputs))
    for target in numbers:
        targets = jnp.full((25, 1), target)
        assert np.all(np.isfinite(loss_of(value, raw, targets)))
        assert np.all(np.isfinite(slope_of(value, raw, targets)[0]))
    assert np.all(np.isfinite(expected_of(value, raw)))
    assert np.all(np.isfinite(join(value, raw[:, None])))


@pytest.mark.parametrize("sigma", [1e-3, 1e3])
def test_projections_of_any_width_are_distributions(sigma):
    for value in (HLGauss(51, sigma=sigma), HLGauss(51, -1e6, 1e6, sigma=sigma, symlog=True)):
        mass = project(value, targets_of(value))
        np.testing.assert_allclose(mass.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("value", EVERY)
def test_leading_axes(value):
    raw, targets = random(3, 4, value.num_outputs), random(3, 4, 2, seed=1)
    rows = [[loss_of(value, raw[i, j], targets[i, j]) for j in range(4)] for i in range(3)]
    np.testing.assert_allclose(loss_of(value, raw, targets), np.array(rows), rtol=1e-5, atol=1e-6)
    assert expected_of(value, raw).shape == (3, 4)
    assert join(value, raw).shape == (3, value.num_outputs)


def test_ranges_of_many_members_at_once():
    ends = jnp.array([1.0, 30.0])
    values = eqx.filter_vmap(lambda v_max: HLGauss(11, 0.0, v_max))(ends)
    targets = jnp.array([0.5, 12.0])
    together = eqx.filter_vmap(project)(values, targets)
    for i in range(2):
        alone = project(HLGauss(11, 0.0, float(ends[i])), targets[i])
        np.testing.assert_allclose(together[i], alone, atol=1e-6)


def test_another_range_or_width_compiles_nothing():
    traces = []

    @eqx.filter_jit
    def loss(value, raw, targets):
        traces.append(1)
        return value.loss(raw, targets)[0]

    raw, targets = jnp.asarray(random(3, 11)), jnp.asarray(random(3, 1))
    first = loss(HLGauss(11), raw, targets)
    assert not np.allclose(loss(HLGauss(11, sigma=1.5), raw, targets), first)
    assert not np.allclose(loss(HLGauss(11, -2.0, 2.0), raw, targets), first)
    assert len(traces) == 1


def test_made_by_name_by_mapping_or_given():
    assert eqx.tree_equal(make_value("scalar"), Scalar("half_squared"))
    assert eqx.tree_equal(make_value({"name": "scalar", "td_loss": "huber"}), Scalar("huber"))
    made = make_value({"name": "hl_gauss", "v_max": 3.0, "num_bins": None, "sigma": None})
    assert eqx.tree_equal(made, HLGauss(v_max=3.0))
    assert make_value({"name": "quantile", "num_quantiles": 3}).num_outputs == 3
    assert make_value(made) is made
    assert all(isinstance(make_value(name), AbstractValue) for name in ("hl_gauss", "quantile"))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("hlgauss", UnknownNameError, "unknown value 'hlgauss': the nearest are hl_gauss"),
        ({"name": "hl_gauss", "bins": 3}, UnknownNameError, "'bins': the nearest are num_bins"),
        ({"name": "scalar", "td_loss": "hube"}, UnknownNameError, "nearest are huber"),
        (
            {"v_max": 3.0},
            UsageError,
            "is not a name: give one of hl_gauss, quantile, rescaled",
        ),
        ({"name": "hl_gauss", "v_min": 10.0}, UsageError, "v_min=10.0 is not below v_max=10.0"),
        ({"name": "hl_gauss", "sigma": 0.0}, UsageError, "sigma=0.0 is out of range"),
        ({"name": "hl_gauss", "v_max": math.inf}, UsageError, "v_max=inf is out of range"),
        ({"name": "hl_gauss", "num_bins": 1}, UsageError, "num_bins must be .* at least 2, got 1"),
        ({"name": "quantile", "num_quantiles": 0}, UsageError, "num_quantiles must be .* got 0"),
        ({"name": "hl_gauss", "symlog": 3}, UsageError, "value.symlog=3: give true or false"),
        ({"name": "hl_gauss", "sigma": "a"}, UsageError, "value 'hl_gauss' cannot have sigma=a: "),
        ({"name": "scalar", "td_loss": [1]}, UsageError, "value 'scalar' cannot have td_loss="),
    ],
)
def test_what_cannot_be_made(given, error, message):
    with pytest.raises(error, match=message):
        make_value(given)
