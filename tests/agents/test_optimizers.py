"""Optimisers by name equal optax's, bit for bit; invalid options are refused at creation."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import eqx_q
from eqx_q.agents.optimizers import OPTIMIZERS, Optimizer, make_optimizer
from eqx_q.errors import UnknownNameError, UsageError

pytestmark = pytest.mark.quick

RATES = jnp.array([0.1, 0.03, 0.02, 0.5, 0.01, 0.3, 0.04, 0.2])


def make_parameters():
    """As networks have them: with `None` where something is no parameter."""
    rng = np.random.default_rng(0)
    arrays = {"weight": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    return {"rest": None, **jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)}


def gradients_of(parameters):
    return jax.tree.map(lambda x: jnp.sin(3 * x) + 0.1 * x, parameters)


def train(step, state):
    """A step for each of the rates, compiled, with the rate traced."""

    def body(carry, rate):
        parameters, state = carry
        parameters, state = step(gradients_of(parameters), state, parameters, rate)
        return (parameters, state), None

    return jax.jit(lambda x: jax.lax.scan(body, (make_parameters(), x), RATES)[0])(state)


def train_with(optimizer):
    def step(gradients, state, parameters, rate):
        updates, state = optimizer.step(gradients, state, parameters, rate)
        return optax.apply_updates(parameters, updates), state

    return train(step, optimizer.init(make_parameters()))


def train_with_optax(make):
    def step(gradients, state, parameters, rate):
        updates, state = make(rate).update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    return train(step, make(0.0).init(make_parameters()))


@pytest.mark.parametrize("name", ["radam", "adamw", "lion", "sgd", "rmsprop", "muon"])
def test_named_ones_are_optaxs(name):
    ours, theirs = make_optimizer(name), getattr(contrib if name == "muon" else optax, name)
    assert eqx.tree_equal(train_with(ours), train_with_optax(theirs))


def test_adam_with_the_state_of_scale_by_adam():
    parameters = make_parameters()
    ours = make_optimizer({"name": "adam", "eps": 1.5e-4})
    first = optax.scale_by_adam().init(parameters)
    assert eqx.tree_equal(ours.init(parameters), first)

    def step(gradients, state, parameters, rate):
        adam = optax.scale_by_adam(eps=ours.options["eps"])
        updates, state = adam.update(gradients, state)
        return jax.tree.map(lambda p, u: p - rate * u, parameters, updates), state

    assert eqx.tree_equal(train_with(ours), train(step, first))


def test_options_given_are_numbers_of_the_agent_or_settings():
    optimizer = make_optimizer({"name": "adamw", "b1": 0.5, "nesterov": True, "eps": None})
    assert set(optimizer.options) == {"b1"} and dict(optimizer.settings) == {"nesterov": True}
    expected = train_with_optax(lambda rate: optax.adamw(rate, b1=0.5, nesterov=True))
    for x, y in zip(*map(jax.tree.leaves, (train_with(optimizer), expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    whole = make_optimizer({"name": "muon", "ns_steps": 3})  # a loop's length: static
    assert dict(whole.settings) == {"ns_steps": 3} and not whole.options
    momentum = make_optimizer({"name": "sgd", "momentum": 0.9})  # by default None
    assert set(momentum.options) == {"momentum"}


def test_every_named_one_makes_a_step_with_all_of_its_numbers_traced():
    """Without compiling: that none of them looks at a number's value."""
    parameters = make_parameters()
    for name, make in OPTIMIZERS.items():
        known = inspect.signature(make).parameters.values()
        numbers = {x.name: x.default for x in known if isinstance(x.default, float)}
        optimizer = make_optimizer({"name": name, **numbers})
        assert set(optimizer.options) == set(numbers)

        def step(optimizer, parameters, rate):
            state = optimizer.init(parameters)
            updates, new = optimizer.step(parameters, state, parameters, rate)
            assert jax.tree.structure(new) == jax.tree.structure(state)  # so that it can be scanned
            return updates

        updates = eqx.filter_eval_shape(step, optimizer, parameters, jnp.float32(0.1))
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), parameters)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == shapes


def test_many_rates_and_options_at_once():
    epsilons, parameters = jnp.array([1e-8, 0.1]), make_parameters()

    def first_step(eps, rate):
        optimizer = make_optimizer({"name": "adam", "eps": eps})
        state = optimizer.init(parameters)
        return optimizer.step(gradients_of(parameters), state, parameters, rate)[0]["weight"]

    together = jax.vmap(first_step)(epsilons, RATES[:2])
    gradient = np.asarray(gradients_of(parameters)["weight"])
    for i in range(2):  # in its first step Adam's averages are the gradient and its square
        expected = -RATES[i] * gradient / (np.abs(gradient) + epsilons[i])
        np.testing.assert_allclose(together[i], expected, rtol=1e-5)


def test_a_transformation_of_ones_own_is_multiplied_by_the_rate():
    parameters, _ = train_with(make_optimizer(optax.sgd(1.0, momentum=0.5)))
    expected = jax.tree.map(np.asarray, make_parameters())
    speed = jax.tree.map(np.zeros_like, expected)
    for rate in np.asarray(RATES):
        speed = jax.tree.map(lambda v, g: 0.5 * v + g, speed, gradients_of(expected))
        expected = jax.tree.map(lambda p, v, rate=rate: p - rate * v, expected, speed)
    for x, y in zip(*map(jax.tree.leaves, (parameters, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def adam_without_memory(learning_rate):
    return optax.adam(learning_rate, b1=0.0)


def test_a_function_of_the_rate():
    optimizer = make_optimizer(adam_without_memory)
    assert eqx.tree_equal(train_with(optimizer), train_with_optax(adam_without_memory))
    assert make_optimizer(optimizer) is optimizer


def test_saved_and_loaded_it_is_the_same(tmp_path):
    optimizer = make_optimizer({"name": "adamw", "b1": 0.5, "mu_dtype": "bfloat16"})
    eqx_q.save(tmp_path / "optimizer.eqx", optimizer)
    loaded = eqx_q.load(tmp_path / "optimizer.eqx")
    assert type(loaded) is Optimizer and eqx.tree_equal(loaded, optimizer)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("adma", UnknownNameError, "unknown optimizer 'adma': the nearest are adam"),
        ("lbfgs", UnknownNameError, "unknown optimizer 'lbfgs'"),  # needs the loss too
        ("rprop", UnknownNameError, "'rprop'"),  # takes its rate at the start
        ({"name": "adam", "epsilon": 1e-3}, UnknownNameError, "'epsilon': the nearest are eps"),
        ({"name": "adam", "learning_rate": 1e-3}, UnknownNameError, "'learning_rate'"),
        ({"b1": 0.5}, UsageError, "is not a name: give one of adabelief"),
        ({"name": "adam", "b1": 1.0}, UsageError, "optimizer.b1=1.0 is out of range"),
        (
            {"name": "adam", "mu_dtype": "float33"},
            UsageError,
            "'adam' with mu_dtype=float33 cannot",
        ),
        ({"name": "adam", "nesterov": 3}, UsageError, "optimizer.nesterov=3: give true or false"),
        (functools.partial(optax.lbfgs), UsageError, "cannot make a step"),
        (int, UsageError, "cannot make a step"),
    ],
)
def test_what_cannot_be_made(given, error, message):
    with pytest.raises(error, match=message):
        make_optimizer(given)
