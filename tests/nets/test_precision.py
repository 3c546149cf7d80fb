"""Products in bfloat16: rounded operands, and results in float32, forwards and backwards."""

import equinox as eqx
import gymnasium
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from networks import make

import eqx_q
from eqx_q.errors import UnknownNameError
from eqx_q.nets import precision
from eqx_q.nets.layers import Conv, LayerNorm, Linear
from eqx_q.nets.precision import product, products_in

KEY = jax.random.key(0)


def rounded(x):
    """To the nearest number with 8 bits, the even one of two, as IEEE 754 rounds."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.fixture(params=[False, True], ids=["rounded", "native"])
def native(request, monkeypatch):
    """With and without the CPU's own instructions."""
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: request.param)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_and_its_gradients_round_their_operands(native, transposed):
    x, weight, gradient = (
        jax.random.normal(jax.random.fold_in(KEY, i), shape)
        for i, shape in enumerate([(2, 5, 7), (3, 7) if transposed else (7, 3), (2, 5, 3)])
    )
    with products_in("bfloat16"):
        y, backwards = jax.vjp(lambda *args: product(*args, transposed=transposed), x, weight)
    of_x, of_weight = backwards(gradient)
    x, weight, gradient = rounded(x), rounded(weight), rounded(gradient)
    matrix = weight.T if transposed else weight
    expected = np.einsum("abi,abo->io", x, gradient)
    np.testing.assert_allclose(y, x @ matrix, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_x, gradient @ matrix.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        of_weight, expected.T if transposed else expected, rtol=1e-5, atol=1e-6
    )
    assert {y.dtype, of_x.dtype, of_weight.dtype} == {jnp.dtype(jnp.float32)}


def test_members_of_a_population_round_alike(native):
    x, weight = jax.random.normal(KEY, (3, 4, 5)), jax.random.normal(KEY, (3, 5, 2))

    def gradient(x, weight):
        return jax.grad(lambda weight: jnp.sum(jnp.sin(product(x, weight))))(weight)

    with products_in("bfloat16"):
        together = jax.jit(jax.vmap(gradient))(x, weight)
        apart = [gradient(*member) for member in zip(x, weight, strict=True)]
    np.testing.assert_allclose(together, jnp.stack(apart), rtol=1e-5, atol=1e-6)


def test_the_setting_is_part_of_what_is_compiled():
    x = jnp.full((1, 1), 1 + 2**-10)
    multiply = jax.jit(product)
    assert multiply(x, x) > 1
    with products_in("bfloat16"):
        assert multiply(x, x) == 1
    assert multiply(x, x) > 1


@pytest.mark.parametrize("lowering", ["patches", "conv"])
def test_convolutions(lowering):
    layer = Conv(2, 4, 3, key=KEY, lowering=lowering)
    x = jax.random.normal(KEY, (2, 6, 6, 2))
    with products_in("bfloat16"):
        y, _ = layer(x, None)
    expected = np.zeros((2, 4, 4, 4))
    kernel = rounded(layer.kernel)  # outputs, rows, columns, inputs
    for i in range(3):
        for j in range(3):
            expected += rounded(x)[:, i : i + 4, j : j + 4] @ kernel[:, i, j].T
    np.testing.assert_allclose(y, expected, rtol=1e-5 if lowering == "patches" else 2**-8)
    assert y.dtype == jnp.float32 and not np.allclose(y, layer(x, None)[0], rtol=1e-4)


def test_normalisation_stays_as_it_is():
    layer, x = LayerNorm((7,)), jax.random.normal(KEY, (3, 7))
    with products_in("bfloat16"):
        y, _ = layer(x, None)
    assert jnp.array_equal(y, layer(x, None)[0])


@pytest.mark.parametrize("memory", ["gru", "lstm", "mingru", "gtrxl"])
def test_memory_rounds_at_every_step(memory):
    """A whole sequence, and the same one step at a time with weights that are rounded already."""
    options = {"memory": memory, "memory_size": 8, "hidden_sizes": (8,)}
    network = make("mlp", gymnasium.spaces.Box(-1, 1, (4,), np.float32), 3, key=KEY, **options)
    obs, first = jax.random.normal(KEY, (5, 2, 4)), jnp.zeros((5, 2), bool).at[3, 0].set(True)
    inputs = eqx_q.nets.Inputs(
        obs, first, last_action=jnp.zeros((5, 2, 1), jnp.int32), last_reward=jnp.zeros((5, 2))
    )

    def values(network):
        statistics, state = network.initial_statistics(), network.initial_memory(2)
        return network(inputs, statistics, state).values

    def loss(network):
        return jnp.sum(jnp.sin(values(network)))

    exact, exact_gradient = values(network), eqx.filter_grad(loss)(network)
    with products_in("bfloat16"):
        coarse, gradient = values(network), eqx.filter_grad(loss)(network)
    assert not np.allclose(coarse, exact, rtol=1e-5)
    np.testing.assert_allclose(coarse, exact, atol=0.03)
    x, y = (jax.flatten_util.ravel_pytree(x)[0] for x in (gradient, exact_gradient))
    assert not np.allclose(x, y, rtol=1e-5)
    assert jnp.linalg.norm(x - y) < 0.03 * jnp.linalg.norm(y)


@pytest.mark.parametrize("make_agent", [eqx_q.PQN.create, eqx_q.CQL.create])
def test_an_agent_computes_its_network_in_its_precision(make_agent):
    spaces = gymnasium.spaces.Box(-1, 1, (4,), np.float32), gymnasium.spaces.Discrete(3)
    options = {"network": "mlp", "network_options": {"norm": "none", "hidden_sizes": (8,)}}
    agent = make_agent(*spaces, key=KEY, precision="bfloat16", **options)
    obs = np.asarray(jax.random.normal(KEY, (6, 4)))
    x = obs
    layers = [x for x in jax.tree.leaves(agent.network, is_leaf=_is_linear) if _is_linear(x)]
    for layer in layers:
        weight = rounded(layer.weight.T if layer.transposed else layer.weight)
        x = rounded(x) @ weight + np.asarray(layer.bias)
        x = np.maximum(x, 0) if layer is not layers[-1] else x
    np.testing.assert_allclose(agent.act(obs).value, x.max(axis=-1), rtol=1e-5)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(agent.network))


def _is_linear(x):
    return isinstance(x, Linear)


def test_unknown_precisions():
    spaces = gymnasium.spaces.Box(-1, 1, (4,), np.float32), gymnasium.spaces.Discrete(3)
    with pytest.raises(UnknownNameError, match="bfloat16"):
        eqx_q.PQN.create(*spaces, key=KEY, precision="bfloat61")
