"""Recurrences against loops written from their equations, and the networks built from them."""

import equinox as eqx
import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import call as call_network, make as make_network

from eqx_q.errors import UsageError
from eqx_q.nets import Network, recurrent
from eqx_q.nets.layers import Linear
from eqx_q.nets.recurrent import GRU, LSTM, RECURRENCES, MinGRU, linear_recurrence
from eqx_q.saving.structure import decode, encode

KEY = jax.random.key(0)
T, B, INPUTS, SIZE = 7, 3, 5, 4
FIRST = np.zeros((T, B), bool)
FIRST[[0, 3, 4, 6], [1, 0, 2, 0]] = True  # at the start, inside, and at the end
VECTOR = gymnasium.spaces.Box(-1, 1, (INPUTS,), np.float32)


def normal(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def randomized(tree, seed=1):
    """The same tree, with all parameters away from their special first values."""
    parameters, rest = eqx.partition(tree, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(parameters)
    leaves = [leaf + 0.3 * normal(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)]
    return eqx.combine(jax.tree.unflatten(structure, leaves), rest)


def make(name, seed=0, inputs=INPUTS):
    recurrence = randomized(RECURRENCES[name](inputs, SIZE, key=jax.random.key(seed)))
    memory = recurrence.initial_memory(B)
    memory = jax.tree.map(lambda x: x + normal(*x.shape, seed=9), memory)
    return recurrence, normal(T, B, inputs, seed=seed + 20), memory


def assert_close(ours, theirs, **tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 1e-4, "atol": 1e-5} | tolerance)


# Recurrences -----------------------------------------------------------------------------------


def matrix(linear: Linear):
    return linear.weight.T if linear.transposed else linear.weight


def gru_step(gru, x, memory, xp):
    def sigmoid(x):
        return 1 / (1 + xp.exp(-x))

    w_r, w_z, w_n = xp.split(matrix(gru.projection), 3, axis=1)
    b_r, b_z, b_n = xp.split(gru.projection.bias, 3)
    u_r, u_z, u_n = xp.split(gru.weight, 3, axis=1)
    r = sigmoid(x @ w_r + b_r + memory @ u_r)
    z = sigmoid(x @ w_z + b_z + memory @ u_z)
    n = xp.tanh(x @ w_n + b_n + r * (memory @ u_n + gru.bias))
    h = (1 - z) * n + z * memory
    return h, h


def lstm_step(lstm, x, memory, xp):
    def sigmoid(x):
        return 1 / (1 + xp.exp(-x))

    h, c = memory
    w = xp.split(matrix(lstm.projection), 4, axis=1)
    b = xp.split(lstm.projection.bias, 4)
    u = xp.split(lstm.weight, 4, axis=1)
    i, f, g, o = (x @ w[k] + h @ u[k] + b[k] for k in range(4))
    c = sigmoid(f) * c + sigmoid(i) * xp.tanh(g)
    h = sigmoid(o) * xp.tanh(c)
    return h, (h, c)


def mingru_step(mingru, x, memory, xp):
    w_z, w_h = xp.split(matrix(mingru.projection), 2, axis=1)
    b_z, b_h = xp.split(mingru.projection.bias, 2)
    z = 1 / (1 + xp.exp(-(x @ w_z + b_z)))
    h = (1 - z) * memory + z * (x @ w_h + b_h)
    return h, h


STEPS = {"gru": gru_step, "lstm": lstm_step, "mingru": mingru_step}
recurrences = pytest.mark.parametrize("name", list(RECURRENCES))


def loop(name, recurrence, x, memory, first=FIRST):
    """The equations in NumPy, one lane and one step after the other."""
    recurrence, x, memory = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), (recurrence, x, memory)
    )
    y, last = np.zeros((*x.shape[:2], SIZE)), jax.tree.map(np.copy, memory)
    for b in range(x.shape[1]):
        kept = jax.tree.map(lambda m, b=b: m[b], memory)
        for t in range(x.shape[0]):
            if first[t, b]:
                kept = jax.tree.map(np.zeros_like, kept)
            y[t, b], kept = STEPS[name](recurrence, x[t, b], kept, np)
        for whole, lane in zip(jax.tree.leaves(last), jax.tree.leaves(kept), strict=True):
            whole[b] = lane
    return y, last


def plain_scan(name, recurrence, x, memory):
    """The equations in a scan, to be differentiated as it is."""

    def step(memory, inputs):
        x, first = inputs
        memory = jax.tree.map(lambda m: m * (1 - first[:, None]), memory)
        y, memory = STEPS[name](recurrence, x, memory, jnp)
        return memory, y

    memory, y = jax.lax.scan(step, memory, (x, jnp.asarray(FIRST, jnp.float32)))
    return y, memory


@eqx.filter_jit
def output(recurrence, x, memory, first=FIRST):
    return recurrence(x, memory, jnp.asarray(first))


@recurrences
def test_every_recurrence_is_tested(name):
    assert name in STEPS


@recurrences
def test_recurrence_is_the_loop(name):
    arguments = make(name)
    assert_close(output(*arguments), loop(name, *arguments))


@recurrences
def test_gradients_are_those_of_a_plain_scan(name):
    arguments = make(name)
    weights = loop(name, *make(name, seed=5))  # of each output and of the memory that is left

    def loss(result):
        products = jax.tree.map(lambda w, x: jnp.sum(w * jnp.sin(3 * x)), weights, result)
        return sum(jax.tree.leaves(products))

    ours = eqx.filter_jit(eqx.filter_grad(lambda a: loss(output(*a))))(arguments)
    theirs = eqx.filter_jit(eqx.filter_grad(lambda a: loss(plain_scan(name, *a))))(arguments)
    assert_close(ours, theirs, rtol=1e-3)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(ours))


@recurrences
def test_gradients_are_finite_differences(name):
    arguments = make(name)
    direction = randomized(jax.tree.map(lambda x: 0 * x, arguments), seed=50)

    def loss(arguments):
        y, memory = loop(name, *arguments)
        return sum(np.sum(np.sin(leaf)) for leaf in jax.tree.leaves((y, memory)))

    def moved(by):
        return jax.tree.map(lambda x, d: np.float64(x) + by * np.float64(d), arguments, direction)

    difference = (loss(moved(1e-5)) - loss(moved(-1e-5))) / 2e-5
    gradient = eqx.filter_grad(
        lambda a: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(output(*a)))
    )(arguments)
    slopes = jax.tree.map(lambda g, d: np.sum(g * d), gradient, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(slopes)), difference, rtol=1e-4)


@recurrences
def test_a_sequence_at_once_is_a_step_at_a_time(name):
    recurrence, x, memory = make(name)
    y, last = output(recurrence, x, memory)
    for t in range(T):
        step, memory = output(recurrence, x[t : t + 1], memory, FIRST[t : t + 1])
        assert_close(step[0], y[t])
    assert_close(memory, last)


@recurrences
def test_after_a_reset_memory_is_fresh(name):
    recurrence, x, memory = make(name)
    everywhere = np.zeros((T, B), bool)
    everywhere[3] = True
    y, last = output(recurrence, x, memory, everywhere)
    fresh = output(recurrence, x[3:], recurrence.initial_memory(B), everywhere[3:] & False)
    assert_close((y[3:], last), fresh, rtol=1e-6, atol=1e-6)
    # And nothing flows back through it.
    before = jax.grad(lambda x: jnp.sum(output(recurrence, x, memory, everywhere)[0][3:] ** 2))(x)
    assert not np.any(before[:3]) and np.all(np.any(before[3:] != 0, -1))


@recurrences
def test_a_population_is_its_members(name):
    """Under vmap, inside a compiled scan: what a population's update does."""
    keys = jax.random.split(KEY, 2)
    members = eqx.filter_vmap(lambda k: RECURRENCES[name](INPUTS, SIZE, key=k))(keys)
    x = normal(2, T, B, INPUTS)

    def descend(member, x):
        parameters, rest = eqx.partition(member, eqx.is_inexact_array)

        def loss(parameters):
            recurrence = eqx.combine(parameters, rest)
            return jnp.sum(output(recurrence, x, recurrence.initial_memory(B))[0] ** 2)

        def step(parameters, _):
            gradient = jax.grad(loss)(parameters)
            return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradient), None

        return jax.lax.scan(step, parameters, None, 3)[0]

    together = eqx.filter_jit(eqx.filter_vmap(descend))(members, x)
    for i in range(2):
        member = jax.tree.map(lambda leaf, i=i: leaf[i], members)
        alone = eqx.filter_jit(descend)(member, x[i])
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone)
        assert not np.allclose(jax.tree.leaves(alone)[0], jax.tree.leaves(member)[0])


def test_calls_outside_of_a_compiled_program_compile_once():
    recurrence, x, memory = make("gru")
    first = jnp.asarray(FIRST)
    recurrence(x, memory, first)
    size = recurrent._unroll_compiled._cache_size()
    recurrence(x + 1, memory, first)
    assert recurrent._unroll_compiled._cache_size() == size


# Flax ------------------------------------------------------------------------------------------


def flax_loop(cell, parameters, x, carry):
    carry, y = jax.lax.scan(lambda carry, row: cell.apply(parameters, carry, row), carry, x)
    return y, carry


def test_gru_is_that_of_flax():
    gru, x, memory = make("gru")
    w = dict(zip(["ir", "iz", "in"], jnp.split(matrix(gru.projection), 3, axis=1), strict=True))
    b = dict(zip(["ir", "iz", "in"], jnp.split(gru.projection.bias, 3), strict=True))
    u = dict(zip(["hr", "hz", "hn"], jnp.split(gru.weight, 3, axis=1), strict=True))
    parameters = {k: {"kernel": v, "bias": b[k]} for k, v in w.items()}
    parameters |= {k: {"kernel": v} for k, v in u.items()}
    parameters["hn"]["bias"] = gru.bias
    theirs = flax_loop(nn.GRUCell(SIZE), {"params": parameters}, x, memory)
    assert_close(output(gru, x, memory, FIRST & False), theirs)


def test_lstm_is_that_of_flax():
    lstm, x, (h, c) = make("lstm")
    parameters = {}
    for i, gate in enumerate("ifgo"):
        columns = slice(i * SIZE, (i + 1) * SIZE)
        parameters["i" + gate] = {"kernel": matrix(lstm.projection)[:, columns]}
        parameters["h" + gate] = {
            "kernel": lstm.weight[:, columns],
            "bias": lstm.projection.bias[columns],
        }
    y, (c_last, h_last) = flax_loop(nn.OptimizedLSTMCell(SIZE), {"params": parameters}, x, (c, h))
    assert_close(output(lstm, x, (h, c), FIRST & False), (y, (h_last, c_last)))


@pytest.mark.parametrize(("cls", "gates"), [(GRU, 3), (LSTM, 4)])
def test_initial_parameters(cls, gates):
    recurrence = cls(100, 64, key=KEY)
    for u in jnp.split(recurrence.weight, gates, axis=1):
        np.testing.assert_allclose(u @ u.T, np.eye(64), atol=1e-5)
    np.testing.assert_allclose(np.var(matrix(recurrence.projection)), 1 / 100, rtol=0.05)
    assert not np.any(recurrence.projection.bias)
    he = cls(100, 64, key=KEY, init="he_normal")
    np.testing.assert_allclose(np.var(matrix(he.projection)), 2 / 100, rtol=0.05)
    # CleanRL's: every matrix as a whole, with gain 1, whichever side is the longer one.
    for inputs in (100, 300):
        whole = cls(inputs, 64, key=KEY, init="orthogonal")
        for w in (whole.weight, whole.projection.weight):
            np.testing.assert_allclose(w @ w.T, np.eye(w.shape[0]), atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_linear_recurrence_on_each_platform(platform, monkeypatch):
    """Step after step, and by the associative scan: both compute here."""
    if platform == "cuda":
        monkeypatch.setattr(recurrent, "_in_turn", recurrent._in_parallel)
    decay, x, start, weight = (
        normal(*s, seed=i) for i, s in enumerate([(T, 2), (T, 2), (2,), (T, 2)])
    )
    decay = decay.at[3, 0].set(0.0)
    expected, h = np.zeros((T, 2)), np.float64(start)
    for t in range(T):
        h = expected[t] = np.float64(decay[t]) * h + x[t]
    assert_close(linear_recurrence(decay, x, start), expected)
    program = jax.jit(linear_recurrence).trace(decay, x, start)
    program = program.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in program) is (platform == "cpu")

    # Of weight · h: the gradients in closed form, from what each h_t does to all later ones.
    g, before = np.zeros((T, 2)), np.concatenate([start[None], expected[:-1]])
    for t in range(T):
        for later in range(t, T):
            g[t] += weight[later] * np.prod(decay[t + 1 : later + 1], axis=0)
    ours = jax.grad(lambda *a: jnp.sum(weight * linear_recurrence(*a)), (0, 1, 2))(decay, x, start)
    assert_close(ours, (g * before, g, decay[0] * g[0]))


def test_features_of_a_mingru_forget_over_two_to_a_thousand_steps():
    mingru = MinGRU(100, 64, key=KEY)
    gate, new = jnp.split(mingru.projection.bias, 2)
    np.testing.assert_allclose(1 / jax.nn.sigmoid(gate), np.geomspace(2, 1000, 64), rtol=1e-4)
    assert not np.any(new)
    np.testing.assert_allclose(np.var(matrix(mingru.projection)), 1 / 100, rtol=0.05)


# The network -----------------------------------------------------------------------------------


def make_recurrent(memory="gru", **options) -> Network:
    options = {"hidden_sizes": (8,), "memory_size": SIZE, "key": KEY} | options
    network = make_network("mlp", VECTOR, 2, memory=memory, **options)
    assert isinstance(network, Network)
    return randomized(network)


ACTION = np.where(FIRST, -1, np.random.default_rng(0).integers(0, 2, (T, B)))[..., None]
REWARD = np.where(FIRST, 0, normal(T, B, seed=3))


def call(network, obs, memory=None, steps=slice(None), **more):
    lanes = {"first": FIRST, "last_action": ACTION, "last_reward": REWARD}
    lanes = {k: jnp.asarray(v[steps]) for k, v in lanes.items()} | more
    return call_network(network, obs[steps], None, memory, **lanes)


@pytest.mark.parametrize("head", ["linear", "dueling"])
def test_the_network_is_its_parts(head):
    network = make_recurrent(num_memory_layers=2, last_reward=True, head=head)
    obs = normal(T, B, INPUTS)
    one_hot = np.eye(3)[ACTION[..., 0]][..., :2]  # of -1 nothing is left
    of_encoder, of_head = network.initial_statistics()
    rows = network.encoder(obs.reshape(T * B, -1), of_encoder)[0].reshape(T, B, -1)
    x = np.concatenate([rows, one_hot, REWARD[..., None]], -1)
    memory, expected = network.initial_memory(B), []
    for recurrence, before in zip(network.recurrences, memory, strict=True):
        x, after = loop("gru", recurrence, x, before)
        expected.append(after)
    values, _ = network.head(jnp.asarray(x.reshape(T * B, -1), jnp.float32), of_head)
    values = values.reshape(T, B, 2, 1)
    output = call(network, obs, memory)
    assert_close(output.values, values)
    assert_close(output.features, jnp.asarray(x, jnp.float32))
    assert_close(output.memory, tuple(expected))
    assert not jax.tree.leaves(output.statistics)


@recurrences
def test_acting_and_learning_agree(name):
    network = make_recurrent(name, num_memory_layers=2, norm="batch_norm")
    obs, memory = normal(T, B, INPUTS), network.initial_memory(B)
    at_once = call(network, obs, memory)
    for t in range(T):
        output = call(network, obs, memory, slice(t, t + 1))
        assert_close(output.values[0], at_once.values[t])
        memory = output.memory
    assert_close(memory, at_once.memory)


def test_inputs_can_be_left_out():
    network = make_recurrent(last_action=False)
    obs = normal(T, B, INPUTS)
    output = call(network, obs)
    assert_close(call(network, obs, last_action=None, last_reward=None), output, rtol=0, atol=0)
    assert network.recurrences[0].projection.weight.shape[0] == 8
    # Without `first`, no episode starts.
    one = make_recurrent()
    never = call(one, obs, first=jnp.zeros((T, B), bool))
    assert_close(call(one, obs, first=None), never, rtol=0, atol=0)


def test_inputs_that_are_missing_are_named():
    obs = normal(T, B, INPUTS)
    with pytest.raises(UsageError, match=r"needs last_action.*last_action=False"):
        call(make_recurrent(), obs, last_action=None)
    with pytest.raises(UsageError, match=r"needs last_reward.*last_reward=False"):
        call(make_recurrent(last_reward=True), obs, last_reward=None)


def test_training_normalises_over_the_masked_steps_and_lanes():
    network = make_recurrent(norm="batch_norm")
    obs, mask = normal(T, B, INPUTS), ~jnp.asarray(FIRST)
    statistics = network.initial_statistics()
    kept = call(network, obs, batch_mask=mask).statistics
    rows = obs[mask]
    _, expected = network.encoder(rows, statistics[0], jnp.ones(len(rows), bool))
    assert_close(kept[0], expected)
    assert eqx.tree_equal(call(network, obs).statistics, statistics)  # acting changes nothing


@recurrences
def test_a_network_with_memory_is_data(name):
    network = make_recurrent(name, num_memory_layers=2)
    assert eqx.tree_equal(decode(*encode(network), "test"), network)
