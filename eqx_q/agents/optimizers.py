"""Optimisers: optax's by name, or a custom transformation."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from optax import contrib

from ..errors import explained, in_words
from ..types import Scalar
from .hyperparameters import check_ranges, is_number
from .parts import Part, check_options, name_and_options


@functools.wraps(optax.adam)
def _adam(learning_rate: Any, **options: Any) -> optax.GradientTransformation:
    """Adam as in optax, with only the state of `scale_by_adam`."""
    adam = optax.scale_by_adam(**options)

    def update(updates, state, params=None):
        updates, state = adam.update(updates, state, params)
        return jax.tree.map(lambda x: -learning_rate * x, updates), state

    return optax.GradientTransformation(adam.init, update)


# These need the loss or a key at each step, or fix their rate on creation; `optimistic_adam` is
# deprecated.
_OTHERS = {"lbfgs", "noisy_sgd", "rprop", "optimistic_adam"}


def _is_optimizer(name: str, make: Any) -> bool:
    """Whether `make` makes an optimiser that needs only gradients, parameters and a rate."""
    if name.startswith(("_", "scale_by")) or name in _OTHERS:
        return False
    is_function = inspect.isfunction(make) or isinstance(make, functools.partial)
    return is_function and "learning_rate" in inspect.signature(make).parameters


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    name: make for name, make in vars(optax).items() if _is_optimizer(name, make)
} | {"adam": _adam, "muon": contrib.muon}


# Those that update every number on its own, so that it does not matter how numbers lie in arrays.
_ELEMENTWISE = {
    "adabelief",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "amsgrad",
    "lion",
    "nadam",
    "nadamw",
    "radam",
    "rmsprop",
    "sgd",
    "sign_sgd",
    "yogi",
}


class Optimizer(Part):
    """Turns gradients into parameter updates, with a learning rate given at each step.

    **Attributes:**

    - `transformation`: a name of `OPTIMIZERS`; a function from a learning rate to an optax
        transformation; or such a transformation, whose updates are multiplied by the learning rate.
        Make the last with a rate of 1, as in `optax.adamw(1.0)`.
    - `options`: *traced*; the given numeric options. Options that are not given keep optax's
        defaults, and are not hyperparameters.
    - `settings`: the other given options.
    """

    transformation: str | optax.GradientTransformation | Callable = eqx.field(static=True)
    options: dict[str, Float[Array, ""]]
    settings: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    @property
    def is_elementwise(self) -> bool:
        """Whether it updates every number on its own, whichever array holds it."""
        has_mask = any(name.endswith("mask") for name, _ in self.settings)
        return self.transformation in _ELEMENTWISE and not has_mask

    def init(self, parameters: PyTree) -> PyTree:
        """The state before the first step."""
        return self._at(0.0).init(parameters)

    def step(
        self, gradients: PyTree, state: PyTree, parameters: PyTree, learning_rate: Scalar
    ) -> tuple[PyTree, PyTree]:
        """**Returns:** what to add to the parameters (`optax.apply_updates`), and the new state."""
        return self._at(learning_rate).update(gradients, state, parameters)

    def _at(self, learning_rate: Any) -> optax.GradientTransformation:
        if isinstance(self.transformation, optax.GradientTransformation):
            return optax.chain(self.transformation, optax.scale(learning_rate))
        if isinstance(self.transformation, str):
            make = OPTIMIZERS[self.transformation]
            return make(learning_rate, **self.options, **dict(self.settings))
        return self.transformation(learning_rate)


AnyOptimizer: TypeAlias = (
    str | Mapping[str, Any] | optax.GradientTransformation | Callable | Optimizer
)


def make_optimizer(given: AnyOptimizer) -> Optimizer:
    """Makes an optimiser from optax's name, a mapping `{"name": ..., **options}`, or an object.

    Options are those of optax's function of that name; those that are `None` keep their default. A
    number is a leaf of the agent, unless optax's default is a whole number or a switch.

    An object is a function of the learning rate, or a transformation made with a rate of 1 (see
    `Optimizer`). Agents can be saved with an importable function, but not with a transformation.

    **Raises:** `UnknownNameError` for an unknown name or option, `UsageError` if it cannot make a
    step from gradients, parameters and a learning rate alone.
    """
    if isinstance(given, Optimizer):
        return given
    if not isinstance(given, str | Mapping):
        return _tried(Optimizer(given, {}, ()))
    name, options = name_and_options("optimizer", given, OPTIMIZERS)
    known = dict(inspect.signature(OPTIMIZERS[name]).parameters)
    del known["learning_rate"]
    check_options("optimizer", name, options, known)
    numbers = {
        option: value
        for option, value in options.items()
        if is_number(value) and not isinstance(known[option].default, int)
    }
    check_ranges({f"optimizer.{option}": value for option, value in numbers.items()})
    settings = {
        option: tuple(value) if isinstance(value, list) else value
        for option, value in options.items()
        if option not in numbers
    }
    numbers = {option: jnp.asarray(value, jnp.float32) for option, value in numbers.items()}
    return _tried(Optimizer(name, numbers, tuple(sorted(settings.items()))))


def _tried(optimizer: Optimizer) -> Optimizer:
    """Checks that an optimiser can make a step, without computing anything."""
    parameters = {"weight": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    named = in_words({**optimizer.options, **dict(optimizer.settings)})
    with explained(
        f"optimizer {optimizer.transformation!r} with {named} cannot make a step from gradients, "
        "parameters and a learning rate"
    ):
        eqx.filter_eval_shape(
            lambda x: optimizer.step(x, optimizer.init(x), x, jnp.zeros(())), parameters
        )
    return optimizer
