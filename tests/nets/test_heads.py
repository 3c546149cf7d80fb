"""Heads against their formulas."""

import jax
import numpy as np
import pytest

from eqx_q.nets.heads import HEADS, Hidden, dueling

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


@pytest.mark.parametrize("name", list(HEADS))
def test_hidden_layers_of_a_head(name):
    hidden = Hidden((7, 6), norm="none", activation="tanh")
    head = HEADS[name](5, (3,), 2, key=jax.random.key(0), init="orthogonal", hidden=hidden)
    streams = [head.linear] if name == "linear" else [head.value, head.advantage]
    assert [linear.bias.size for stream in streams for linear in stream.layers[::3]] == (
        [7, 6, 6] if name == "linear" else [7, 6, 2, 7, 6, 6]
    )
    for stream in streams:
        x = np.asarray(X)
        for i, layer in enumerate(stream.layers[::3]):
            weight = layer.weight.T if layer.transposed else layer.weight
            x = x @ np.asarray(weight) + np.asarray(layer.bias)
            x = x if i == 2 else np.tanh(x)
        np.testing.assert_allclose(
            stream(X, stream.initial_statistics())[0], x, rtol=1e-5, atol=1e-6
        )
