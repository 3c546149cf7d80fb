"""Heads against their formulas."""

import jax
import numpy as np
import pytest

from eqx_q.nets.heads import HEADS, dueling


def test_dueling_is_the_formula():
    head = dueling(5, 3, key=jax.random.key(0), init="lecun_normal")
    x = jax.random.normal(jax.random.key(1), (4, 5))
    q_values, _ = head(x, head.initial_statistics())
    value, _ = head.value(x)
    advantage, _ = head.advantage(x)
    assert value.shape == (4, 1) and advantage.shape == (4, 3)
    expected = value + advantage - np.mean(advantage, axis=1, keepdims=True)
    np.testing.assert_allclose(q_values, expected, rtol=1e-5, atol=1e-6)
    # The mean over actions is the value: the two are identifiable.
    np.testing.assert_allclose(np.mean(q_values, 1), value[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_keeps_no_statistics(name):
    head = HEADS[name](5, 3, key=jax.random.key(0), init="orthogonal")
    assert head.initial_statistics() is None
