"""GTrXL against a loop written from its equations."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import make as make_network

from eqx_q.errors import UsageError
from eqx_q.nets.transformer import GTrXL

T, B, C, INPUTS, SIZE, HEADS = 9, 3, 3, 5, 8, 2
FIRST = np.zeros((T, B), bool)
FIRST[[0, 4, 5, 8], [1, 0, 2, 2]] = True  # at the start, inside, and at the end


def normal(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def block():
    block = GTrXL(INPUTS, SIZE, key=jax.random.key(0), context=C, num_heads=HEADS)
    parameters, rest = eqx.partition(block, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(parameters)
    leaves = [leaf + 0.3 * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    return eqx.combine(jax.tree.unflatten(structure, leaves), rest)


@eqx.filter_jit
def output(block, x, memory, first):
    return block(x, memory, jnp.asarray(first))


@pytest.fixture(scope="module")
def started(block):
    """Some inputs, and the memory after two steps of one lane, five of another, none of a third."""
    first = np.zeros((5, B), bool)
    first[3, 0] = first[0, 1] = True
    _, memory = output(block, normal(5, B, INPUTS, seed=3), block.initial_memory(B), first)
    blank = jax.tree.map(lambda x: jnp.asarray(x).at[2].set(0), memory)
    assert list(blank.length) == [2, C, 0]
    return normal(T, B, INPUTS, seed=4), blank


def linear(layer, x):
    return x @ (layer.weight.T if layer.transposed else layer.weight) + layer.bias


def layer_norm(layer, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + layer.epsilon)
    return x * layer.scale + layer.bias


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gate(gate, x, y):
    (w_r, w_z, w_h), (b_r, minus_b, b_h) = (
        np.split(gate.output.weight.T if gate.output.transposed else gate.output.weight, 3, 1),
        np.split(gate.output.bias, 3),
    )
    u_r, u_z = np.split(gate.update, 2, 1)
    r = sigmoid(y @ w_r + b_r + x @ u_r)
    z = sigmoid(y @ w_z + minus_b + x @ u_z)
    h = np.tanh(y @ w_h + b_h + (r * x) @ gate.reset)
    return (1 - z) * x + z * h


def step(block, x, past):
    """One step of one lane, which has seen the inputs `past` of this episode."""
    x = linear(block.embedding, x)
    past = [*past[-C:], x]
    normed = layer_norm(block.norms[0], np.stack(past))
    query = linear(block.query, normed[-1]).reshape(HEADS, -1)
    key, value = np.split(linear(block.key_and_value, normed), 2, axis=-1)
    heads = []
    for h in range(HEADS):
        width = slice(h * SIZE // HEADS, (h + 1) * SIZE // HEADS)
        scores = []
        for back, k in enumerate(key[::-1]):
            angle = back * 10_000.0 ** (-np.arange(0, SIZE, 2) / SIZE)
            position = np.concatenate([np.sin(angle), np.cos(angle)]) @ block.position
            u, v = block.biases[:, h]
            scores.append((query[h] + u) @ k[width] + (query[h] + v) @ position[width])
        weight = np.exp(np.array(scores[::-1]) / np.sqrt(SIZE / HEADS))
        heads.append(weight @ value[:, width] / weight.sum())
    attended = linear(block.attended, np.concatenate(heads))
    x = gate(block.gates[0], x, np.maximum(attended, 0))
    y = linear(block.hidden[0], layer_norm(block.norms[1], x[None])[0])
    y = linear(block.hidden[1], np.maximum(y, 0))
    return gate(block.gates[1], x, np.maximum(y, 0)), past


def test_gtrxl_is_the_loop(block, started):
    x, memory = started
    y, after = output(block, x, memory, FIRST)
    block = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), block)
    for b in range(B):
        past = list(np.asarray(memory.inputs[b, C - memory.length[b] :], np.float64))
        for t in range(T):
            past = [] if FIRST[t, b] else past
            expected, past = step(block, np.float64(x[t, b]), past)
            np.testing.assert_allclose(y[t, b], expected, rtol=1e-4, atol=1e-5)
        length = min(C, len(past))
        assert after.length[b] == length
        np.testing.assert_allclose(after.inputs[b, C - length :], past[-length:], rtol=1e-4)
        assert not np.any(after.inputs[b, : C - length])
    assert list(after.length) == [C, C, 1]


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_a_sequence_at_once_is_a_part_at_a_time(block, started, chunk):
    x, memory = started
    y, after = output(block, x, memory, FIRST)
    for t in range(0, T, chunk):
        part, memory = output(block, x[t : t + chunk], memory, FIRST[t : t + chunk])
        np.testing.assert_allclose(part, y[t : t + chunk], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(memory.inputs, after.inputs, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(memory.length, after.length)


def test_gradients_reach_every_parameter_and_the_window_but_not_the_memory(block, started):
    x, memory = started

    def last(block, x, inputs):
        kept = eqx.tree_at(lambda m: m.inputs, memory, inputs)
        y, _ = block(x, kept, jnp.zeros((T, B), bool))
        return jnp.sum(jnp.sin(3 * y[-1]))

    ours, of_x = eqx.filter_jit(eqx.filter_grad(lambda a: last(*a, memory.inputs)))((block, x))
    for leaf in jax.tree.leaves(ours):
        assert np.all(np.isfinite(leaf)) and np.any(leaf)
    assert np.all(np.any(of_x[-1 - C :] != 0, -1)) and not np.any(of_x[: -1 - C])
    assert not np.any(jax.grad(lambda inputs: last(block, x, inputs))(memory.inputs))
    # In a direction, against finite differences in double precision.
    direction = normal(*x.shape, seed=8)
    doubled = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), block)

    def value(x):
        total = 0.0
        for b in range(B):
            past = list(np.asarray(memory.inputs[b, C - memory.length[b] :], np.float64))
            for t in range(T):
                y, past = step(doubled, x[t, b], past)
            total += np.sum(np.sin(3 * y))
        return total

    x, move = np.float64(x), 1e-5 * np.float64(direction)
    difference = (value(x + move) - value(x - move)) / 2e-5
    np.testing.assert_allclose(np.sum(of_x * direction), difference, rtol=1e-3)


def test_it_starts_near_the_identity_of_its_embedding():
    block = GTrXL(INPUTS, 64, key=jax.random.key(0))
    x = normal(T, B, INPUTS)
    y, _ = output(block, x, block.initial_memory(B), FIRST)
    embedded, _ = block.embedding(x, None)
    assert np.corrcoef(np.ravel(y), np.ravel(embedded))[0, 1] > 0.9


def test_a_network_has_it_as_its_memory():
    space = gymnasium.spaces.Box(-1, 1, (INPUTS,), np.float32)
    network = make_network(
        "mlp",
        space,
        2,
        key=jax.random.key(0),
        hidden_sizes=(8,),
        memory="gtrxl",
        memory_size=SIZE,
        num_memory_layers=2,
        memory_options={"context": 5, "num_heads": 4},
    )
    blocks = network.recurrences
    assert [type(block) for block in blocks] == [GTrXL, GTrXL]
    assert blocks[0].embedding.weight.size == (8 + 2) * SIZE  # features and the last action
    memory = network.initial_memory(B)
    assert [m.inputs.shape for m in memory] == [(B, 5, SIZE)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "gtrxl", "memory_size": 10}, "num_heads=4 does not divide memory_size=10"),
        (
            {"memory": "gtrxl", "memory_options": {"contxt": 3}},
            "unknown option of memory 'gtrxl': 'contxt': the nearest are context",
        ),
        ({"memory": "gru", "memory_options": {"context": 3}}, "known are none"),
        ({"memory": "gtrxl", "memory_options": {"context": 0}}, "context must be a whole number"),
    ],
)
def test_bad_options_are_refused(options, message):
    space = gymnasium.spaces.Box(-1, 1, (INPUTS,), np.float32)
    with pytest.raises(UsageError, match=message):
        make_network("mlp", space, 2, key=jax.random.key(0), **options)


def test_options_of_other_memories():
    space = gymnasium.spaces.Box(-1, 1, (INPUTS,), np.float32)
    network = make_network(
        "mlp", space, 2, key=jax.random.key(0), memory="mingru", memory_options={"horizon": 10.0}
    )
    gate_bias = network.recurrences[0].projection.bias[:256]
    np.testing.assert_allclose(1 / jax.nn.sigmoid(gate_bias), np.geomspace(2, 10, 256), rtol=1e-4)
