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
from eqx_q.nets import precision, recurrent
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

    def loss(layer):
        with products_in("bfloat16"):
            return jnp.sum(layer(x, None)[0] * gradient)

    gradient = jax.random.normal(jax.random.key(1), y.shape)
    expected = np.zeros((4, 3, 3, 2))
    for i in range(3):
        for j in range(3):
            window = rounded(x)[:, i : i + 4, j : j + 4]
            expected[:, i, j] = np.einsum("bhwo,bhwi->oi", rounded(gradient), window)
    found = eqx.filter_grad(loss)(layer).kernel
    tolerance = 1e-5 if lowering == "patches" else 2**-7
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_normalisation_stays_as_it_is():
    layer, x = LayerNorm((7,)), jax.random.normal(KEY, (3, 7))
    with products_in("bfloat16"):
        y, _ = layer(x, None)
    assert jnp.array_equal(y, layer(x, None)[0])


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_recurrences_round_at_every_step(kind):
    """Against a loop over steps, whose products are those of `product`."""
    cells = {"gru": recurrent._gru_cell, "lstm": recurrent._lstm_cell}
    num_gates = {"gru": 3, "lstm": 4}[kind]
    layer = recurrent.RECURRENCES[kind](3, 5, key=KEY)
    x, memory = jax.random.normal(KEY, (6, 2, 3)), layer.initial_memory(2)
    first = jnp.zeros((6, 2), bool).at[3, 0].set(True)

    def by_hand(layer, x):
        state, outputs = jax.tree.leaves(memory), []
        biases = [0.0, 0.0, layer.bias] if kind == "gru" else [0.0] * 4
        for row, starts in zip(layer.projection(x, None)[0], first, strict=True):
            state = [jnp.where(starts[:, None], 0.0, part) for part in state]
            weights = jnp.split(layer.weight, num_gates, axis=1)
            hidden = [product(state[0], w) + b for w, b in zip(weights, biases, strict=True)]
            state = cells[kind](jnp.split(row, num_gates, axis=1), hidden, state)
            outputs.append(state[0])
        return jnp.stack(outputs)

    def gradients(fn):
        return eqx.filter_value_and_grad(lambda args: jnp.sum(jnp.sin(fn(*args))))((layer, x))

    with products_in("bfloat16"):
        expected = gradients(by_hand)
        found = gradients(lambda layer, x: layer(x, memory, first)[0])
    exact = gradients(lambda layer, x: layer(x, memory, first)[0])
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(same, found, expected)
    with pytest.raises(AssertionError):
        jax.tree.map(same, exact, expected)


@pytest.mark.parametrize("memory", ["mingru", "gtrxl"])
def test_other_memory_is_computed_in_bfloat16(memory):
    """Values and gradients differ from those in float32, but by as little as rounding explains."""
    options = {"memory": memory, "memory_size": 8, "hidden_sizes": (8,)}
    network = make("mlp", gymnasium.spaces.Box(-1, 1, (4,), np.float32), 3, key=KEY, **options)
    obs, first = jax.random.normal(KEY, (5, 2, 4)), jnp.zeros((5, 2), bool).at[3, 0].set(True)
    inputs = eqx_q.nets.Inputs(
        obs, first, last_action=jnp.zeros((5, 2, 1), jnp.int32), last_reward=jnp.zeros((5, 2))
    )

    def values(network):
        statistics, state = network.initial_statistics(), network.initial_memory(2)
        return network(inputs, statistics, state).values

    def computed():
        gradient = eqx.filter_grad(lambda network: jnp.sum(jnp.sin(values(network))))(network)
        return values(network), jax.flatten_util.ravel_pytree(gradient)[0]

    exact = computed()
    with products_in("bfloat16"):
        coarse = computed()
    for x, y in zip(coarse, exact, strict=True):
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
