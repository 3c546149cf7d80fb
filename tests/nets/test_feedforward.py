"""Networks without memory, shipped or people's own."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_q.errors import UsageError
from eqx_q.nets import AbstractQNetwork, as_network, make_network

KEY = jax.random.key(0)
VECTOR = gymnasium.spaces.Box(-1, 1, (4,), np.float32)


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_every_observation_stands_by_itself(norm):
    network = make_network("mlp", VECTOR, 2, key=KEY, hidden_sizes=(8,), norm=norm)
    obs = jax.random.normal(KEY, (3, 5, 4))
    statistics = network.initial_statistics()
    together = network(obs, statistics)
    assert together.q_values.shape == (3, 5, 2)
    assert together.memory is None and network.initial_memory(5) is None
    for t in range(3):
        for b in range(5):
            alone = network(obs[t : t + 1, b : b + 1], statistics).q_values[0, 0]
            np.testing.assert_allclose(together.q_values[t, b], alone, rtol=1e-4, atol=1e-5)


def test_training_normalises_over_the_masked_steps_and_lanes():
    network = make_network("mlp", VECTOR, 2, key=KEY, hidden_sizes=(8,), norm="batch_norm")
    obs = jax.random.normal(KEY, (3, 5, 4))
    mask = jnp.array([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1], [0, 1, 0, 0, 1]], bool)
    out = network(obs, network.initial_statistics(), batch_mask=mask)
    real = network(obs[mask][None], network.initial_statistics(), batch_mask=jnp.ones((1, 9), bool))
    np.testing.assert_allclose(out.q_values[mask], real.q_values[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(out.statistics), jax.tree.leaves(real.statistics), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_module_of_ones_own():
    module = eqx.nn.MLP(4, 2, 64, 2, key=KEY)
    network = as_network(module)
    assert isinstance(network, AbstractQNetwork)
    obs = jax.random.normal(KEY, (3, 5, 4))
    out = network(obs, network.initial_statistics(), network.initial_memory(5))
    for t in range(3):
        for b in range(5):
            np.testing.assert_allclose(out.q_values[t, b], module(obs[t, b]), rtol=1e-4, atol=1e-6)
    assert out.memory is None and out.statistics is None
    parameters = jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
    assert len(parameters) == 6


def test_a_network_stays_itself():
    network = make_network("mlp", VECTOR, 2, key=KEY)
    assert as_network(network) is network


def test_what_is_no_network_is_refused():
    with pytest.raises(UsageError, match="an Equinox module"):
        as_network(lambda x: x)
