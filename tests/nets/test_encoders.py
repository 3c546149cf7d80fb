"""Encoders: sizes counted by hand, and gradients that reach every parameter."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import make

from eqx_q.errors import UsageError
from eqx_q.nets import Inputs, encoders
from eqx_q.nets.encoders import ENCODERS
from eqx_q.nets.layers import NORMS

KEY = jax.random.key(0)
SPACES = {
    "mlp": gymnasium.spaces.Box(-1, 1, (4,), np.float32),
    "minatar_cnn": gymnasium.spaces.Box(0, 1, (10, 10, 4), np.float32),
    "grid_cnn": gymnasium.spaces.Box(0, 255, (5, 5, 3), np.uint8),
    "nature_cnn": gymnasium.spaces.Box(0, 255, (2, 36, 36), np.uint8),
    "gamma": gymnasium.spaces.Box(0, 255, (2, 36, 36), np.uint8),
    "gamma_hadamax": gymnasium.spaces.Box(0, 255, (2, 36, 36), np.uint8),
    "impala": gymnasium.spaces.Box(0, 255, (4, 12, 12), np.uint8),
    "hadamax": gymnasium.spaces.Box(0, 255, (4, 12, 12), np.uint8),
}
SMALL = {"impala": {"channels": (8,)}}


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array)))


OF_EVERY_NORM = [("minatar_cnn", norm) for norm in NORMS]
OF_EVERY_NETWORK = [(name, norm) for name in ENCODERS for norm in ("layer_norm", "batch_renorm")]
# Five products of unnormalised features, as with first running statistics, are as good as zero.
OF_EVERY_NETWORK.remove(("gamma_hadamax", "batch_renorm"))


@pytest.mark.parametrize(("name", "norm"), sorted({*OF_EVERY_NORM, *OF_EVERY_NETWORK}))
def test_networks_learn_with_every_norm(name, norm):
    space = SPACES[name]
    network = make(name, space, 3, key=KEY, norm=norm, hidden_sizes=(16,), **SMALL.get(name, {}))
    obs = jax.random.randint(KEY, (2, 4, *space.shape), 0, 200).astype(space.dtype)
    statistics = network.initial_statistics()

    @eqx.filter_jit
    def gradient(network, batch_mask):
        def loss(network):
            out = network(Inputs(obs, batch_mask=batch_mask), statistics, ())
            return jnp.mean(jnp.square(out.values - 1)), out

        return eqx.filter_value_and_grad(loss, has_aux=True)(network)

    (_, out), gradients = gradient(network, jnp.ones((2, 4), bool))
    assert out.values.shape == (2, 4, 3, 1)
    assert np.all(np.isfinite(out.values))
    spread = np.std(np.asarray(out.values), (0, 1)) / np.max(np.abs(out.values))
    assert np.all(spread > 1e-3)  # the observation matters
    assert jax.tree.structure(out.statistics) == jax.tree.structure(statistics)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.all(np.isfinite(leaf)), path
        # A bias right before batch normalisation has none: it is taken away with the mean.
        assert np.any(leaf) or (leaf.ndim == 1 and jax.tree.leaves(statistics)), path
    if jax.tree.leaves(statistics):  # with running statistics it is not
        _, gradients = gradient(network, None)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
            assert np.any(leaf), path


def test_parameters_of_the_mlp():
    network = make("mlp", SPACES["mlp"], 2, key=KEY)
    assert count(network) == (4 * 256 + 3 * 256) + (256 * 256 + 3 * 256) + (256 * 2 + 2)


def test_parameters_of_the_minatar_cnn():
    network = make("minatar_cnn", SPACES["minatar_cnn"], 6, key=KEY)
    conv, dense = 9 * 4 * 16 + 3 * 16, 8 * 8 * 16 * 128 + 3 * 128
    assert count(network) == conv + dense + 128 * 6 + 6


@pytest.mark.parametrize("channels_first", [False, True])
def test_the_grid_cnn_is_the_minatar_cnn_over_one_hot_cells(channels_first):
    cells = np.random.default_rng(0).integers(0, 12, (3, 7, 7, 2), np.uint8)  # 11 is unknown
    one_hot = np.concatenate([cells[..., i, None] == np.arange(11) for i in range(2)], -1)
    grid = ENCODERS["grid_cnn"](
        (2, 7, 7) if channels_first else (7, 7, 2), key=KEY, channels_first=channels_first
    )
    image = ENCODERS["minatar_cnn"]((7, 7, 22), key=KEY, channels=32)
    raw = np.moveaxis(cells, -1, 1) if channels_first else cells
    found, _ = grid(jnp.asarray(raw), grid.initial_statistics())
    expected, _ = image(jnp.asarray(one_hot), image.initial_statistics())
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_cells_of_a_grid_are_not_scaled():
    """As bytes of a picture they would be, by 1/255; nor where a team's agents are numbered."""
    space = gymnasium.spaces.Box(0, 255, (3, 3, 1), np.uint8)
    obs = np.full((1, 2, 3, 3, 1), 5, np.uint8)
    obs[0, 1] = 6
    for team in ({}, {"num_agents": 1}):
        network = make("grid_cnn", space, 2, key=KEY, hidden_sizes=(8,), **team)
        values = network(Inputs(jnp.asarray(obs)), network.initial_statistics(), ()).values
        assert np.abs(values[0, 0] - values[0, 1]).max() > 1e-2


@pytest.mark.parametrize(("padding", "pixels"), [("VALID", 7 * 7), ("SAME", 11 * 11)])
def test_parameters_of_the_nature_cnn(padding, pixels):
    space = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    network = make("nature_cnn", space, 6, key=KEY, norm="none", padding=padding)
    convs = (64 * 4 * 32 + 32) + (16 * 32 * 64 + 64) + (9 * 64 * 64 + 64)
    assert count(network) == convs + pixels * 64 * 512 + 512 + 512 * 6 + 6


def test_parameters_of_cleanrls_nature_cnn():
    """Layer norm over whole images, with a scale and a bias for every element."""
    space = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    whole = make("nature_cnn", space, 6, key=KEY, norm="layer_norm_all")
    none = make("nature_cnn", space, 6, key=KEY, norm="none")
    normalised = 32 * 20 * 20 + 64 * 9 * 9 + 64 * 7 * 7 + 512
    assert count(whole) - count(none) == 2 * normalised


def test_parameters_of_impala():
    space = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    network = make("impala", space, 6, key=KEY, norm="none")
    convs = 0
    for inputs, channels in ((4, 16), (16, 32), (32, 32)):
        convs += 9 * inputs * channels + channels + 4 * (9 * channels * channels + channels)
    assert count(network) == convs + 11 * 11 * 32 * 256 + 256 + 256 * 6 + 6


def test_parameters_of_hadamax():
    space = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    network = make("hadamax", space, 6, key=KEY, norm="none")
    convs = 2 * ((64 * 4 * 32 + 32) + (16 * 32 * 64 + 64) + (9 * 64 * 64 + 64))
    assert count(network) == convs + 11 * 11 * 64 * 512 + 512 + 512 * 6 + 6


def test_initialisation_of_hadamax():
    encoder = encoders.hadamax((12, 12, 4), key=KEY)
    product, dense = encoder.layers[4], encoder.layers[7]
    kernel = product.left.layers[0].kernel
    np.testing.assert_allclose(np.var(kernel), 2 / (9 * 64 + 9 * 64), rtol=0.05)
    np.testing.assert_allclose(np.var(dense.weight), 2 / (2 * 2 * 64), rtol=0.05)


@pytest.mark.parametrize("name", ["minatar_cnn", "grid_cnn", "nature_cnn", "impala", "hadamax"])
def test_images_must_be_large_enough(name):
    with pytest.raises(UsageError, match="needs images of at least"):
        ENCODERS[name]((4,), key=KEY)
    with pytest.raises(UsageError, match="needs images of at least"):
        ENCODERS[name]((2, 2, 4), key=KEY)
