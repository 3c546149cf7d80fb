"""Layers: the building blocks of networks.

A layer works on a batch; it takes its running statistics and returns new ones:
`layer(x[B, ...], statistics, batch_mask) -> (y[B, ...], statistics)`. These are `None` for a layer
without statistics, and a tuple for a layer made of others. Fields that are not arrays are plain
numbers, strings and tuples of them, so that a layer can be saved as data.
"""

import abc
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from ..errors import UnknownNameError
from .platforms import by_platform
from .precision import in_bfloat16, product

Padding: TypeAlias = Literal["VALID", "SAME"]
Lowering: TypeAlias = Literal["auto", "patches", "conv"]
Batch: TypeAlias = Shaped[Array, "B ..."]
Batches: TypeAlias = PyTree[Batch]
BatchMask: TypeAlias = Bool[Array, "B"] | None

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

INITIALIZERS: dict[str, Callable[..., Array]] = {
    "lecun_normal": jax.nn.initializers.lecun_normal(),
    "he_normal": jax.nn.initializers.he_normal(),
    "xavier_normal": jax.nn.initializers.xavier_normal(),
    "xavier_uniform": jax.nn.initializers.xavier_uniform(),
    "orthogonal": jax.nn.initializers.orthogonal(math.sqrt(2)),
}


def _initialize(init: str, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    if init not in INITIALIZERS:
        raise UnknownNameError("init", init, INITIALIZERS)
    return INITIALIZERS[init](key, shape, jnp.float32)


class AbstractLayer(eqx.Module):
    """A function of a batch that may keep running statistics."""

    @abc.abstractmethod
    def initial_statistics(self) -> PyTree:
        """Statistics before any data; a tree without leaves if the layer keeps none."""

    @abc.abstractmethod
    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        """**Arguments:**

        - `x`: `[B, ...]`.
        - `statistics`: from `initial_statistics`, or from the previous call.
        - `batch_mask`: `[B]`, in training only: the rows that count for batch statistics.

        **Returns:** the output `[B, ...]`, and the statistics to keep.
        """


def output_shape(layer: AbstractLayer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one row of the layer's output for rows of `shape`. Computes nothing."""
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    y, _ = jax.eval_shape(lambda x: layer(x, layer.initial_statistics()), x)
    return y.shape[1:]


# Composition -----------------------------------------------------------------------------------


class Sequential(AbstractLayer):
    """One layer after the other. The input of the first may be a tree."""

    layers: tuple[AbstractLayer, ...]

    def initial_statistics(self) -> PyTree:
        return tuple(layer.initial_statistics() for layer in self.layers)

    def __call__(
        self, x: Batches, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        updated = []
        for layer, kept in zip(self.layers, statistics, strict=True):
            x, kept = layer(x, kept, batch_mask)
            updated.append(kept)
        return x, tuple(updated)


class Join(AbstractLayer):
    """Applies one layer to each leaf of a tree, and concatenates their outputs `[B, features]`."""

    stems: tuple[AbstractLayer, ...]

    def initial_statistics(self) -> PyTree:
        return tuple(stem.initial_statistics() for stem in self.stems)

    def __call__(
        self, x: Batches, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        leaves = zip(self.stems, jax.tree.leaves(x), statistics, strict=True)
        joined, updated = zip(*(stem(x, kept, batch_mask) for stem, x, kept in leaves), strict=True)
        return jnp.concatenate(joined, axis=-1), updated


class Product(AbstractLayer):
    """The Hadamard product of two layers' outputs for the same input."""

    left: AbstractLayer
    right: AbstractLayer

    def initial_statistics(self) -> PyTree:
        return self.left.initial_statistics(), self.right.initial_statistics()

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        left, kept_left = self.left(x, statistics[0], batch_mask)
        right, kept_right = self.right(x, statistics[1], batch_mask)
        return left * right, (kept_left, kept_right)


class Residual(AbstractLayer):
    """`x + layer(x)`."""

    layer: AbstractLayer

    def initial_statistics(self) -> PyTree:
        return self.layer.initial_statistics()

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        y, statistics = self.layer(x, statistics, batch_mask)
        return x + y, statistics


# Without parameters ----------------------------------------------------------------------------


class Identity(AbstractLayer):
    """`x`."""

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        return x, None


class Activation(AbstractLayer):
    """An activation function, by its name in `jax.nn`."""

    name: str = eqx.field(static=True)

    def __check_init__(self):
        if self.name not in ACTIVATIONS:
            raise UnknownNameError("activation", self.name, ACTIVATIONS)

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        return ACTIVATIONS[self.name](x), None


class Scale(AbstractLayer):
    """`factor * x`, in single precision."""

    factor: float = eqx.field(static=True)

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        x = x.astype(jnp.float32)
        return x if self.factor == 1 else x * self.factor, None


class ChannelsLast(AbstractLayer):
    """Images `[B, C, H, W]` to `[B, H, W, C]`."""

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        return jnp.moveaxis(x, 1, -1), None


class Flatten(AbstractLayer):
    """`[B, ...]` to `[B, features]`."""

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        return x.reshape(x.shape[0], -1), None


def one_hots(x: Int[Array, "*rows F"], sizes: tuple[int, ...]) -> Float[Array, "*rows features"]:
    """Concatenated one-hot encodings of whole numbers below `sizes`; zeros if out of range."""
    if len(set(sizes)) == 1:
        return jax.nn.one_hot(x, sizes[0]).reshape(*x.shape[:-1], -1)
    entry = np.repeat(np.arange(len(sizes)), sizes)
    value = np.concatenate([np.arange(size) for size in sizes])
    return (x[..., entry] == value).astype(jnp.float32)


class OneHot(AbstractLayer):
    """One-hot encoding of whole numbers `[B, ...]`, counted from their starts: `[B, features]`."""

    sizes: tuple[int, ...] = eqx.field(static=True)
    starts: tuple[int, ...] = eqx.field(static=True)

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        return one_hots(_from_zero(x, self.starts), self.sizes), None


class Embedding(AbstractLayer):
    """Learnt vectors `[B, features]` for whole numbers `[B, ...]`, counted from their starts."""

    table: Float[Array, "numbers size"]
    sizes: tuple[int, ...] = eqx.field(static=True)
    starts: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self, sizes: tuple[int, ...], starts: tuple[int, ...], size: int, *, key: PRNGKeyArray
    ):
        """Draws a vector of `size` for each value of each number from N(0, 1)."""
        self.table = jax.random.normal(key, (sum(sizes), size))
        self.sizes = sizes
        self.starts = starts

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        before = np.cumsum((0, *self.sizes[:-1]))
        vectors = self.table[_from_zero(x, self.starts) + before]
        return vectors.reshape(x.shape[0], -1), None


def _from_zero(x: Shaped[Array, "B ..."], starts: tuple[int, ...]) -> Int[Array, "B F"]:
    return x.reshape(x.shape[0], -1).astype(jnp.int32) - np.array(starts, np.int32)


class Categories(AbstractLayer):
    """One-hot images `[B, H, W, C * size]` from images `[B, H, W, C]` of numbers below `size`.

    Numbers out of range become zeros.
    """

    size: int = eqx.field(static=True)

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        return one_hots(x.astype(jnp.int32), (self.size,) * x.shape[-1]), None


class MaxPool(AbstractLayer):
    """The maximum over square windows of `[B, H, W, C]`."""

    window: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)
    padding: Padding = eqx.field(static=True, default="SAME")

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        window, strides = (1, self.window, self.window, 1), (1, self.stride, self.stride, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, self.padding), None


class AdaptiveMaxPool(AbstractLayer):
    """The maximum over `size` × `size` windows that cover an image `[B, H, W, C]` evenly.

    Along an axis of length `n`, window `i` reaches from `floor(i n / size)` to
    `ceil((i + 1) n / size)`, like PyTorch's `AdaptiveMaxPool2d`.
    """

    size: int = eqx.field(static=True)

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        for axis in (1, 2):
            length = x.shape[axis]
            starts = [i * length // self.size for i in range(self.size)]
            ends = [-(-(i + 1) * length // self.size) for i in range(self.size)]
            windows = [
                jnp.max(lax.slice_in_dim(x, start, end, axis=axis), axis=axis)
                for start, end in zip(starts, ends, strict=True)
            ]
            x = jnp.stack(windows, axis=axis)
        return x, None


# Linear maps -----------------------------------------------------------------------------------


class Linear(AbstractLayer):
    """`x @ W + bias`.

    The weight is stored as `W` (inputs × outputs) or, if there are fewer outputs than inputs, as
    its transpose, so that the longer side is last. Its gradient is then computed in the same layout
    with longer rows; otherwise XLA takes twice the time for 1024 × 128 on CPU, ten times for
    256 × 2.
    """

    weight: Float[Array, "short long"]
    bias: Float[Array, "outputs"]
    transposed: bool = eqx.field(static=True)

    def __init__(self, inputs: int, outputs: int, *, key: PRNGKeyArray, init: str = "lecun_normal"):
        """`init` is one of `INITIALIZERS`; the bias starts at 0."""
        weight = _initialize(init, key, (inputs, outputs))
        self.transposed = outputs < inputs
        self.weight = weight.T if self.transposed else weight
        self.bias = jnp.zeros(outputs)

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        return product(x, self.weight, transposed=self.transposed) + self.bias, None


def _as_words(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Views bytes as words of four, if that divides the last axis: fewer elements to move."""
    if x.dtype != jnp.uint8 or x.shape[-1] % 4:
        return x
    if any(map(is_symbolic_dim, x.shape)):  # XLA cannot bitcast arrays of unknown size
        return x
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 4), jnp.uint32)


def _as_bytes(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Undoes `_as_words`."""
    if x.dtype != jnp.uint32:
        return x
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def patches(
    x: Shaped[Array, "B _ _ _"], window: int, stride: int, channels_first: bool = False
) -> Shaped[Array, "B h w features"]:
    """All windows of an image, each as a vector. `stride` divides the window and the columns.

    Columns are taken `stride` at a time, to copy longer runs. The vector is ordered (row, group of
    columns, column in the group, channel), that is (row, column, channel), or (row, group of
    columns, channel, column in the group) for `channels_first`.
    `lax.conv_general_dilated_patches` would compute it as a convolution, which this avoids.
    """
    if channels_first:
        batch, channels, rows, columns = x.shape
        x = _as_words(x.reshape(batch, channels, rows, columns // stride, stride))
        x = jnp.transpose(x, (0, 2, 3, 1, 4)).reshape(batch, rows, columns // stride, -1)
    else:
        batch, rows, columns, channels = x.shape
        x = _as_words(x.reshape(batch, rows, columns // stride, stride * channels))
    height = (rows - window) // stride + 1
    width = (columns - window) // stride + 1
    shifted = [
        x[:, i : i + (height - 1) * stride + 1 : stride, j : j + width]
        for i in range(window)
        for j in range(window // stride)
    ]
    return _as_bytes(jnp.concatenate(shifted, axis=-1))


class Conv(AbstractLayer):
    """A convolution of `[B, H, W, C]`; its parameters do not depend on how it is computed.

    On CPU, XLA runs a convolution inside `lax.scan` without its fast kernels, twenty times slower
    than a matrix product over patches; elsewhere `lax.conv` is faster. The kernel's axes are
    outputs × rows × columns × inputs, for the same reason as in `Linear`.

    A convolution may read raw images (`uint8`, `[B, C, H, W]`) and scale them: moving the bytes
    into place before converting them is four times faster than the reverse.
    """

    kernel: Float[Array, "outputs window window inputs"]
    bias: Float[Array, "outputs"]
    stride: int = eqx.field(static=True)
    padding: Padding = eqx.field(static=True)
    input_scale: float = eqx.field(static=True)
    channels_first: bool = eqx.field(static=True)
    lowering: Lowering = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        window: int,
        stride: int = 1,
        padding: Padding = "VALID",
        *,
        key: PRNGKeyArray,
        init: str = "he_normal",
        input_scale: float = 1.0,
        channels_first: bool = False,
        lowering: Lowering = "auto",
    ):
        """**Arguments:**

        - `inputs`, `outputs`: channels.
        - `window`, `stride`: of the square window.
        - `padding`: `"VALID"` or `"SAME"`.
        - `init`: one of `INITIALIZERS`; the bias starts at 0.
        - `input_scale`: a factor for the input.
        - `channels_first`: whether the input is `[B, C, H, W]`. The output never is.
        - `lowering`: `"patches"` (a matrix product), `"conv"` (`lax.conv`), or by platform.
        """
        for name, given, kind in (("padding", padding, Padding), ("lowering", lowering, Lowering)):
            if given not in get_args(kind):
                raise UnknownNameError(name, given, get_args(kind))
        kernel = _initialize(init, key, (window, window, inputs, outputs))
        self.kernel = jnp.moveaxis(kernel, -1, 0)
        self.bias = jnp.zeros(outputs)
        self.stride = stride
        self.padding = padding
        self.input_scale = input_scale
        self.channels_first = channels_first
        self.lowering = lowering

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        if self.lowering == "auto":
            y = by_platform(self._patches, self._conv, x, self.kernel)
        else:
            compute = self._patches if self.lowering == "patches" else self._conv
            y = compute(x, self.kernel)
        return y + self.bias, None

    def _conv(self, x: Shaped[Array, "B _ _ _"], kernel: Array) -> Float[Array, "B h w outputs"]:
        strides = (self.stride, self.stride)
        layout = ("NCHW" if self.channels_first else "NHWC", "OHWI", "NHWC")
        x = x.astype(kernel.dtype)
        x = x if self.input_scale == 1 else x * self.input_scale  # as part of what makes the batch
        if in_bfloat16():  # cuDNN rounds the result, too
            x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
        y = lax.conv_general_dilated(x, kernel, strides, self.padding, dimension_numbers=layout)
        y = y.astype(jnp.float32)
        # Else XLA makes the bias an argument of cuDNN, for which a kernel has to cut it out of the
        # vector that biases are trained in.
        return lax.optimization_barrier(y)

    def _patches(self, x: Shaped[Array, "B _ _ _"], kernel: Array) -> Float[Array, "B h w outputs"]:
        outputs, window, _, inputs = kernel.shape
        stride = self.stride
        # Scales the kernel, which is smaller than the images.
        kernel = kernel if self.input_scale == 1 else kernel * self.input_scale
        # `patches` needs whole groups of columns: the window is enlarged with zeros in the kernel.
        grown = -(-window // stride) * stride
        kernel = jnp.pad(kernel, ((0, 0), (0, grown - window), (0, grown - window), (0, 0)))
        axes = (2, 3) if self.channels_first else (1, 2)
        sizes = [x.shape[axis] for axis in axes]
        pads = lax.padtype_to_pads(sizes, (window, window), (stride, stride), self.padding)
        config = [(0, 0, 0)] * 4
        for axis, size, (low, high) in zip(axes, sizes, pads, strict=True):
            num_windows = (low + size + high - window) // stride + 1
            config[axis] = (low, (num_windows - 1) * stride + grown - low - size, 0)
        if any(low or high for low, high, _ in config):
            x = lax.pad(x, jnp.zeros((), x.dtype), config)  # a negative padding crops
        rows = patches(x, grown, stride, self.channels_first)
        kernel = kernel.reshape(outputs, grown, grown // stride, stride, inputs)
        if self.channels_first:
            kernel = jnp.swapaxes(kernel, -1, -2)
        kernel = kernel.reshape(outputs, -1)
        return product(rows.astype(kernel.dtype), kernel, transposed=True)


class SpectralNorm(AbstractLayer):
    """A convolution whose kernel is divided by its largest singular value.

    Miyato et al. 2018 (arXiv 1802.05957), Algorithm 1: each training step makes one step of the
    power iteration, on the kernel as a matrix of outputs × all inputs of a window. The statistics
    are the left singular vector found so far.
    """

    conv: Conv

    def initial_statistics(self) -> PyTree:
        outputs = self.conv.kernel.shape[0]
        return jnp.full(outputs, outputs**-0.5)

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        matrix = self.conv.kernel.reshape(self.conv.kernel.shape[0], -1)
        fixed = lax.stop_gradient(matrix)
        right = _unit(statistics @ fixed)
        if batch_mask is not None:
            statistics = _unit(fixed @ right)
        largest = statistics @ matrix @ right
        conv = eqx.tree_at(lambda conv: conv.kernel, self.conv, self.conv.kernel / largest)
        return conv(x, None)[0], statistics


def _unit(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


# Normalisation ---------------------------------------------------------------------------------


def _row_means(x: Float[Array, "rows features"]) -> Float[Array, "rows 1"]:
    """Means of rows; on CPU a matrix product, since XLA's reductions are several times slower."""

    def weighted(x):
        features = x.shape[-1]
        return x @ jnp.full((features, 1), 1 / features, x.dtype)

    return by_platform(weighted, lambda x: jnp.mean(x, axis=-1, keepdims=True), x)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def standardize(x: Float[Array, "rows features"], epsilon: float) -> Float[Array, "rows features"]:
    """Standardises every row: `(x - μ) / sqrt(σ² + epsilon)`."""
    return _standardize(x, epsilon)[0]


def _standardize(x, epsilon):
    centred = x - _row_means(x)
    inverse = lax.rsqrt(_row_means(jnp.square(centred)) + epsilon)
    y = centred * inverse
    return y, (y, inverse)


def _standardize_backwards(epsilon, residuals, gradient):
    # Closed form: half the passes over the data that differentiating the forward steps takes.
    y, inverse = residuals
    along = _row_means(gradient * y)
    return ((gradient - _row_means(gradient) - y * along) * inverse,)


standardize.defvjp(_standardize, _standardize_backwards)


@jax.custom_vjp
def _affine(
    y: Float[Array, "B *axes"], scale: Float[Array, "*shape"], bias: Float[Array, "*shape"]
) -> Float[Array, "B *axes"]:
    """`y * scale + bias`, with both gradients by one reduction where kernels are dear."""
    return y * scale + bias


def _affine_forwards(y, scale, bias):
    return y * scale + bias, (y, scale)


def _affine_backwards(residuals, gradient):
    y, scale = residuals
    axes = tuple(range(y.ndim - scale.ndim))

    def apart(gradient, y):
        return jnp.stack([jnp.sum(gradient * y, axes), jnp.sum(gradient, axes)])

    def together(gradient, y):
        return jnp.sum(jnp.stack([gradient * y, gradient]), tuple(axis + 1 for axis in axes))

    of_scale, of_bias = by_platform(apart, together, gradient, y)
    return gradient * scale, of_scale, of_bias


_affine.defvjp(_affine_forwards, _affine_backwards)


class LayerNorm(AbstractLayer):
    """Layer normalisation (Ba et al. 2016) over the last `len(shape)` axes.

    `shape=(C,)` is like Flax; `shape=(H, W, C)` normalises an image as a whole, like CleanRL. The
    default `epsilon` is that of Flax; PyTorch and CleanRL use 1e-5.
    """

    scale: Float[Array, "*shape"]
    bias: Float[Array, "*shape"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, shape: tuple[int, ...], epsilon: float = 1e-6):
        self.scale = jnp.ones(shape)
        self.bias = jnp.zeros(shape)
        self.epsilon = epsilon

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        rows = x.reshape(-1, self.scale.size)
        y = jnp.reshape(jnp.asarray(standardize(rows, self.epsilon)), x.shape)
        return _affine(y, self.scale, self.bias), None


class RunningStatistics(eqx.Module):
    """Moving averages over batches, per feature of the last axis, and the number of batches."""

    mean: Float[Array, "features"]
    variance: Float[Array, "features"]
    num_batches: Int[Array, ""]


def _running_statistics(size: int) -> RunningStatistics:
    return RunningStatistics(jnp.zeros(size), jnp.ones(size), jnp.zeros((), jnp.int32))


def _batch_moments(
    x: Float[Array, "B *features"], mask: Bool[Array, "B"], running: RunningStatistics
) -> tuple[Float[Array, "C"], Float[Array, "C"], Bool[Array, ""]]:
    """Mean and variance over all axes but the last, of the rows in `mask`, and whether it has any.

    If it has none, mean and variance are those of `running`.
    """
    axes = tuple(range(x.ndim - 1))
    mask = jnp.broadcast_to(mask.reshape(-1, *[1] * (x.ndim - 1)), (*x.shape[:-1], 1))
    count = jnp.sum(mask)
    weight = mask / jnp.maximum(count, 1)
    mean = jnp.sum(x * weight, axes)
    variance = jnp.sum(jnp.square(x - mean) * weight, axes)
    mean = jnp.where(count > 0, mean, running.mean)
    variance = jnp.where(count > 0, variance, running.variance)
    return mean, variance, count > 0


def _moving_average(
    running: RunningStatistics, mean: Array, variance: Array, any_row: Array, momentum: float
) -> RunningStatistics:
    # Without any row, mean and variance are the running ones, which stay.
    return lax.stop_gradient(
        RunningStatistics(
            momentum * running.mean + (1 - momentum) * mean,
            momentum * running.variance + (1 - momentum) * variance,
            running.num_batches + any_row,
        )
    )


class BatchNorm(AbstractLayer):
    """Batch normalisation (Ioffe & Szegedy 2015) of each feature of the last axis."""

    scale: Float[Array, "features"]
    bias: Float[Array, "features"]
    size: int = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)

    def __init__(self, size: int, momentum: float = 0.99, epsilon: float = 1e-5):
        """`momentum` is the weight of the previous running statistics."""
        self.scale = jnp.ones(size)
        self.bias = jnp.zeros(size)
        self.size = size
        self.momentum = momentum
        self.epsilon = epsilon

    def initial_statistics(self) -> PyTree:
        return _running_statistics(self.size)

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        x = x.astype(jnp.float32)
        if batch_mask is None:
            mean, variance = statistics.mean, statistics.variance
        else:
            mean, variance, any_row = _batch_moments(x, batch_mask, statistics)
            statistics = _moving_average(statistics, mean, variance, any_row, self.momentum)
        x = (x - mean) * lax.rsqrt(variance + self.epsilon)
        return x * self.scale + self.bias, statistics


class BatchRenorm(AbstractLayer):
    """Batch renormalisation (Ioffe 2017, Algorithm 1) of each feature of the last axis.

    In training, `r` and `d` correct the output towards that of inference. The first `warmup`
    batches are normalised as in batch normalisation.
    """

    scale: Float[Array, "features"]
    bias: Float[Array, "features"]
    momentum: float = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    r_max: float = eqx.field(static=True)
    d_max: float = eqx.field(static=True)
    warmup: int = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        momentum: float = 0.999,
        epsilon: float = 1e-3,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 1000,
    ):
        """`r_max`, `d_max`: bounds of the correction; the defaults are the paper's (§4.2)."""
        self.scale = jnp.ones(size)
        self.bias = jnp.zeros(size)
        self.momentum = momentum
        self.epsilon = epsilon
        self.r_max = r_max
        self.d_max = d_max
        self.warmup = warmup

    def initial_statistics(self) -> PyTree:
        return _running_statistics(self.scale.shape[0])

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        x = x.astype(jnp.float32)
        running_std = jnp.sqrt(statistics.variance + self.epsilon)
        if batch_mask is None:
            x = (x - statistics.mean) / running_std
        else:
            running = statistics
            mean, variance, any_row = _batch_moments(x, batch_mask, running)
            statistics = _moving_average(running, mean, variance, any_row, self.momentum)
            std = jnp.sqrt(variance + self.epsilon)
            warm = running.num_batches >= self.warmup
            r = jnp.clip(std / running_std, 1 / self.r_max, self.r_max)
            d = jnp.clip((mean - running.mean) / running_std, -self.d_max, self.d_max)
            r = lax.stop_gradient(jnp.where(warm, r, 1.0))
            d = lax.stop_gradient(jnp.where(warm, d, 0.0))
            x = (x - mean) / std * r + d
        return x * self.scale + self.bias, statistics


NORMS: dict[str, Callable[[tuple[int, ...]], AbstractLayer]] = {
    "layer_norm": lambda shape: LayerNorm(shape[-1:]),
    "layer_norm_all": lambda shape: LayerNorm(shape, epsilon=1e-5),  # CleanRL's
    "batch_norm": lambda shape: BatchNorm(shape[-1]),
    "batch_renorm": lambda shape: BatchRenorm(shape[-1]),
    "none": lambda shape: Identity(),
}


def make_norm(name: str, shape: tuple[int, ...]) -> AbstractLayer:
    """Makes a normalisation of `NORMS` by name, for rows of `shape`."""
    if name not in NORMS:
        raise UnknownNameError("norm", name, NORMS)
    return NORMS[name](shape)
