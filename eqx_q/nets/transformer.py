"""A transformer as memory: attention over a window of the episode's past."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..errors import UsageError, check_whole
from .layers import LayerNorm, Linear
from .precision import product
from .recurrent import AbstractRecurrence, Sequence, Start


class Gate(eqx.Module):
    """Joins a layer's output `y` to its input `x` (Parisotto et al. 2020, arXiv 1910.06764, §3.2):

        r = σ(W_r y + U_r x)    z = σ(W_z y + U_z x - b)    h = tanh(W_h y + U_h (r x))
        gate(x, y) = (1 - z) x + z h

    `b` starts at 2, so that the gate starts near the identity.
    """

    output: Linear
    update: Float[Array, "size both"]
    reset: Float[Array, "size size"]

    def __init__(self, size: int, *, key: PRNGKeyArray, init: str):
        output_key, update_key, reset_key = jax.random.split(key, 3)
        output = Linear(size, 3 * size, key=output_key, init=init)
        bias = output.bias.at[size : 2 * size].set(-2.0)
        self.output = eqx.tree_at(lambda layer: layer.bias, output, bias)
        orthogonal = jax.nn.initializers.orthogonal()
        both = [orthogonal(k, (size, size)) for k in jax.random.split(update_key)]
        self.update = jnp.concatenate(both, axis=1)
        self.reset = orthogonal(reset_key, (size, size))

    def __call__(self, x: Sequence, y: Sequence) -> Sequence:
        y_reset, y_update, y_new = jnp.split(self.output(y, None)[0], 3, axis=-1)
        x_reset, x_update = jnp.split(product(x, self.update), 2, axis=-1)
        reset, update = jax.nn.sigmoid(y_reset + x_reset), jax.nn.sigmoid(y_update + x_update)
        new = jnp.tanh(y_new + product(reset * x, self.reset))
        return (1 - update) * x + update * new


class Context(eqx.Module):
    """The last `C` inputs of a block, latest last, and how many of them belong to the episode.

    The others are zeros.
    """

    inputs: Float[Array, "B C size"]
    length: Int[Array, " B"]


class GTrXL(AbstractRecurrence):
    """A block of the gated Transformer-XL (Parisotto et al. 2020, arXiv 1910.06764, §3).

    Every step attends to itself and to the `context` steps before it in its episode, with relative
    positions (Dai et al. 2019, Transformer-XL, arXiv 1901.02860, §3.3). The memory holds the
    block's inputs at those steps; no gradient flows into it. Normalisation comes before attention
    and before the two linear layers, and gates take the place of residual connections.

    One block is one of `num_memory_layers`. `init` is for the linear maps.
    """

    embedding: Linear
    norms: tuple[LayerNorm, LayerNorm]
    query: Linear
    key_and_value: Linear
    position: Float[Array, "size size"]
    biases: Float[Array, "2 heads width"]
    attended: Linear
    hidden: tuple[Linear, Linear]
    gates: tuple[Gate, Gate]
    context: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        size: int,
        *,
        key: PRNGKeyArray,
        init: str = "lecun_normal",
        context: int = 64,
        num_heads: int = 4,
    ):
        """**Arguments:** `context`: `C`, the steps that it looks back; `num_heads` of attention.

        **Raises:** `UsageError` unless `num_heads` divides `size`.
        """
        check_whole(context=context, num_heads=num_heads)
        if size % num_heads:
            raise UsageError(
                f"num_heads={num_heads} does not divide memory_size={size}: change one of them"
            )
        keys = iter(jax.random.split(key, 9))
        linear = lambda *sizes: Linear(*sizes, key=next(keys), init=init)  # noqa: E731
        self.embedding = linear(inputs, size)
        self.query = linear(size, size)
        self.key_and_value = linear(size, 2 * size)
        self.position = jax.nn.initializers.lecun_normal()(next(keys), (size, size))
        self.biases = jnp.zeros((2, num_heads, size // num_heads))
        self.attended = linear(size, size)
        self.hidden = linear(size, 2 * size), linear(2 * size, size)
        self.norms = LayerNorm((size,)), LayerNorm((size,))
        self.gates = Gate(size, key=next(keys), init=init), Gate(size, key=next(keys), init=init)
        self.context, self.num_heads = context, num_heads

    def initial_memory(self, num_lanes: int) -> Context:
        size = self.attended.bias.shape[0]
        inputs = jnp.zeros((num_lanes, self.context, size))
        return Context(inputs, jnp.zeros(num_lanes, jnp.int32))

    def __call__(self, x: Sequence, memory: Context, first: Start) -> tuple[Sequence, Context]:
        x, _ = self.embedding(x, None)
        before = jax.lax.stop_gradient(jnp.moveaxis(memory.inputs, 1, 0))
        seen = jnp.concatenate([before, x])
        y = self._attend(seen, self._visible(memory.length, first))
        x = self.gates[0](x, jax.nn.relu(y))
        y, _ = self.hidden[0](self.norms[1](x, None)[0], None)
        y, _ = self.hidden[1](jax.nn.relu(y), None)
        return self.gates[1](x, jax.nn.relu(y)), self._remember(seen, memory.length, first)

    def _distance(self, num_steps: int) -> Int[Array, "T seen"]:
        """Steps from each input in memory and in the sequence to each of the sequence."""
        steps = self.context + jnp.arange(num_steps)
        return steps[:, None] - jnp.arange(self.context + num_steps)[None]

    def _visible(self, length: Int[Array, " B"], first: Start) -> Bool[Array, "T B seen"]:
        """Which of the inputs in memory and in the sequence each step attends to."""
        num_steps = first.shape[0]
        in_memory = jnp.arange(self.context)[:, None] >= self.context - length
        episode = jnp.cumsum(first, axis=0)  # 0 where the one in memory goes on
        seen = jnp.concatenate([jnp.where(in_memory, 0, -1), episode])
        distance = self._distance(num_steps)
        within = (distance >= 0) & (distance <= self.context)
        return within[:, None] & (episode[..., None] == seen.T[None])

    def _attend(
        self, seen: Float[Array, "seen B size"], visible: Bool[Array, "T B seen"]
    ) -> Sequence:
        """Attention of the last `T` inputs to all that are visible to them."""
        num_steps = visible.shape[0]
        heads = lambda x: x.reshape(*x.shape[:-1], self.num_heads, -1)  # noqa: E731
        normed, _ = self.norms[0](seen, None)
        query = heads(self.query(normed[-num_steps:], None)[0])
        key, value = map(heads, jnp.split(self.key_and_value(normed, None)[0], 2, axis=-1))
        position = heads(product(_sinusoids(self.context + 1, seen.shape[-1]), self.position))
        of_content, of_position = (query + bias for bias in self.biases)
        scores = jnp.einsum("tbhd,sbhd->tbhs", of_content, key)
        by_distance = jnp.einsum("tbhd,chd->tbhc", of_position, position)
        distance = jnp.clip(self._distance(num_steps), 0, self.context)[:, None, None]
        scores += jnp.take_along_axis(by_distance, distance, axis=-1)
        scores = jnp.where(visible[:, :, None], scores / math.sqrt(key.shape[-1]), -jnp.inf)
        y = jnp.einsum("tbhs,sbhd->tbhd", jax.nn.softmax(scores), value)
        return self.attended(y.reshape(*y.shape[:2], -1), None)[0]

    def _remember(
        self, seen: Float[Array, "seen B size"], length: Int[Array, " B"], first: Start
    ) -> Context:
        """The memory after the last step."""
        num_steps = first.shape[0]
        steps_since = jnp.argmax(first[::-1], axis=0) + 1
        length = jnp.where(jnp.any(first, axis=0), steps_since, length + num_steps)
        length = jnp.minimum(length, self.context).astype(jnp.int32)
        kept = jnp.moveaxis(seen[-self.context :], 0, 1)
        in_episode = jnp.arange(self.context) >= self.context - length[:, None]
        return Context(jnp.where(in_episode[..., None], kept, 0.0), length)


def _sinusoids(num_distances: int, size: int) -> Float[Array, "distances size"]:
    """Encodings of distances (Vaswani et al. 2017, §3.5)."""
    rate = jnp.exp(-math.log(10_000.0) * jnp.arange(0, size, 2) / size)
    angle = jnp.arange(num_distances)[:, None] * rate
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[:, :size]
