"""Explorations: frequencies of choices against probabilities, and memory step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_q.agents.exploration import (
    EXPLORATIONS,
    AbstractExploration,
    EpsilonGreedy,
    EpsilonZGreedy,
    LaneEpsilons,
    make_exploration,
)
from eqx_q.errors import UsageError

pytestmark = pytest.mark.quick

R = 20_000
MAY_BE_OFF = 4 * 0.5 / np.sqrt(R)  # four standard deviations of a frequency, at most
VALUES = np.array([[0.3, 1.0, -2.0], [0.5, -0.5, -np.inf]], np.float32)  # the second has two
LEGAL = np.array([[True, False, True], [True, True, False]])


def draw(exploration, values, epsilon, *, key=0, memory=None, first=None, is_legal=None):
    """Of rows `[R, F, C]`; `is_legal` is taken from the values where it is "of values"."""
    values = jnp.asarray(values)
    memory = exploration.initial_memory(*values.shape[:2]) if memory is None else memory
    is_legal = values != -jnp.inf if is_legal == "of values" else None
    index, memory = exploration(values, epsilon, jax.random.key(key), memory, first, is_legal)
    return np.asarray(index), memory


def legal(values, mask):
    """Values of illegal actions are -inf, unless nothing is legal."""
    return (
        values if mask is None else jnp.where(mask | ~mask.any(-1, keepdims=True), values, -jnp.inf)
    )


def rows(values, count=R):
    return np.broadcast_to(values, (count, *np.shape(values)))


def frequencies(index, num_choices=3):
    """`[F, C]`: how often each factor makes each choice."""
    return np.mean(index[..., None] == np.arange(num_choices), axis=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lanes", [(), (7,), (5, 3)])
@pytest.mark.parametrize("epsilon", [0.0, 0.4, 1.0])
def test_one_factor_draws_bit_by_bit_what_actions_without_factors_drew(lanes, masked, epsilon):
    rng = np.random.default_rng(0)
    q_values = jnp.asarray(rng.normal(size=(*lanes, 4)), jnp.float32)
    mask = jnp.asarray(rng.random((*lanes, 4)) < 0.5) if masked else None
    q_values, key = legal(q_values, mask), jax.random.key(3)
    if mask is None:
        explore, choice = jax.random.uniform(key, (2, *lanes))
        random = jnp.floor(choice * 4)
    else:
        explore_key, choice_key = jax.random.split(key)
        explore = jax.random.uniform(explore_key, lanes)
        choice = jax.random.uniform(choice_key, (*lanes, 4))
        random = jnp.argmax(legal(choice, mask), -1)
    expected = jnp.where(explore < epsilon, random, jnp.argmax(q_values, -1))
    is_legal = "of values" if masked else None
    index, _ = draw(EpsilonGreedy(), q_values.reshape(-1, 1, 4), epsilon, key=3, is_legal=is_legal)
    np.testing.assert_array_equal(index.reshape(lanes), expected)


@pytest.mark.parametrize("exploration", [EpsilonGreedy(), LaneEpsilons(0.0)])
def test_each_factor_is_uniform_over_its_legal_choices_with_probability_epsilon(exploration):
    values = np.where(LEGAL, VALUES, -np.inf).astype(np.float32)
    index, memory = draw(exploration, rows(values), 0.6, is_legal="of values")
    greedy = np.array([[1, 0, 0], [1, 0, 0]])
    expected = 0.6 * LEGAL / LEGAL.sum(-1, keepdims=True) + 0.4 * greedy
    np.testing.assert_allclose(frequencies(index), expected, atol=MAY_BE_OFF)
    assert memory == ()
    # Factors stray one by one: the second is as often greedy whatever the first does.
    strayed = index[index[:, 0] != 0][:, 1]
    np.testing.assert_allclose(np.mean(strayed == 0), 0.7, atol=2 * MAY_BE_OFF)


def test_without_a_mask_all_choices_come():
    values = VALUES[:1]
    index, _ = draw(EpsilonGreedy(), rows(values), 0.6)
    np.testing.assert_allclose(frequencies(index), [[0.2, 0.6, 0.2]], atol=MAY_BE_OFF)


@pytest.mark.parametrize("name", EXPLORATIONS)
def test_at_0_all_are_greedy_and_at_1_nothing_illegal_comes(name):
    exploration, rng = make_exploration(name), np.random.default_rng(0)
    values = rng.normal(size=(500, 3, 4)).astype(np.float32)
    values[rng.random(values.shape) < 0.5] = -np.inf
    values[..., 1] = np.where((values == -np.inf).all(-1), 0.0, values[..., 1])
    for is_legal in (None, "of values"):
        index, _ = draw(exploration, values, 0.0, is_legal=is_legal)
        np.testing.assert_array_equal(index, values.argmax(-1))
    memory = exploration.initial_memory(500, 3)
    for key in range(3):
        shuffled = values[rng.permutation(500)]  # what is remembered may have become illegal
        index, memory = draw(
            exploration, shuffled, 1.0, key=key, memory=memory, is_legal="of values"
        )
        assert (np.take_along_axis(shuffled, index[..., None], -1) > -np.inf).all()


def test_each_row_has_its_own_epsilon():
    values, count = rows([[1.0, 0.0]], 4), 5000
    keys = jax.random.split(jax.random.key(0), count)
    exploration = LaneEpsilons(alpha=3.0)
    index = jax.vmap(lambda key: exploration(jnp.asarray(values), 0.5, key, ())[0])(keys)
    expected = 0.5 ** (1 + 3.0 * np.arange(4) / 3) / 2  # half of what is drawn is the best
    np.testing.assert_allclose(np.mean(index[..., 0], axis=0), expected, atol=2 / np.sqrt(count))
    assert draw(exploration, rows([[1.0, 0.0]], 1), 1.0, key=4)[0].shape == (1, 1)


@pytest.mark.parametrize(("mu", "longest"), [(2.0, 50), (1.2, 8), (0.0, 5)])
def test_durations_are_zeta_distributed(mu, longest):
    """Counted as steps in which the choice stays, with ε = 0 after the first."""
    exploration, values = EpsilonZGreedy(mu, longest), rows([[0.0, 1.0, 0.5]])
    index, memory = draw(exploration, values, 1.0)
    np.testing.assert_allclose(frequencies(index), np.full((1, 3), 1 / 3), atol=MAY_BE_OFF)
    chose, duration = index, np.ones(index.shape, int)
    repeats = index != 1  # those who repeat what is best cannot be told from the greedy
    for _ in range(longest):
        index, memory = draw(exploration, values, 0.0, memory=memory)
        repeats &= index == chose
        duration += repeats
    assert not repeats.any() and not np.asarray(memory.remaining).any()
    counts = np.bincount(duration[chose != 1], minlength=longest + 1)[1:]
    weights = np.arange(1.0, longest + 1) ** -mu
    np.testing.assert_allclose(
        counts / counts.sum(), weights / weights.sum(), atol=MAY_BE_OFF * np.sqrt(1.5)
    )


def test_what_is_repeated_step_by_step():
    """Against a loop over rows: forgotten at a start, and where it is no longer legal."""
    exploration, rng = EpsilonZGreedy(mu=0.5, max_duration=6), np.random.default_rng(1)
    steps, count, choices = 60, 12, 3
    first = rng.random((steps, count)) < 0.1
    values = rng.normal(size=(steps, count, 2, choices)).astype(np.float32)
    illegal = (rng.random(values.shape) < 0.08) & (values < values.max(-1, keepdims=True))
    values[illegal] = -np.inf
    memory, choice = exploration.initial_memory(count, 2), np.zeros((count, 2), int)
    remaining, seen = np.zeros((count, 2), int), {"repeats": 0, "forgets": 0, "begins": 0}
    for t in range(steps):
        index, memory = draw(
            exploration, values[t], 0.3, key=t, memory=memory, first=jnp.asarray(first[t]),
            is_legal="of values",
        )  # fmt: skip
        new = np.asarray(memory.remaining)
        for r in range(count):
            for f in range(2):
                lost = first[t, r] or values[t, r, f, choice[r, f]] == -np.inf
                if remaining[r, f] and not lost:
                    assert (index[r, f], new[r, f]) == (choice[r, f], remaining[r, f] - 1)
                    seen["repeats"] += 1
                elif index[r, f] != values[t, r, f].argmax() or new[r, f]:
                    assert values[t, r, f, index[r, f]] > -np.inf and 0 <= new[r, f] < 6
                    seen["begins"] += 1
                if remaining[r, f] and lost:
                    seen["forgets"] += 1
        choice, remaining = index, new
    assert all(count > 20 for count in seen.values())


def test_numbers_are_leaves_that_may_differ_under_vmap():
    values, key = jnp.asarray(rows([[1.0, 0.0]], 64)), jax.random.key(0)
    traces = []

    @jax.jit
    def explore(exploration):
        traces.append(exploration)
        return exploration(values, 0.5, key, ())[0]

    one, other = explore(LaneEpsilons(0.0)), explore(LaneEpsilons(5.0))
    assert len(traces) == 1 and one.sum() > other.sum()
    both = jax.vmap(LaneEpsilons)(jnp.array([0.0, 5.0]))
    np.testing.assert_array_equal(jax.vmap(explore)(both), [one, other])


def test_a_name_a_mapping_or_an_object():
    assert isinstance(make_exploration("epsilon_greedy"), EpsilonGreedy)
    made = make_exploration({"name": "ez_greedy", "mu": 3, "max_duration": 9})
    assert isinstance(made, EpsilonZGreedy) and (made.mu, made.max_duration) == (3.0, 9)

    class First(AbstractExploration):
        def initial_memory(self, num_rows, num_factors=1):
            return ()

        def __call__(self, q_values, epsilon, key, memory, first=None, is_legal=None):
            return jnp.zeros(q_values.shape[:2], jnp.int32), memory

    assert isinstance(make_exploration(First()), First)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("epsilon_gredy", "unknown exploration 'epsilon_gredy': the nearest are epsilon_greedy"),
        ({"name": "ez_greedy", "my": 2.0}, "unknown option of exploration 'ez_greedy': 'my'"),
        ({"name": "epsilon_greedy", "alpha": 1.0}, "known are none"),
        ({"mu": 2.0}, r"is not a name: give one of .*epsilon_greedy.*, or a mapping"),
        ({"name": "ez_greedy", "mu": -1.0}, "exploration.mu=-1.0 is out of range: give"),
        ({"name": "lane_epsilons", "alpha": float("nan")}, "alpha=nan is out of range"),
        ({"name": "ez_greedy", "max_duration": 0}, "max_duration must be a whole number of at"),
        ({"name": "ez_greedy", "mu": "a"}, "'ez_greedy' cannot have mu=a: "),
    ],
)
def test_what_cannot_be_says_what_can(given, message):
    with pytest.raises(UsageError, match=message):
        make_exploration(given)


def test_memory_of_other_rows_is_refused():
    with pytest.raises(UsageError, match=r"memory has \(5, 1\) rows and factors, not \(5, 2\)"):
        draw(EpsilonZGreedy(), rows(VALUES, 5), 0.1, memory=EpsilonZGreedy().initial_memory(5))
