"""Torsos against NumPy, and the networks built with them."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import call, make

from eqx_q.errors import UsageError
from eqx_q.nets.torsos import Simplicial, multi_skip

KEY = jax.random.key(0)
VECTOR = gymnasium.spaces.Box(-1, 1, (5,), np.float32)
CELLS = gymnasium.spaces.Box(0, 1, (10, 10, 4), np.float32)


def linear(layer, x):
    return x @ (layer.weight.T if layer.transposed else layer.weight) + layer.bias


def layer_norm(layer, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + layer.epsilon)
    return x * layer.scale + layer.bias


def test_every_block_of_a_multi_skip_torso_sees_the_first_features():
    torso = multi_skip(5, key=KEY, size=8, num_blocks=3)
    x = jax.random.normal(KEY, (4, 5))
    y, _ = torso(x, torso.initial_statistics())
    torso, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (torso, x))
    h = z = layer_norm(torso.first.layers[1], linear(torso.first.layers[0], x))
    for block in torso.blocks:
        inner = linear(block.layers[1], np.maximum(h, 0))
        inner = np.maximum(layer_norm(block.layers[2], inner), 0)
        h = h + layer_norm(block.layers[5], linear(block.layers[4], inner)) + z
    np.testing.assert_allclose(y, np.maximum(h, 0), rtol=1e-4, atol=1e-5)


def test_statistics_of_a_multi_skip_torso_are_those_of_its_layers():
    torso = multi_skip(5, key=KEY, size=8, num_blocks=2, norm="batch_norm")
    x = 3 + jax.random.normal(KEY, (64, 5))
    _, after = torso(x, torso.initial_statistics(), jnp.ones(64, bool))
    counts = [leaf for leaf in jax.tree.leaves(after) if leaf.dtype == jnp.int32]
    assert [int(count) for count in counts] == [1] * 5


def test_simplicial_embedding_is_a_softmax_of_each_group():
    x = jax.random.normal(KEY, (4, 6))
    y, _ = Simplicial(3, temperature=0.5)(x, None)
    for row, of_row in zip(np.float64(x), y, strict=True):
        for group in (slice(0, 3), slice(3, 6)):
            expected = np.exp(row[group] / 0.5)
            np.testing.assert_allclose(of_row[group], expected / expected.sum(), rtol=1e-5)


@pytest.mark.parametrize(("name", "space"), [("mlp", VECTOR), ("minatar_cnn", CELLS)])
def test_a_torso_takes_the_place_of_hidden_layers(name, space):
    options = {"torso": "multi_skip", "torso_options": {"size": 16, "num_blocks": 1}}
    network = make(name, space, 2, key=KEY, simplex_size=4, **options)
    features = 5 if name == "mlp" else 8 * 8 * 16
    leaves = jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
    conv = 0 if name == "mlp" else 9 * 4 * 16 + 3 * 16
    torso = (features * 16 + 3 * 16) + 2 * (16 * 16 + 3 * 16)
    assert sum(leaf.size for leaf in leaves) == conv + torso + 16 * 2 + 2
    obs = jax.random.uniform(KEY, (3, 2, *space.shape))
    out = call(network, obs)
    np.testing.assert_allclose(np.sum(out.features, -1), 4, rtol=1e-5)  # 4 groups
    assert np.std(out.values[..., 0, 0]) > 1e-4


def test_its_layers_share_the_encoders_options_unless_it_has_its_own():
    options = {"torso": "multi_skip", "norm": "batch_norm"}
    network = make("mlp", VECTOR, 2, key=KEY, **options)
    assert jax.tree.leaves(network.initial_statistics())
    own = make("mlp", VECTOR, 2, key=KEY, **options, torso_options={"norm": "none"})
    assert not jax.tree.leaves(own.initial_statistics())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torso": "multi"}, "unknown torso 'multi': the nearest are multi_skip"),
        ({"torso": "multi_skip", "torso_options": {"blocks": 2}}, "nearest are num_blocks"),
        ({"torso_options": {"size": 2}}, "unknown option of torso 'none'"),
        (
            {"torso": "multi_skip", "torso_options": {"num_blocks": 0}},
            "num_blocks must be a whole number",
        ),
        ({"simplex_size": 3}, "simplex_size=3 does not divide 256 features"),
        ({"simplex_size": 0}, "simplex_size must be a whole number"),
        (
            {"simplex_size": 4, "simplex_temperature": 0.0},
            "simplex_temperature=0.0: give a positive number",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        make("mlp", VECTOR, 2, key=KEY, **options)
