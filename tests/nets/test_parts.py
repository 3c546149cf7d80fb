"""Nested observations: each leaf has its own encoder, and the results are concatenated."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from networks import call, make, q_values

from eqx_q import spaces
from eqx_q.errors import UsageError
from eqx_q.nets.layers import Activation, Conv, Embedding, LayerNorm, Linear, OneHot

KEY = jax.random.key(0)
T, B = 2, 6
SMALL = {"key": KEY, "hidden_sizes": (8,)}


def vector(size):
    return Box(-1, 1, (size,), np.float32)


PICTURE = Box(0, 255, (2, 5, 6), np.uint8)  # channels first
ALL = Dict(
    {
        "speed": Box(-1, 1, (), np.float32),
        "picture": PICTURE,
        "tool": Discrete(3, start=1),
        "cards": MultiDiscrete([2, 4]),
        "doors": MultiBinary(3),
        "arms": gymnasium.spaces.Tuple([vector(2), vector(3)]),
    }
)


def observe(space, seed=0):
    """Random observations `[T, B, ...]`."""
    space.seed(seed)
    rows = [spaces.select(space, space.sample()) for _ in range(T * B)]
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *rows)
    return jax.tree.map(lambda x: x.reshape(T, B, *x.shape[1:]), stacked)


def parts(network, kind):
    found = jax.tree.leaves(network, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in found if isinstance(node, kind)]


def with_layers_of(network, other):
    """The network with the linear layers of another."""
    return eqx.tree_at(lambda n: parts(n, Linear), network, parts(other, Linear))


def outline(*args, **options):
    """A network of shapes alone: nothing is computed."""
    return eqx.filter_eval_shape(make, *args, **options)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((2, 2), {}), ((4,), {"normalize_input": True}), ((4,), {"num_agents": 3})],
)
def test_two_vectors_are_one_that_is_longer(shape, options):
    space = Dict({"b": vector(3), "a": Box(0, 1, shape, np.float32)})
    obs = observe(space)
    flat = jnp.concatenate([obs["a"].reshape(T, B, 4), obs["b"]], axis=-1)
    whole = make("mlp", vector(7), 2, **SMALL, **options)
    joined = with_layers_of(make("auto", space, 2, **SMALL, **options), whole)
    mask = jnp.ones((T, B), bool)
    ours, theirs = (call(*x, batch_mask=mask) for x in ((joined, obs), (whole, flat)))
    np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-5, atol=1e-6)


def test_every_kind_of_leaf():
    """All parts by hand: in the order of their names, then linear layers."""
    network, obs = make("auto", ALL, 2, channels=4, **SMALL), observe(ALL)
    (conv,), linear = parts(network, Conv), parts(network, Linear)
    rows = {
        name: np.asarray(leaf).reshape(T * B, *leaf.shape[2:])
        for name, leaf in obs.items()
        if name != "arms"
    }
    pixels = jnp.asarray(rows["picture"])
    seen, _ = conv(pixels, None)
    in_picture, after = parts(network, LayerNorm)
    seen = jax.nn.relu(in_picture(seen, None)[0]).reshape(T * B, -1)
    arms = [np.asarray(arm).reshape(T * B, -1) for arm in obs["arms"]]
    cards = [np.eye(2)[rows["cards"][:, 0]], np.eye(4)[rows["cards"][:, 1]]]
    tool, speed = np.eye(3)[rows["tool"] - 1], rows["speed"][:, None]
    x = jnp.concatenate([*arms, *cards, rows["doors"], seen, speed, tool], axis=1)
    assert x.shape[1] == 2 + 3 + 6 + 3 + 3 * 4 * 4 + 1 + 3
    hidden, head = linear
    expected = head(jax.nn.relu(after(hidden(x, None)[0], None)[0]), None)[0]
    np.testing.assert_allclose(
        q_values(network, obs), expected.reshape(T, B, 2), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("memory", ["none", "gru"])
def test_a_whole_number_alone(memory):
    options = SMALL | {"memory": memory, "memory_size": 4, "last_action": False}
    network = make("auto", Discrete(5, start=-2), 2, **options)
    obs = jnp.arange(T * B).reshape(T, B) % 5 - 2
    whole = with_layers_of(make("mlp", vector(5), 2, **options), network)
    expected = q_values(whole, jnp.eye(5)[obs + 2])
    np.testing.assert_allclose(q_values(network, obs), expected, rtol=1e-5, atol=1e-6)


def test_parts_are_named_by_their_paths():
    chosen = {"tool": "embedding", "picture": "mlp", "cards": "mlp"}
    network = make("auto", ALL, 2, encoders=chosen, embedding_size=7, **SMALL)
    (embedding,), none = parts(network, Embedding), parts(network, (Conv, OneHot))
    assert embedding.table.shape == (3, 7) and not none
    first = parts(network, Linear)[0]
    assert first.weight.shape[1] == 5 + 2 + 3 + 60 + 1 + 7
    assert np.all(np.isfinite(q_values(network, observe(ALL))))
    inside = outline("auto", ALL, 2, encoders={"arms.1": "mlp"}, **SMALL)
    assert eqx.tree_equal(inside, outline("auto", ALL, 2, **SMALL))


def test_a_name_is_for_all_parts_that_it_fits():
    assert not parts(outline("mlp", ALL, 2, **SMALL), Conv)
    assert len(parts(outline("mlp", ALL, 2, **SMALL), OneHot)) == 2
    assert len(parts(outline("embedding", ALL, 2, **SMALL), Embedding)) == 2
    assert len(parts(outline("embedding", ALL, 2, **SMALL), Conv)) == 1
    both = Dict({"a": PICTURE, "b": Box(0, 255, (4, 8, 9), np.uint8), "c": vector(2)})
    assert len(parts(outline("minatar_cnn", both, 2, **SMALL), Conv)) == 2


def test_layers_after_are_those_of_the_first_picture():
    space = Dict({"a": vector(2), "b": Box(0, 1, (8, 8, 2), np.float32)})
    network = make("hadamax", space, 2, key=KEY)
    hidden, _ = parts(network, Linear)
    assert hidden.bias.shape == (512,) and parts(network, Activation)[-1].name == "gelu"
    np.testing.assert_allclose(np.var(hidden.weight), 2 / (2 + 64), rtol=0.05)
    first, *_ = parts(outline("auto", Dict({"a": vector(2), "b": vector(1)}), 2, key=KEY), Linear)
    assert first.bias.shape == (256,)


def test_bytes_are_scaled_and_normalisation_is_of_boxes_alone():
    space = Dict({"bytes": Box(0, 255, (2,), np.uint8), "n": Discrete(3), "x": vector(2)})
    options = SMALL | {"norm": "none"}
    obs = observe(space)
    plain = make("auto", Dict({"bytes": vector(2), "n": Discrete(3), "x": vector(2)}), 2, **options)
    network = with_layers_of(make("auto", space, 2, **options), plain)
    floats = obs | {"bytes": obs["bytes"] / 255}
    np.testing.assert_allclose(
        q_values(network, obs), q_values(plain, floats), rtol=1e-4, atol=1e-6
    )

    normal = with_layers_of(make("auto", space, 2, normalize_input=True, **options), plain)
    output = call(normal, obs, batch_mask=jnp.ones((T, B), bool))
    for name in ("bytes", "x"):
        rows = np.asarray(obs[name], np.float32).reshape(T * B, 2)
        rows = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
        floats = floats | {name: jnp.asarray(rows).reshape(T, B, 2)}
    expected = q_values(plain, floats)
    np.testing.assert_allclose(output.values[..., 0], expected, rtol=1e-3, atol=1e-5)


def test_wrong_names_are_told():
    with pytest.raises(UsageError, match=r"unknown part of observations 'tools'.*tool"):
        make("auto", ALL, 2, key=KEY, encoders={"tools": "embedding"})
    with pytest.raises(UsageError, match=r"unknown network 'embeding'.*embedding"):
        make("auto", ALL, 2, key=KEY, encoders={"tool": "embeding"})
    with pytest.raises(UsageError, match=r"'embedding_sizes'.*embedding_size"):
        make("auto", ALL, 2, key=KEY, encoders={"tool": "embedding"}, embedding_sizes=3)
    with pytest.raises(UsageError, match="'one_hot' reads Discrete or MultiDiscrete"):
        make("one_hot", vector(3), 2, key=KEY)
    with pytest.raises(UsageError, match="needs images of at least"):
        make("nature_cnn", Dict({"a": vector(3), "n": Discrete(2)}), 2, key=KEY)
