"""Networks by name: choices, options and error messages."""

import inspect
import re

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import call, make, q_values

from eqx_q.errors import UsageError
from eqx_q.nets.layers import BatchNorm, BatchRenorm, Conv, LayerNorm, Linear
from eqx_q.nets.registry import INPUT_NORMS, choose_encoder, has_channels_first, make_network

KEY = jax.random.key(0)
VECTOR = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
GRID = gymnasium.spaces.Box(0, 1, (10, 10, 4), np.float32)
FRAMES = gymnasium.spaces.Box(0, 255, (4, 36, 36), np.uint8)


def modules(network, kind):
    leaves = jax.tree.leaves(network, is_leaf=lambda node: isinstance(node, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


@pytest.mark.parametrize(
    ("shape", "dtype", "first", "name"),
    [
        ((4,), np.float32, False, "mlp"),
        ((3, 7), np.uint8, False, "mlp"),
        ((10, 10, 4), np.float32, False, "minatar_cnn"),
        ((10, 10, 10), np.float32, False, "minatar_cnn"),
        ((4, 5, 26), np.float32, False, "minatar_cnn"),  # Overcooked's grid of features
        ((4, 84, 84), np.uint8, True, "nature_cnn"),
        ((84, 84, 4), np.uint8, False, "nature_cnn"),
        ((2, 8, 9), np.uint8, True, "minatar_cnn"),
        ((2, 2, 3), np.uint8, True, "mlp"),
    ],
)
def test_auto_goes_by_the_shape(shape, dtype, first, name):
    channels_last = (*shape[1:], shape[0]) if first else shape
    assert choose_encoder(channels_last) == name
    space = gymnasium.spaces.Box(0, 1, shape, dtype)
    assert has_channels_first(space) is first
    a = make("auto", space, 3, key=KEY, hidden_sizes=(8,))
    b = make(name, space, 3, key=KEY, hidden_sizes=(8,))
    assert eqx.tree_equal(a, b)


def test_order_of_channels_is_only_a_matter_of_order():
    last = gymnasium.spaces.Box(0, 255, (36, 36, 4), np.uint8)
    obs = jax.random.randint(KEY, (1, 2, 4, 36, 36), 0, 256).astype(jnp.uint8)
    for options in ({}, {"normalize_input": True}):
        a = make("nature_cnn", FRAMES, 3, key=KEY, hidden_sizes=(8,), **options)
        b = make("nature_cnn", last, 3, key=KEY, hidden_sizes=(8,), **options)
        qa = q_values(a, obs)
        qb = q_values(b, jnp.moveaxis(obs, 2, -1))
        np.testing.assert_allclose(qa, qb, rtol=1e-4, atol=1e-5)
    forced = make("minatar_cnn", GRID, 3, key=KEY, channels_first=True, padding="SAME")
    assert modules(forced, Conv)[0].kernel.shape == (16, 3, 3, 10)


@pytest.mark.parametrize("name", ["mlp", "minatar_cnn"])
def test_input_scale(name):
    space = VECTOR if name == "mlp" else GRID
    options = {"key": KEY, "norm": "none", "hidden_sizes": (8,)}
    plain = make(name, space, 3, **options)
    scaled = make(name, space, 3, **options, input_scale=1 / 255)
    obs = jax.random.normal(KEY, (1, 2, *space.shape))
    np.testing.assert_allclose(
        q_values(scaled, obs), q_values(plain, obs / 255), rtol=1e-4, atol=1e-6
    )
    # Bytes are scaled by default.
    raw = gymnasium.spaces.Box(0, 255, space.shape, np.uint8)
    by_default = make(name, raw, 3, **options)
    pixels = jax.random.randint(KEY, obs.shape, 0, 256).astype(jnp.uint8)
    np.testing.assert_allclose(
        q_values(by_default, pixels),
        q_values(plain, pixels / 255),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("normalize_input", "kind"),
    [(True, BatchNorm), ("batch_norm", BatchNorm), ("batch_renorm", BatchRenorm)],
)
def test_normalised_input_is_that_of_raw_observations(normalize_input, kind):
    network = make("mlp", VECTOR, 3, key=KEY, normalize_input=normalize_input)
    (norm,) = modules(network, kind)
    obs = 5 + 3 * jax.random.normal(KEY, (2, 6, 4))
    mask = jnp.ones((2, 6), bool)
    kept = call(network, obs, batch_mask=mask).statistics
    _, expected = norm(obs.reshape(12, 4), norm.initial_statistics(), mask.reshape(-1))
    np.testing.assert_allclose(jax.tree.leaves(kept)[0], expected.mean, rtol=1e-5)


@pytest.mark.parametrize("norm", INPUT_NORMS)
def test_bytes_can_be_normalised(norm):
    network = make("auto", FRAMES, 3, key=KEY, normalize_input=norm)
    pixels = jax.random.randint(KEY, (2, 3, *FRAMES.shape), 0, 256).astype(jnp.uint8)
    output = call(network, pixels, batch_mask=jnp.ones((2, 3), bool))
    assert np.all(np.isfinite(output.values))
    assert (len(jax.tree.leaves(output.statistics)) > 0) == (norm != "none")


def test_no_normalisation_by_name_is_none():
    by_name, plain = (
        make("mlp", VECTOR, 3, key=KEY, normalize_input=given) for given in ("none", False)
    )
    assert eqx.tree_equal(by_name, plain)


def test_layer_norm_as_cleanrl_has_it_is_pytorchs():
    network = make("mlp", VECTOR, 3, key=KEY, norm="layer_norm_all", hidden_sizes=(8, 16))
    assert {norm.epsilon for norm in modules(network, LayerNorm)} == {1e-5}
    network = make("mlp", VECTOR, 3, key=KEY, norm="layer_norm")
    assert {norm.epsilon for norm in modules(network, LayerNorm)} == {1e-6}


def test_orthogonal_reaches_the_head():
    network = make("mlp", VECTOR, 3, key=KEY, init="orthogonal", hidden_sizes=(16,))
    first, head = modules(network, Linear)
    np.testing.assert_allclose(first.weight @ first.weight.T, 2 * np.eye(4), atol=1e-5)
    np.testing.assert_allclose(head.weight @ head.weight.T, 2 * np.eye(3), atol=1e-5)


def test_the_head_is_lecun_normal_by_default():
    network = make("minatar_cnn", GRID, 50, key=KEY, hidden_sizes=(400,))
    *_, dense, head = modules(network, Linear)
    np.testing.assert_allclose(np.var(dense.weight), 2 / 1024, rtol=0.03)
    np.testing.assert_allclose(np.var(head.weight), 1 / 400, rtol=0.03)


@pytest.mark.parametrize("name", ["minatar_cnn", "nature_cnn", "impala", "hadamax"])
def test_lowering_reaches_every_convolution(name):
    network = make(name, FRAMES, 3, key=KEY, hidden_sizes=(8,), lowering="conv")
    convolutions = modules(network, Conv)
    assert convolutions and all(conv.lowering == "conv" for conv in convolutions)
    assert [conv.channels_first for conv in convolutions].count(True) == 1 + (name == "hadamax")


def test_no_hidden_layer():
    network = make("mlp", VECTOR, 3, key=KEY, hidden_sizes=(), norm="none")
    (head,) = modules(network, Linear)
    obs = jax.random.normal(KEY, (1, 2, 4))
    expected = obs[0] @ head.weight.T + head.bias
    np.testing.assert_allclose(q_values(network, obs)[0], expected, rtol=1e-4, atol=1e-6)


def test_options_may_be_lists():
    a = make("mlp", VECTOR, 3, key=KEY, hidden_sizes=[8, 8])
    assert eqx.tree_equal(a, make("mlp", VECTOR, 3, key=KEY, hidden_sizes=(8, 8)))


def test_wrong_names_are_told():
    with pytest.raises(UsageError, match=r"unknown network 'natur_cnn'.*nature_cnn"):
        make("natur_cnn", FRAMES, 3, key=KEY)
    with pytest.raises(UsageError, match=r"'hidden_size'.*hidden_sizes"):
        make("mlp", VECTOR, 3, key=KEY, hidden_size=(8,))
    with pytest.raises(UsageError, match=r"unknown head 'duelling'.*dueling"):
        make("mlp", VECTOR, 3, key=KEY, head="duelling")
    with pytest.raises(UsageError, match=r"observations of Box.* are empty"):
        make("mlp", gymnasium.spaces.Box(0, 1, (0,)), 3, key=KEY)
    nothing = gymnasium.spaces.Dict(a=VECTOR, b=gymnasium.spaces.Box(0, 1, (2, 0)))
    with pytest.raises(UsageError, match=r"'b' of an observation is empty: .*leave_out=\['b'\]"):
        make("auto", nothing, 3, key=KEY)
    counted = gymnasium.spaces.Discrete(4)
    for name, space in (("grid_cnn", GRID), ("auto", counted)):
        for options in ({"normalize_input": True}, {"input_scale": 1.0}):
            with pytest.raises(UsageError, match="leave out normalize_input and input_scale"):
                make(name, space, 3, key=KEY, **options)
    both = gymnasium.spaces.Dict(picture=GRID, number=counted)
    make("auto", both, 3, key=KEY, normalize_input=True)
    with pytest.raises(UsageError, match="exclude each other"):
        make("mlp", VECTOR, 3, key=KEY, normalize_input=True, input_scale=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_sizes": (0,)}, "network 'grid_cnn' cannot have hidden_sizes=(0,): "),
        ({"hidden_sizes": (8.5,)}, "cannot have hidden_sizes=(8.5,): "),
        ({"hidden_sizes": 8}, "cannot have hidden_sizes=8: "),
        ({"channels": 0}, "cannot have channels=0: "),
        ({"channels": "x"}, "cannot have channels=x: "),
        ({"num_categories": 0}, "num_categories must be a whole number of at least 1, got 0"),
        ({"num_categories": 2.5}, "num_categories"),
        ({"padding": "foo"}, "padding"),
        ({"lowering": "cov"}, "lowering"),
        ({"normalize_input": 3}, "unknown normalize_input '3': known are batch_norm, batch_renorm"),
        ({"normalize_input": [1]}, "unknown normalize_input '[1]'"),
        ({"channels_first": "yes"}, "channels_first=yes: give true or false"),
        ({"encoders": "grid_cnn"}, "encoders=grid_cnn: give a mapping"),
        ({"name": "mlp", "input_scale": "abc"}, "'mlp' cannot have input_scale=abc: "),
    ],
)
def test_options_of_the_wrong_kind_are_told(options, message):
    as_called = inspect.unwrap(make_network)  # where no types are checked
    with pytest.raises(UsageError, match=re.escape(message)):
        as_called(**{"name": "grid_cnn", **options}, observation_space=GRID, choices=(3,), key=KEY)


def test_wrong_memory_is_told():
    with pytest.raises(UsageError, match=r"unknown memory 'grue'.*gru"):
        make("mlp", VECTOR, 3, key=KEY, memory="grue")
    with pytest.raises(UsageError, match=r"'memory_sizes'.*memory_size"):
        make("mlp", VECTOR, 3, key=KEY, memory_sizes=4)
    for option in ("memory_size", "num_memory_layers", "num_agents"):
        with pytest.raises(UsageError, match=f"{option} must be a whole number of at least 1"):
            make("mlp", VECTOR, 3, key=KEY, memory="gru", **{option: 0})


def test_memory_as_cleanrl_has_it():
    """`pqn_atari_envpool_lstm`: all weights orthogonal, with gain 1 in the memory, √2 elsewhere."""
    frame = gymnasium.spaces.Box(0, 255, (1, 36, 36), np.uint8)
    network = make(
        "nature_cnn",
        frame,
        6,
        key=KEY,
        init="orthogonal",
        norm="layer_norm_all",
        hidden_sizes=(64,),
        memory="lstm",
        memory_size=16,
        last_action=False,
    )
    projection, head = modules(network, Linear)[1:]
    np.testing.assert_allclose(projection.weight @ projection.weight.T, np.eye(64), atol=1e-5)
    np.testing.assert_allclose(head.weight @ head.weight.T, 2 * np.eye(6), atol=1e-5)
    assert projection.weight.shape == (64, 4 * 16)
    pixels = jnp.zeros((2, 3, 1, 36, 36), jnp.uint8)
    assert q_values(network, pixels).shape == (2, 3, 6)
