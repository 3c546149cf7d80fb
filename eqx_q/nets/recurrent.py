"""Recurrences over time: the memory of networks.

A recurrence maps a sequence `[T, B, inputs]` and the memory before it to outputs
`[T, B, features]` and the memory after it. At the `first` observation of an episode, memory is
reset to zeros, its initial value.
"""

import abc
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .layers import Linear
from .platforms import by_platform
from .precision import Multiply, multiplication

Sequence: TypeAlias = Float[Array, "T B ..."]
Start: TypeAlias = Bool[Array, "T B"]


class AbstractRecurrence(eqx.Module):
    """A function of a sequence and a memory."""

    @abc.abstractmethod
    def initial_memory(self, num_lanes: int) -> PyTree[Array]:
        """Initial memory: zeros, with a leading lane axis."""

    @abc.abstractmethod
    def __call__(
        self, x: Sequence, memory: PyTree[Array], first: Start
    ) -> tuple[Sequence, PyTree[Array]]:
        """**Arguments:**

        - `x`: the sequence `[T, B, inputs]`.
        - `memory`: from `initial_memory`, or from the previous call.
        - `first`: steps before which memory is reset.

        **Returns:** the output of every step, `[T, B, features]`, and the memory after the last.
        """


def _forget(memory: PyTree[Array], first: Bool[Array, "*lanes"]) -> PyTree[Array]:
    return jax.tree.map(lambda x: jnp.where(first[..., None], 0.0, x), memory)


# Gated recurrences -----------------------------------------------------------------------------

# One array `[B, size]` per gate. XLA does not vectorise slices of one array on CPU: the same cell
# took five times as long.
Gates: TypeAlias = tuple[Float[Array, "*steps B size"], ...]
# Maps the projected input, the projected state and the previous state to the new state, element by
# element. The first part of the state is the output.
Cell: TypeAlias = Callable[[Gates, Gates, tuple[Array, ...]], tuple[Array, ...]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unroll(
    cell: Cell,
    multiply: Multiply,
    weights: tuple[Float[Array, "size size"], ...],
    biases: tuple[Float[Array, "size"], ...],
    x: Gates,
    state: tuple[Float[Array, "B size"], ...],
    first: Bool[Array, "T B"],
) -> tuple[Float[Array, "T B size"], tuple[Float[Array, "B size"], ...]]:
    """Applies `cell` over the steps of `x`; returns all outputs and the last state.

    The gradients of weights and biases are computed after the backward scan, as one product over
    all steps and lanes. Differentiating the forward scan would instead add a small product per step
    to an array of the weight's size.
    """
    return _unroll_forwards(cell, multiply, weights, biases, x, state, first)[0]


def _unroll_forwards(cell, multiply, weights, biases, x, state, first):
    def step(state, inputs):
        x, first = inputs
        state = _forget(state, first)
        hidden = tuple(
            multiply(state[0], w, ((1,), (0,))) + b for w, b in zip(weights, biases, strict=True)
        )
        state = cell(x, hidden, state)
        return state, (hidden, state)

    last, (hidden, states) = lax.scan(step, state, (x, first))
    before = jax.tree.map(lambda start, s: jnp.concatenate([start[None], s[:-1]]), state, states)
    return (states[0], last), (weights, x, hidden, before, first)


def _unroll_backwards(cell, multiply, residuals, gradients):
    weights, x, hidden, before, first = residuals
    before = _forget(before, first)
    transposed = [weight.T for weight in weights]  # once, not at every step

    def step(gradient, inputs):
        x, hidden, before, first, output = inputs
        gradient = (gradient[0] + output, *gradient[1:])
        _, backwards = jax.vjp(cell, x, hidden, before)
        x, hidden, gradient = backwards(gradient)
        through = sum(multiply(h, w, ((1,), (0,))) for h, w in zip(hidden, transposed, strict=True))
        gradient = (gradient[0] + through, *gradient[1:])
        return _forget(gradient, first), (x, hidden)

    outputs, last = gradients
    inputs = (x, hidden, before, first, outputs)
    start, (x, hidden) = lax.scan(step, last, inputs, reverse=True)
    weights = tuple(multiply(before[0], h, ((0, 1), (0, 1))) for h in hidden)
    return weights, tuple(jnp.sum(h, (0, 1)) for h in hidden), x, start, None


_unroll.defvjp(_unroll_forwards, _unroll_backwards)
# Without this, every call outside a compiled program would recompile the scan.
_unroll_compiled = jax.jit(_unroll, static_argnums=(0, 1))


def _split(x: Float[Array, "*rows gates"], num_gates: int) -> Gates:
    return tuple(jnp.split(x, num_gates, axis=-1))


def _gates(
    inputs: int, size: int, num_gates: int, key: PRNGKeyArray, init: str
) -> tuple[Linear, Float[Array, "size gates"]]:
    """Parameters for all gates, concatenated: for the input, and for the previous state."""
    input_key, *keys = jax.random.split(key, 1 + num_gates)
    projection = Linear(inputs, num_gates * size, key=input_key, init=init)
    orthogonal = jax.nn.initializers.orthogonal()
    if init == "orthogonal":  # with gain 1 here, and over all gates at once
        weight = orthogonal(keys[0], projection.weight.shape)
        projection = eqx.tree_at(lambda layer: layer.weight, projection, weight)
        return projection, orthogonal(keys[1], (size, num_gates * size))
    return projection, jnp.concatenate([orthogonal(k, (size, size)) for k in keys], axis=1)


def _gru_cell(x, hidden, state):
    (before,) = state
    x_reset, x_update, x_new = x
    h_reset, h_update, h_new = hidden
    reset = jax.nn.sigmoid(x_reset + h_reset)
    update = jax.nn.sigmoid(x_update + h_update)
    new = jnp.tanh(x_new + reset * h_new)
    return ((1 - update) * new + update * before,)


class GRU(AbstractRecurrence):
    """The gated recurrent unit (Cho et al. 2014), with the reset gate after the product.

    This is the variant of cuDNN and of Flax's `GRUCell`, whose initialisation is the default:

        r = σ(W_r x + b_r + U_r h)          z = σ(W_z x + b_z + U_z h)
        n = tanh(W_n x + b_n + r (U_n h + c_n))        h' = (1 - z) n + z h

    `init`, one of `layers.INITIALIZERS`, is for `W`; each gate's `U` is orthogonal. With
    `"orthogonal"`, the `W` of all gates form one orthogonal matrix, and so do the `U`, as in
    CleanRL.
    """

    projection: Linear
    weight: Float[Array, "size gates"]
    bias: Float[Array, "size"]

    def __init__(self, inputs: int, size: int, *, key: PRNGKeyArray, init: str = "lecun_normal"):
        self.projection, self.weight = _gates(inputs, size, 3, key, init)
        self.bias = jnp.zeros(size)

    def initial_memory(self, num_lanes: int) -> Float[Array, "B size"]:
        return jnp.zeros((num_lanes, *self.bias.shape))

    def __call__(
        self, x: Sequence, memory: Float[Array, "B size"], first: Start
    ) -> tuple[Sequence, Float[Array, "B size"]]:
        projected, _ = self.projection(x, None)
        zeros = jnp.zeros_like(self.bias)
        y, (memory,) = _unroll_compiled(
            _gru_cell,
            multiplication(),
            _split(self.weight, 3),
            (zeros, zeros, self.bias),
            _split(projected, 3),
            (memory,),
            first,
        )
        return y, memory


def _lstm_cell(x, hidden, state):
    _, carried = state
    i, f, g, o = (from_x + from_state for from_x, from_state in zip(x, hidden, strict=True))
    carried = jax.nn.sigmoid(f) * carried + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(carried), carried


class LSTM(AbstractRecurrence):
    """Long short-term memory (Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000).

        i, f, o = σ(W x + U h + b)     g = tanh(W_g x + U_g h + b_g)
        c' = f c + i g                 h' = o tanh(c')

    `init`: see `GRU`; the default is that of Flax's `OptimizedLSTMCell`. The memory is `(h, c)`.
    """

    projection: Linear
    weight: Float[Array, "size gates"]

    def __init__(self, inputs: int, size: int, *, key: PRNGKeyArray, init: str = "lecun_normal"):
        self.projection, self.weight = _gates(inputs, size, 4, key, init)

    def initial_memory(
        self, num_lanes: int
    ) -> tuple[Float[Array, "B size"], Float[Array, "B size"]]:
        zeros = jnp.zeros((num_lanes, self.weight.shape[0]))
        return zeros, zeros

    def __call__(
        self,
        x: Sequence,
        memory: tuple[Float[Array, "B size"], Float[Array, "B size"]],
        first: Start,
    ) -> tuple[Sequence, tuple[Float[Array, "B size"], Float[Array, "B size"]]]:
        projected, _ = self.projection(x, None)
        zeros = jnp.zeros(self.weight.shape[0])  # the projection has a bias already
        return _unroll_compiled(
            _lstm_cell,
            multiplication(),
            _split(self.weight, 4),
            (zeros,) * 4,
            _split(projected, 4),
            memory,
            first,
        )


# Parallel scans --------------------------------------------------------------------------------


@jax.custom_vjp
def linear_recurrence(
    decay: Float[Array, "T *features"], x: Float[Array, "T *features"], start: Float[Array, "..."]
) -> Float[Array, "T *features"]:
    """`h_t = decay_t h_{t-1} + x_t`, where `start` is the `h` before the first step.

    Computed for all `t` in parallel, in log T steps (Blelloch 1990, §1.4; Martin & Cundy 2018, §2);
    on CPU one after the other. A `decay_t` of 0 resets `h`.
    """
    return _linear_recurrence(decay, x, start)[0]


def _in_turn(decay, x, reverse):  # on CPU, T small steps take 2/3 of the time of log T large ones
    def step(h, inputs):
        decay, x = inputs
        h = decay * h + x
        return h, h

    return lax.scan(step, jnp.zeros_like(x[0]), (decay, x), reverse=reverse)[1]


def _in_parallel(decay, x, reverse):
    def compose(earlier, later):
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    return lax.associative_scan(compose, (decay, x), reverse=reverse)[1]


def _scan(decay, x, reverse=False):
    return by_platform(
        partial(_in_turn, reverse=reverse), partial(_in_parallel, reverse=reverse), decay, x
    )


def _linear_recurrence(decay, x, start):
    y = _scan(decay, x.at[0].add(decay[0] * start))
    return y, (decay, y, start)


def _linear_recurrence_backwards(residuals, gradient):
    # The gradient is a linear recurrence back in time; this halves the code to compile.
    decay, y, start = residuals
    x = _scan(jnp.concatenate([decay[1:], jnp.zeros_like(decay[:1])]), gradient, reverse=True)
    return x * jnp.concatenate([start[None], y[:-1]]), x, decay[0] * x[0]


linear_recurrence.defvjp(_linear_recurrence, _linear_recurrence_backwards)


class MinGRU(AbstractRecurrence):
    """The minimal GRU (Feng et al. 2024, §3.1), whose gate depends on the input but not the state:

        z = σ(W_z x + b_z)        h' = (1 - z) h + z (W_h x + b_h)

    `b_z` is initialised so that features forget over 2 to `horizon` steps, evenly on a logarithmic
    scale (in the spirit of Tallec & Ollivier 2018, §2). With `b_z = 0` all of them would forget
    within a few steps, and training would not change that. `init` is for `W`.
    """

    projection: Linear

    def __init__(
        self,
        inputs: int,
        size: int,
        *,
        key: PRNGKeyArray,
        init: str = "lecun_normal",
        horizon: float = 1000.0,
    ):
        projection = Linear(inputs, 2 * size, key=key, init=init)
        steps = jnp.geomspace(2.0, horizon, size)
        bias = projection.bias.at[:size].set(-jnp.log(steps - 1))  # σ(bias) = 1 / steps
        self.projection = eqx.tree_at(lambda layer: layer.bias, projection, bias)

    def initial_memory(self, num_lanes: int) -> Float[Array, "B size"]:
        return jnp.zeros((num_lanes, self.projection.bias.shape[0] // 2))

    def __call__(
        self, x: Sequence, memory: Float[Array, "B size"], first: Start
    ) -> tuple[Sequence, Float[Array, "B size"]]:
        gate, new = jnp.split(self.projection(x, None)[0], 2, axis=-1)
        keep = _forget(jax.nn.sigmoid(-gate), first)  # 0 at `first`: forgets the previous step
        y = linear_recurrence(keep, jax.nn.sigmoid(gate) * new, memory)
        return y, y[-1]


RECURRENCES: dict[str, Callable[..., AbstractRecurrence]] = {
    "gru": GRU,
    "lstm": LSTM,
    "mingru": MinGRU,
}
