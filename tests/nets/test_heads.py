"""Heads against their formulas."""

import jax
import numpy as np
import pytest

from eqx_q.nets.heads import HEADS, dueling

pytestmark = pytest.mark.quick

X = jax.random.normal(jax.random.key(1), (4, 5))


@pytest.mark.parametrize("choices", [(3,), (3, 2, 4)])
@pytest.mark.parametrize("num_values", [1, 6])
def test_dueling_is_the_formula(choices, num_values):
    head = dueling(5, choices, num_values, key=jax.random.key(0), init="lecun_normal")
    values, _ = head(X, head.initial_statistics())
    value, advantage = np.asarray(head.value(X, None)[0]), np.asarray(head.advantage(X, None)[0])
    assert value.shape == (4, num_values) and values.shape == (4, sum(choices), num_values)
    advantage = advantage.reshape(values.shape)
    start = 0
    for n in choices:
        factor = slice(start, start + n)
        mean = advantage[:, factor].mean(1, keepdims=True)
        expected = value[:, None] + advantage[:, factor] - mean
        np.testing.assert_allclose(values[:, factor], expected, rtol=1e-5, atol=1e-6)
        # The mean over choices is the value: the two are identifiable.
        np.testing.assert_allclose(values[:, factor].mean(1), value, rtol=1e-5, atol=1e-6)
        start += n


@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_keeps_no_statistics(name):
    head = HEADS[name](5, (3, 2), 2, key=jax.random.key(0), init="orthogonal")
    before = head.initial_statistics()
    values, after = head(X, before)
    assert values.shape == (4, 5, 2) and not jax.tree.leaves(before)
    assert jax.tree.structure(before) == jax.tree.structure(after)
