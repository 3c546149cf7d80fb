"""Networks: built from parts, and users' own."""

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from networks import call, make, q_values

from eqx_q.errors import UsageError
from eqx_q.nets import AbstractQNetwork, Inputs, Network, as_network, make_network

pytestmark = pytest.mark.quick

KEY = jax.random.key(0)
VECTOR = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
OBS = jax.random.normal(KEY, (3, 5, 4))


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_every_observation_stands_by_itself(norm):
    network = make("mlp", VECTOR, 2, key=KEY, hidden_sizes=(8,), norm=norm)
    together = call(network, OBS)
    assert together.values.shape == (3, 5, 2, 1)
    assert together.memory == network.initial_memory(5) == ()
    for t in range(3):
        for b in range(5):
            alone = call(network, OBS[t : t + 1, b : b + 1]).values[0, 0]
            np.testing.assert_allclose(together.values[t, b], alone, rtol=1e-4, atol=1e-5)


def test_features_are_what_the_head_reads():
    network = make("mlp", VECTOR, 2, key=KEY, hidden_sizes=(8,))
    assert isinstance(network, Network)
    output = call(network, OBS)
    rows, _ = network.encoder(OBS.reshape(15, 4), network.encoder.initial_statistics())
    np.testing.assert_allclose(output.features, rows.reshape(3, 5, 8), rtol=1e-5, atol=1e-6)
    values, _ = network.head(rows, network.head.initial_statistics())
    np.testing.assert_allclose(output.values, values.reshape(3, 5, 2, 1), rtol=1e-5, atol=1e-6)


def test_training_normalises_over_the_masked_steps_and_lanes():
    network = make("mlp", VECTOR, 2, key=KEY, hidden_sizes=(8,), norm="batch_norm")
    mask = jnp.array([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1], [0, 1, 0, 0, 1]], bool)
    out = call(network, OBS, batch_mask=mask)
    real = call(network, OBS[mask][None], batch_mask=jnp.ones((1, 9), bool))
    np.testing.assert_allclose(out.values[mask], real.values[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(out.statistics), jax.tree.leaves(real.statistics), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_statistics_keep_their_structure(norm):
    network = make("minatar_cnn", GRID, 2, key=KEY, hidden_sizes=(8,), norm=norm)
    before = network.initial_statistics()
    after = call(network, jnp.ones((1, 2, 5, 5, 2)), batch_mask=jnp.ones((1, 2), bool)).statistics
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert len(jax.tree.leaves(before)) == (6 if norm == "batch_norm" else 0)


def test_values_of_a_choice_are_side_by_side():
    many = make_network("mlp", VECTOR, (2, 3), num_values=4, key=KEY, hidden_sizes=(8,))
    flat = make_network("mlp", VECTOR, (20,), key=KEY, hidden_sizes=(8,))
    values = q_values(flat, OBS)
    assert many.head.num_values == 4 and many.choices == (2, 3)
    for choice in range(5):
        own = values[..., 4 * choice : 4 * (choice + 1)]
        np.testing.assert_array_equal(call(many, OBS).values[:, :, choice], own)


# Modules of one's own --------------------------------------------------------------------------


def test_a_module_of_ones_own():
    module = eqx.nn.MLP(4, 2, 64, 2, key=KEY)
    network = as_network(module)
    assert isinstance(network, AbstractQNetwork)
    out = network(Inputs(OBS), network.initial_statistics(), network.initial_memory(5))
    for t in range(3):
        for b in range(5):
            np.testing.assert_allclose(
                out.values[t, b, :, 0], module(OBS[t, b]), rtol=1e-4, atol=1e-6
            )
    assert out.memory == () and not jax.tree.leaves(out.statistics)
    assert len(jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))) == 6


class Arm(eqx.Module):
    """Of one observation, a dict, the values of two choices: each `value` times the weights."""

    weight: jax.Array
    flat: bool

    def __call__(self, obs):
        values = obs["value"][:, None] * self.weight + obs["number"]
        return values.reshape(-1) if self.flat else values


@pytest.mark.parametrize("flat", [False, True])
def test_a_module_sees_a_tree_and_may_give_several_values(flat):
    network = as_network(Arm(jnp.array([1.0, 10.0, 100.0]), flat), num_values=3)
    obs = {"value": OBS[..., :2], "number": jnp.arange(15).reshape(3, 5)}
    expected = OBS[..., :2, None] * np.array([1, 10, 100]) + obs["number"][..., None, None]
    np.testing.assert_allclose(call(network, obs).values, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="4 for each choice"):
        call(as_network(Arm(jnp.ones(3), flat), num_values=4), obs)


def test_a_network_stays_itself():
    network = make("mlp", VECTOR, 2, key=KEY)
    assert as_network(network) is network


def test_what_is_no_network_is_refused():
    with pytest.raises(UsageError, match="an Equinox module"):
        as_network(lambda x: x)


# Programs --------------------------------------------------------------------------------------

GRID = gymnasium.spaces.Box(0, 1, (5, 5, 2), np.float32)


def small(memory="none"):
    options = {"memory": memory, "memory_size": 4, "last_action": False}
    return make("minatar_cnn", GRID, 2, key=KEY, channels=4, hidden_sizes=(4,), **options)


def test_a_network_is_exported_for_devices_that_are_not_here():
    """Each has its own way to compute, whatever machine traced it."""
    (rows,) = jax.export.symbolic_shape("rows")
    network, parameters = small(), jax.ShapeDtypeStruct((1, rows, 5, 5, 2), jnp.float32)
    export = jax.export.export(
        jax.jit(lambda obs: q_values(network, obs, memory=())), platforms=("cpu", "cuda")
    )
    jaxtyping.config.update("jaxtyping_disable", True)  # to annotations a size is a number
    try:
        exported = export(parameters)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert "stablehlo.convolution" in exported.mlir_module()
    for platform, convolves in (("cpu", False), ("cuda", True)):
        traced = jax.jit(lambda obs: q_values(network, obs)).trace(jnp.ones((1, 3, 5, 5, 2)))
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in program) is convolves, platform
    obs = jax.random.normal(KEY, (1, 3, 5, 5, 2))
    again = jax.export.deserialize(exported.serialize()).call(obs)
    np.testing.assert_allclose(again, q_values(network, obs), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("optimized")
def test_the_other_devices_way_costs_nothing():
    """Members of a population learn side by side; their program has no choice left to make."""
    members = eqx.filter_vmap(
        lambda key: eqx.tree_at(
            lambda n: n.head.linear.bias, small("mingru"), jax.random.normal(key, (2,))
        )
    )
    members = members(jax.random.split(KEY, 2))

    def learn(members, obs):
        def loss(network):
            return jnp.sum(call(network, obs).values ** 2)

        return eqx.filter_vmap(eqx.filter_grad(loss))(members)

    compiled = eqx.filter_jit(learn).lower(members, jnp.ones((3, 2, 5, 5, 2))).compile()
    program = compiled.compiled.as_text()
    assert " dot(" in program
    for left_out in ("conditional", "convolution("):
        assert left_out not in program
