"""Optimisers of compact parameters take the steps that they take without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_q.agents.compact import AS_IT_IS, layout
from eqx_q.agents.gradients import averaged_scan, clip_by_global_norm
from eqx_q.agents.optimizers import _ELEMENTWISE, OPTIMIZERS, make_optimizer

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMETERS = {
    "weight": jax.random.normal(KEYS[0], (3, 2)),
    "bias": jax.random.normal(KEYS[1], (2,)),
    "scale": jnp.array(0.5),
    "deep": {"kernel": jax.random.normal(KEYS[2], (2, 2, 2)), "bias": jnp.ones(2)},
}


def steps(optimizer, lay, parameters):
    """Parameters after steps on a function whose gradient differs in each number."""
    gradient = jax.grad(lambda p: sum(jnp.sum(jnp.cos(3 * x) + x**2) for x in jax.tree.leaves(p)))

    def step(carry, _):
        parameters, state = carry
        gradients = lay.pack(gradient(lay.unpack(parameters)))
        updates, state = optimizer.step(gradients, state, parameters, 0.1)
        return (jax.tree.map(jnp.add, parameters, updates), state), None

    state = lay.pack(optimizer.init(parameters))
    carry, _ = jax.lax.scan(step, (lay.pack(parameters), state), None, 5)
    return lay.unpack(carry)


@pytest.mark.parametrize("name", sorted(_ELEMENTWISE))
def test_compact_parameters_take_the_same_steps(name):
    optimizer = make_optimizer(name)
    lay = layout(optimizer, PARAMETERS)
    assert lay is not AS_IT_IS
    plain, compact = (
        jax.jit(functools.partial(steps, optimizer, x))(PARAMETERS) for x in (AS_IT_IS, lay)
    )
    assert jax.tree.structure(plain) == jax.tree.structure(compact)
    assert not np.allclose(plain[0]["weight"], PARAMETERS["weight"])
    for ours, theirs in zip(jax.tree.leaves(compact), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_others_keep_parameters_as_they_are():
    assert set(OPTIMIZERS) > _ELEMENTWISE
    for name in ("muon", "lamb", "adafactor"):
        assert layout(make_optimizer(name), PARAMETERS) is AS_IT_IS
    options = {"weight_decay_mask": lambda tree: jax.tree.map(lambda _: True, tree)}
    masked = make_optimizer({"name": "adadelta", **options})
    assert layout(masked, PARAMETERS) is AS_IT_IS
    assert layout(make_optimizer("adam"), {"weight": jnp.ones((2, 2))}) is AS_IT_IS


@pytest.mark.parametrize("kept", [("bias", "scale"), ("weight", "deep")])
def test_vectors_or_matrices_alone(kept):
    tree = {name: PARAMETERS[name] for name in kept}
    lay = layout(make_optimizer("adam"), tree)
    packed = lay.unpack(lay.pack(tree))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), packed, tree))


def test_the_mean_of_reports_is_that_of_a_scan():
    def step(carry, x):
        return carry + x, {"sum": carry, "two": {"square": x**2}}

    inputs = jnp.arange(5.0)
    carry, mean = averaged_scan(step, jnp.array(1.0), inputs)
    expected_carry, reports = jax.lax.scan(step, jnp.array(1.0), inputs)
    assert carry == expected_carry
    assert mean["sum"] == reports["sum"].mean() and mean["two"]["square"] == 6


def test_the_norm_of_no_gradients_is_zero():
    assert clip_by_global_norm({}, 1.0)[1] == 0
