"""Networks of quantiles: Q-values are their means, and they are laid out action by action."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_q.errors import UsageError
from eqx_q.nets import make_network
from eqx_q.nets.quantiles import Quantiles

KEY = jax.random.key(0)
VECTOR = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
OBS = jax.random.normal(KEY, (2, 3, 4))


def test_q_values_are_means_of_each_actions_own():
    network = make_network("mlp", VECTOR, 5, key=KEY, hidden_sizes=(8,), num_quantiles=7)
    assert isinstance(network, Quantiles)
    output = network(OBS, network.initial_statistics())
    values = network.network(OBS, None).q_values  # those of one action side by side
    assert values.shape == (2, 3, 35) and output.q_values.shape == (2, 3, 5)
    assert output.quantiles is not None
    for action in range(5):
        own = values[..., 7 * action : 7 * (action + 1)]
        np.testing.assert_array_equal(output.quantiles[:, :, action], own)
        np.testing.assert_allclose(output.q_values[..., action], own.mean(-1), rtol=1e-5)
    assert network.initial_memory(3) is None and output.memory is None


def test_a_single_quantile_is_a_q_value():
    one = make_network("mlp", VECTOR, 5, key=KEY, hidden_sizes=(8,), num_quantiles=1)
    plain = make_network("mlp", VECTOR, 5, key=KEY, hidden_sizes=(8,))
    np.testing.assert_array_equal(one(OBS, None).q_values, plain(OBS, None).q_values)
    assert plain(OBS, None).quantiles is None


def test_statistics_are_those_of_the_network_inside():
    options = {"hidden_sizes": (8,), "norm": "batch_norm"}
    quantiles = make_network("mlp", VECTOR, 5, key=KEY, num_quantiles=3, **options)
    before = quantiles.initial_statistics()
    assert eqx.tree_equal(before, quantiles.network.initial_statistics())
    mask = jnp.ones((2, 3), bool)
    after = quantiles(OBS, before, batch_mask=mask)
    assert eqx.tree_equal(
        after.statistics, quantiles.network(OBS, before, batch_mask=mask).statistics
    )
    assert not eqx.tree_equal(after.statistics, before)


@pytest.mark.parametrize(
    "options", [{"head": "dueling"}, {"memory": "gru"}, {"num_agents": 2}, {"num_quantiles": -1}]
)
def test_what_they_do_not_go_with(options):
    with pytest.raises(UsageError, match="num_quantiles"):
        make_network("mlp", VECTOR, 5, key=KEY, **({"num_quantiles": 3} | options))
