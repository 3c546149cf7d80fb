"""Hyperparameters by path: found, read and replaced, of single agents and populations."""

import inspect
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array, Bool, Float, PyTree, UInt

import eqx_q
from eqx_q.agents.exploration import EXPLORATIONS
from eqx_q.agents.hyperparameters import RANGES, check_ranges, get, leaves, names, range_of, replace
from eqx_q.agents.optimizers import OPTIMIZERS, Optimizer, make_optimizer
from eqx_q.agents.parts import Part
from eqx_q.agents.values import AbstractValue, HLGauss, make_value
from eqx_q.errors import UnknownNameError, UsageError

pytestmark = pytest.mark.quick


class Schedule(Part):
    end: Float[Array, ""]


class Exploration(Part):
    zeta: Float[Array, ""]
    schedule: Schedule
    table: Float[Array, " n"]
    choices: int = eqx.field(static=True)


class Mixer(eqx.Module):
    """No part: its number is trained."""

    scale: Float[Array, ""]


class Agent(eqx.Module):
    network: PyTree
    mixer: Mixer
    value: AbstractValue
    exploration: Exploration
    optimizer: Optimizer
    optimizer_state: PyTree[Array]
    env_steps: UInt[Array, ""]
    learning_rate: Float[Array, ""]
    discount: "Float[Array, '']"
    double: Bool[Array, ""]
    batch_size: int = eqx.field(static=True, default=3)


PATHS = {
    "value.v_min": -10.0,
    "value.v_max": 10.0,
    "value.sigma": 0.75,
    "exploration.zeta": 2.0,
    "exploration.schedule.end": 0.5,
    "optimizer.b1": 0.8,
    "learning_rate": 0.1,
    "discount": 0.9,
    "double": True,
}


def make_agent(value="hl_gauss", learning_rate=0.1):
    number = jnp.float32
    network, optimizer = jnp.zeros(()), make_optimizer({"name": "adam", "b1": 0.8})
    return Agent(
        network,
        Mixer(number(1)),
        make_value(value),
        Exploration(number(2), Schedule(number(0.5)), jnp.zeros(3), 4),
        optimizer,
        optimizer.init(network),
        jnp.uint32(7),
        jnp.asarray(learning_rate, jnp.float32),
        number(0.9),
        jnp.asarray(True),
    )


def test_what_is_a_hyperparameter():
    agent = make_agent()
    found = leaves(agent)
    assert set(found) == set(names(agent)) == set(PATHS)
    for path, value in PATHS.items():
        np.testing.assert_array_equal(get(agent, path), np.float32(value))
    # Of other parts there are others.
    assert set(names(make_agent("scalar"))) == {x for x in PATHS if not x.startswith("value.")}


def test_of_classes_and_of_shapes():
    shapes = eqx.filter_eval_shape(make_agent)
    assert names(shapes) == names(make_agent())
    known = {"exploration.zeta", "exploration.schedule.end", "learning_rate", "discount", "double"}
    assert set(names(Agent)) == known
    assert "lambda_" in names(eqx_q.PQN) and "env_steps" not in names(eqx_q.PQN)
    assert set(names(HLGauss)) == {"v_min", "v_max", "sigma"}


def test_replaces_and_leaves_the_rest():
    agent = make_agent()
    new = replace(agent, {"value.sigma": 2, "optimizer.b1": np.float64(0.5), "double": False})
    expected = PATHS | {"value.sigma": 2.0, "optimizer.b1": 0.5, "double": False}
    for path, value in expected.items():
        np.testing.assert_array_equal(get(new, path), np.float32(value))
        assert get(new, path).dtype == get(agent, path).dtype
    assert float(get(agent, "value.sigma")) == 0.75
    back = replace(new, {path: PATHS[path] for path in ("value.sigma", "optimizer.b1", "double")})
    assert eqx.tree_equal(back, agent)
    assert eqx.tree_equal(replace(agent, {}), agent)


def test_two_fields_that_share_an_array():
    number = jnp.float32(0.25)
    agent = eqx.tree_at(lambda a: (a.learning_rate, a.discount), make_agent(), (number, number))
    new = replace(agent, {"learning_rate": 1.0, "discount": 0.5})
    assert float(new.learning_rate) == 1.0 and float(new.discount) == 0.5


def test_members_of_a_population():
    rates = jnp.array([0.1, 0.2, 0.3])
    members = eqx.filter_vmap(lambda rate: make_agent(learning_rate=rate))(rates)
    np.testing.assert_array_equal(get(members, "learning_rate"), rates)
    new = replace(members, {"value.sigma": jnp.array([1.0, 2.0, 3.0]), "optimizer.b1": 0.5})
    np.testing.assert_array_equal(get(new, "value.sigma"), [1, 2, 3])
    np.testing.assert_array_equal(get(new, "optimizer.b1"), [0.5] * 3)
    with pytest.raises(UsageError, match=r"shape \(2,\): give one number, or 3 of them"):
        replace(members, {"learning_rate": jnp.ones(2)})
    with pytest.raises(UsageError, match=r"shape \(2,\): give one number"):
        replace(make_agent(), {"learning_rate": jnp.ones(2)})


def test_works_inside_of_compiled_functions():
    @eqx.filter_jit
    def loss(agent, sigma):
        agent = replace(agent, {"value.sigma": sigma})
        return agent.value.loss(jnp.arange(51.0), jnp.array([3.0]))[0]

    agent = make_agent()
    expected = HLGauss(sigma=2.0).loss(jnp.arange(51.0), jnp.array([3.0]))[0]
    np.testing.assert_allclose(loss(agent, jnp.float32(2)), expected, rtol=1e-5)


def test_unknown_paths():
    with pytest.raises(UnknownNameError, match=r"'value\.sigmas': the nearest are value\.sigma"):
        get(make_agent(), "value.sigmas")
    for path in ("network", "mixer.scale", "env_steps", "batch_size", "exploration.table"):
        with pytest.raises(UnknownNameError, match="unknown hyperparameter"):
            replace(make_agent(), {path: 1.0})


@pytest.mark.parametrize("value", [2.5, float("nan"), np.float32([0.5, 1.5])])
def test_a_replacement_outside_its_range_is_refused(value):
    agent = eqx.filter_vmap(lambda _: make_agent())(jnp.arange(2))
    with pytest.raises(UsageError, match=r"optimizer\.b1=.* out of range: give a value from 0 to"):
        replace(agent, {"optimizer.b1": value})


def test_ranges():
    assert range_of("discount") == (0.0, 1.0)
    assert range_of("reward_scale") == (-jnp.inf, jnp.inf)
    check_ranges({"discount": 1.0, "reward_scale": -3.0, "value.sigma": jnp.float32(0.5)})
    for path, value in {"discount": 1.1, "optimizer.b2": 1.0, "learning_rate": jnp.nan}.items():
        with pytest.raises(UsageError, match=f"{path}=.* is out of range"):
            check_ranges({path: value})
    for value in ("abc", [0.5], True):
        with pytest.raises(UsageError, match=f"^discount={re.escape(str(value))}: give a number"):
            check_ranges({"discount": value})
    jax.vmap(lambda x: check_ranges({"discount": x}))(jnp.array([2.0]))  # whose value is not known


def test_moving_averages_move_at_the_end_of_their_range():
    """In float32, whatever the decay that a search or a population may come to."""
    for b in range_of("optimizer.b1"):
        adam = optax.scale_by_adam(b1=jnp.float32(b), b2=jnp.float32(b))
        updates, _ = adam.update(jnp.ones(2), adam.init(jnp.ones(2)))
        assert np.all(np.isfinite(updates)) and np.all(updates > 0.5)


def test_the_table_names_hyperparameters_that_there_are():
    of_optax = {x for make in OPTIMIZERS.values() for x in inspect.signature(make).parameters}
    known = {f"optimizer.{name}" for name in of_optax} | {f"value.{x}" for x in names(HLGauss)}
    known |= {f"exploration.{name}" for part in EXPLORATIONS.values() for name in names(part)}
    known |= {*names(eqx_q.PQN), *names(eqx_q.CQL)}
    assert RANGES.keys() <= known
