"""Choices of factored actions against brute force over every joint action."""

import itertools

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_q import PQN
from eqx_q.agents.actions import Actions, as_bins
from eqx_q.agents.mixers import Independent
from eqx_q.agents.model import Model
from eqx_q.agents.values import HLGauss, Quantile, Scalar
from eqx_q.errors import UsageError
from eqx_q.nets.network import FromModule
from eqx_q.spaces import of_actions, of_observations

spaces = gymnasium.spaces
LOW, HIGH = np.float32([-1.7, -2.0, 0.3]), np.float32([0.3, 2.0, 1e3])


def actions_of(space, bins=2):
    return Actions(of_actions(space), as_bins(bins))


def box(dtype=np.float32):
    return spaces.Box(LOW.astype(dtype), HIGH.astype(dtype), dtype=dtype)


DISCRETE = [
    (spaces.Discrete(4), (4,)),
    (spaces.Discrete(3, start=-1), (3,)),
    (spaces.MultiDiscrete([2, 4, 3]), (2, 4, 3)),
    (spaces.MultiDiscrete([3, 3], start=[5, -2]), (3, 3)),
    (spaces.MultiDiscrete([[2, 1], [3, 2]], start=[[0, 1], [2, 3]]), (2, 1, 3, 2)),
    (spaces.MultiBinary(3), (2, 2, 2)),
    (spaces.MultiBinary([2, 2]), (2, 2, 2, 2)),
]
BOXES = [
    (box(), 2, (2, 2, 2)),
    (box(np.float64), 3, (3, 3, 3)),
    (box(), [2, 5, 3], (2, 5, 3)),
    (spaces.Box(-1, 1, (2, 1), np.float32), (3, 4), (3, 4)),
    (spaces.Box(-1, 1, (), np.float32), 3, (3,)),
]
EVERY = [(space, 2, choices) for space, choices in DISCRETE] + BOXES
UNEVEN = [spaces.MultiDiscrete([2, 4, 3]), spaces.MultiDiscrete([[2, 1], [3, 2]])]
FACTORED = [*UNEVEN, spaces.MultiBinary(3), spaces.Discrete(4)]


def every_index(choices):
    return np.array(list(itertools.product(*map(range, choices))), np.int32)


@pytest.mark.parametrize(("space", "bins", "choices"), EVERY)
def test_every_choice_makes_another_action_of_the_space_and_comes_back(space, bins, choices):
    actions, index = actions_of(space, bins), every_index(choices)
    assert actions.choices == choices
    assert (actions.num_factors, actions.num_choices) == (len(choices), sum(choices))
    made = np.asarray(actions.decode(jnp.asarray(index)))
    assert made.shape == (len(index), *space.shape)
    assert all(space.contains(np.asarray(action, space.dtype)) for action in made)
    assert len(np.unique(made.reshape(len(made), -1), axis=0)) == len(index)
    for given in (made, made.astype(space.dtype)):  # as acting gives it, and as it is recorded
        np.testing.assert_array_equal(actions.encode(given), index)
    # With other axes before, or none.
    np.testing.assert_array_equal(actions.decode(jnp.asarray(index[-1])), made[-1])
    twice = actions.encode(np.stack([made, made[::-1]]))
    np.testing.assert_array_equal(twice, np.stack([index, index[::-1]]))


def test_actions_count_from_their_start():
    decode = lambda space, *index: np.asarray(actions_of(space).decode(jnp.array(index)))  # noqa: E731
    assert decode(spaces.Discrete(3, start=-1), 0) == -1
    of_many = spaces.MultiDiscrete([[2, 1], [3, 2]], start=[[0, 1], [2, 3]])
    np.testing.assert_array_equal(decode(of_many, 1, 0, 2, 1), [[1, 1], [4, 4]])
    np.testing.assert_array_equal(decode(spaces.MultiBinary(3), 0, 1, 1), [0, 1, 1])


@pytest.mark.parametrize(("space", "bins", "choices"), BOXES)
def test_bins_lie_evenly_and_end_exactly_at_the_bounds(space, bins, choices):
    actions = actions_of(space, bins)
    low, high = space.low.astype(np.float32).ravel(), space.high.astype(np.float32).ravel()
    ends = np.stack([np.zeros(len(choices)), np.array(choices) - 1]).astype(np.int32)
    made = np.asarray(actions.decode(jnp.asarray(ends))).reshape(2, -1)
    np.testing.assert_array_equal(made, [low, high])
    for factor, size in enumerate(choices):
        index = np.zeros((size, len(choices)), np.int32)
        index[:, factor] = np.arange(size)
        made = np.asarray(actions.decode(jnp.asarray(index))).reshape(size, -1)[:, factor]
        expected = np.linspace(low[factor], high[factor], size)
        np.testing.assert_allclose(made, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("space", "bins", "choices"), BOXES)
def test_an_action_of_a_box_becomes_the_nearest(space, bins, choices):
    actions, rng = actions_of(space, bins), np.random.default_rng(0)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    given = rng.uniform(low - 0.2, high + 0.2, (50, *space.shape)).astype(np.float32)
    rows = given.reshape(50, -1)
    index = np.asarray(actions.encode(given))
    rounding, expected = np.asarray(actions.rounding(given)), np.zeros(50)
    assert rounding.shape == (50,)
    for i in range(50):
        for factor, size in enumerate(choices):
            bins_there = np.linspace(low.ravel()[factor], high.ravel()[factor], size)
            distance = np.abs(bins_there - rows[i, factor])
            assert index[i, factor] == distance.argmin()
            width = bins_there[-1] - bins_there[0]
            expected[i] += (distance.min() / width) ** 2 / len(choices)
    np.testing.assert_allclose(rounding, np.sqrt(expected), rtol=1e-4, atol=1e-6)
    assert actions.is_rounded
    np.testing.assert_allclose(actions.rounding(actions.decode(actions.encode(given))), 0)


def test_what_is_chosen_is_not_rounded():
    for space, _ in DISCRETE:
        actions = actions_of(space)
        made = actions.decode(jnp.zeros((5, actions.num_factors), jnp.int32))
        assert not actions.is_rounded
        np.testing.assert_array_equal(actions.rounding(made), np.zeros(5))


def test_a_dimension_without_a_range_does_no_harm():
    space = spaces.Box(np.float32([0, 1]), np.float32([2, 1]))
    actions = actions_of(space, 3)
    given = np.float32([[1.0, 1.0], [1.5, 1.0]])
    np.testing.assert_array_equal(actions.encode(given)[:, 0], [1, 2])
    np.testing.assert_array_equal(actions.decode(actions.encode(given)), [[1, 1], [2, 1]])
    np.testing.assert_allclose(actions.rounding(given), [0, 0.25 / np.sqrt(2)])


def by_factor(choices, row):
    """A list of each factor's."""
    ends = np.cumsum(choices)
    return [list(row[end - size : end]) for end, size in zip(ends, choices, strict=True)]


@pytest.mark.parametrize("space", FACTORED)
def test_choices_apart_by_factors(space):
    actions, rng = actions_of(space), np.random.default_rng(0)
    choices, most = actions.choices, max(actions.choices)
    x = rng.normal(size=(3, 5, actions.num_choices)).astype(np.float32)
    apart = np.asarray(actions.by_factor(jnp.asarray(x), -jnp.inf))
    assert apart.shape == (3, 5, len(choices), most)
    assert actions.has_padding == (len(set(choices)) > 1)
    for row, found in zip(x.reshape(15, -1), apart.reshape(15, len(choices), most), strict=True):
        for own, ours in zip(by_factor(choices, row), found, strict=True):
            np.testing.assert_array_equal(ours, own + [-np.inf] * (most - len(own)))


@pytest.mark.parametrize("space", FACTORED)
def test_legal_choices_by_factors(space):
    """Where nothing is legal for a factor all of its own choices are; padding never is."""
    actions, rng = actions_of(space), np.random.default_rng(0)
    choices, most = actions.choices, max(actions.choices)
    mask = rng.random((40, actions.num_choices)) < 0.4
    mask[0] = False
    legal = np.asarray(actions.legal(mask))
    assert legal.shape == (40, len(choices), most)
    for row, found in zip(mask, legal, strict=True):
        for own, ours in zip(by_factor(choices, row), found, strict=True):
            expected = own if any(own) else [True] * len(own)
            np.testing.assert_array_equal(ours, expected + [False] * (most - len(own)))
    everything = actions.legal(None)
    if not actions.has_padding:
        assert everything is None
    else:
        np.testing.assert_array_equal(everything, legal[0])


@pytest.mark.parametrize("space", FACTORED)
def test_what_belongs_to_a_choice(space):
    actions, rng = actions_of(space), np.random.default_rng(0)
    x = rng.normal(size=(2, 7, actions.num_choices, 3)).astype(np.float32)
    index = np.stack([rng.integers(0, size, (2, 7)) for size in actions.choices], -1)
    taken = np.asarray(actions.take(jnp.asarray(x), jnp.asarray(index, jnp.int32)))
    assert taken.shape == (2, 7, actions.num_factors, 3)
    before = np.cumsum(actions.choices) - actions.choices
    for i, j, factor in np.ndindex(2, 7, actions.num_factors):
        expected = x[i, j, before[factor] + index[i, j, factor]]
        np.testing.assert_array_equal(taken[i, j, factor], expected)
    for wrong in (-1, max(actions.choices)):  # of an action outside the space
        outside = actions.take(jnp.asarray(x), jnp.full_like(index, wrong, jnp.int32))
        assert np.all(np.isnan(outside))


def model_of(space, value):
    """Without a network: values are given."""
    nowhere = of_observations(spaces.Box(-1, 1, (1,)))
    network = FromModule(lambda x: x, value.num_outputs)
    return Model(network, Independent(), value, actions_of(space), nowhere, "float32")


VALUES = [Scalar(), HLGauss(7, -3.0, 5.0), Quantile(4)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("space", FACTORED[:3])
def test_the_best_choices_of_factors_make_the_best_joint_action(space, value, masked):
    """Over all joint actions: a Q-value is the mean of its factors' (Seyde et al. 2023)."""
    model, rng = model_of(space, value), np.random.default_rng(1)
    actions = model.actions
    raw = rng.normal(scale=2, size=(6, actions.num_choices, value.num_outputs)).astype(np.float32)
    expected = np.asarray(value.expected(jnp.asarray(raw)))
    mask = rng.random((6, actions.num_choices)) < 0.5 if masked else None
    legal = np.ones((6, actions.num_choices), bool)
    if masked:
        mask[0] = False
        for row, factors in enumerate(by_factor(actions.choices, row) for row in mask):
            legal[row] = [x for own in factors for x in (own if any(own) else [True] * len(own))]
    q_values = model.q_values(jnp.asarray(raw), mask)
    chosen = np.asarray(jnp.argmax(q_values, -1))
    samples = np.asarray(model.samples(jnp.asarray(raw), mask))
    every = every_index(actions.choices)
    place = every + np.cumsum(actions.choices) - actions.choices
    for row in range(6):
        worth = expected[row][place].mean(-1)
        worth[~legal[row][place].all(-1)] = -np.inf
        best = worth.argmax()
        np.testing.assert_array_equal(chosen[row], every[best])
        np.testing.assert_allclose(samples[row].mean(), worth[best], rtol=1e-4, atol=1e-5)
        if value.num_samples > 1:
            quantiles = raw[row][place[best]].mean(0)
            np.testing.assert_allclose(samples[row], quantiles, rtol=1e-5, atol=1e-6)
        # Raw values of that joint action stand for the same.
        joint = model.of_action(jnp.asarray(raw[row]), jnp.asarray(every[best]))
        np.testing.assert_allclose(value.expected(joint), worth[best], rtol=1e-4, atol=1e-5)
    # Another chooser, as in double Q-learning: its choice, these values.
    other = jnp.asarray(rng.normal(size=q_values.shape), jnp.float32)
    other = jnp.where(jnp.isfinite(q_values), other, -jnp.inf)
    samples = np.asarray(model.samples(jnp.asarray(raw), mask, other))
    place = np.asarray(other).argmax(-1) + np.cumsum(actions.choices) - actions.choices
    worth = np.take_along_axis(expected, place, -1).mean(-1)
    np.testing.assert_allclose(samples.mean(-1), worth, rtol=1e-4, atol=1e-5)


def test_actions_of_an_agent_lie_in_the_space_that_it_was_given():
    see, key = spaces.Box(-1, 1, (3,)), jax.random.key(0)
    for given in (
        spaces.Box(0, 10, (2,), np.int64),
        spaces.Box(np.array([0.1, -1e-9]), np.array([0.3, 1 / 3]), dtype=np.float64),
    ):
        agent = PQN.create(see, given, key=key, bins=3)
        obs = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
        actions = np.asarray(agent.act(obs, epsilon=1.0, key=key).action)
        assert len(np.unique(actions)) > 2
        for action in actions:
            assert given.contains(action.astype(given.dtype))


@pytest.mark.parametrize(
    ("space", "bins", "message"),
    [
        (box(), 1, r"bins=1: give a whole number of at least 2"),
        (spaces.Box(1e39, 1.1e39, (1,), np.float64), 2, "exceed float32"),
        (spaces.Box(-3e38, 3e38, (1,)), 2, "the distance between them, exceed float32"),
        (box(), [2, 0, 2], r"bins=\[2, 0, 2\]: give a whole number of at least 2, or a list"),
        (box(), 2.5, r"bins=2.5: give a whole number"),
        (box(), "abc", r"bins=abc: give a whole number"),
        (box(), None, r"bins=None: give a whole number"),
        (box(), [3, 3], r"bins=\[3, 3\] are 2 numbers, but actions have 3 dimensions"),
        (spaces.Box(0, np.inf, (2,), np.float32), 2, "has no bounds"),
        (spaces.Box(0, 1, (0,)), 2, "actions of Box.* are empty"),
        (spaces.Dict(a=spaces.Discrete(2)), 2, "MultiBinary or a bounded Box, got Dict"),
    ],
)
def test_what_cannot_be_cut(space, bins, message):
    with pytest.raises(UsageError, match=message):
        actions_of(space, bins)


def test_numbers_of_numpy_are_bins_too():
    sizes = np.array([2, 5, 3])
    assert actions_of(box(), sizes).choices == (2, 5, 3)
    assert type(as_bins(sizes[1])) is int and type(as_bins(sizes)[0]) is int


def test_of_traced_choices():
    """Under `jit` and `vmap`, as agents use them."""
    for space, bins, choices in EVERY:
        actions, index = actions_of(space, bins), jnp.asarray(every_index(choices)[-2:])
        again = jax.jit(jax.vmap(lambda x, a=actions: a.encode(a.decode(x))))(index)
        np.testing.assert_array_equal(again, index)
