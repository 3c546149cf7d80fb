"""Encoders: from observations `[B, ...]` to features `[B, features]`.

`ENCODERS` are for numbers and images; each is a function that composes layers for the shape of one
observation. Without hidden layers (`hidden_sizes=()`) an encoder is a *stem* for one leaf of an
observation, whose features are joined with those of other leaves. `STEMS` are for categorical
leaves (`Discrete`, `MultiDiscrete`): functions of each number's count of values and first value.

The encoders share these options:

- `hidden_sizes`: of the linear layers after the convolutions.
- `norm`, `activation`, `init`: names in `layers.NORMS`, `layers.ACTIVATIONS`,
    `layers.INITIALIZERS`; the defaults are those of each encoder's published code.
- `input_scale`: a factor for the observations. Encoders without this option do not scale them.
- `channels_first`: whether images are `[C, H, W]`.
- `lowering`: how convolutions are computed, see `layers.Conv`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import PRNGKeyArray

from ..errors import UsageError, check_whole
from .layers import (
    AbstractLayer,
    Activation,
    AdaptiveMaxPool,
    Categories,
    ChannelsLast,
    Conv,
    Embedding,
    Flatten,
    Linear,
    Lowering,
    MaxPool,
    OneHot,
    Padding,
    Product,
    Residual,
    Scale,
    Sequential,
    SpectralNorm,
    make_norm,
    output_shape,
)

Shape = tuple[int, ...]


def _image_shape(shape: Shape, channels_first: bool, smallest: int) -> tuple[int, int, int]:
    """Height, width and channels. Raises `UsageError` if the image is too small."""
    channels_last = (*shape[1:], *shape[:1]) if channels_first else shape
    if len(shape) != 3 or min(channels_last[:2]) < smallest:
        raise UsageError(
            f"this network needs images of at least {smallest} × {smallest} pixels, not "
            f"observations of shape {shape}: use network 'mlp' or 'auto'"
        )
    height, width, channels = channels_last
    return height, width, channels


class _Style(NamedTuple):
    """Options that the layers of an encoder share."""

    norm: str
    activation: str
    init: str
    lowering: Lowering = "auto"

    def activate(self, shape: Shape) -> tuple[AbstractLayer, AbstractLayer]:
        """Normalisation and activation for rows of `shape`."""
        return make_norm(self.norm, shape), Activation(self.activation)

    def conv(self, *args: Any, **options: Any) -> Conv:
        return Conv(*args, init=self.init, lowering=self.lowering, **options)

    def dense(
        self, layers: list[AbstractLayer], shape: Shape, sizes: tuple[int, ...], key: PRNGKeyArray
    ) -> Sequential:
        """`layers`, flattened, then linear layers of `sizes`, each normalised and activated."""
        layers = [*layers, Flatten()]
        (inputs,) = output_shape(Sequential(tuple(layers)), shape)
        for size, k in zip(sizes, jax.random.split(key, len(sizes)), strict=True):
            if size < 1:
                raise ValueError("a layer needs at least 1 unit")
            layers += [Linear(inputs, size, key=k, init=self.init), *self.activate((size,))]
            inputs = size
        return Sequential(tuple(layers))

    def convolutional(
        self,
        shape: Shape,
        convolutions: tuple[tuple[int, int, int, Padding], ...],
        sizes: tuple[int, ...],
        key: PRNGKeyArray,
        **raw: Any,
    ) -> Sequential:
        """Convolutions (window, stride, channels, padding), then linear layers.

        `raw` are options of the first convolution, which reads the observation.
        """
        dense_key, *keys = jax.random.split(key, 1 + len(convolutions))
        inputs = shape[0] if raw["channels_first"] else shape[-1]
        layers: list[AbstractLayer] = []
        for (window, stride, size, padding), k in zip(convolutions, keys, strict=True):
            layers.append(self.conv(inputs, size, window, stride, padding, key=k, **raw))
            layers += self.activate(output_shape(Sequential(tuple(layers)), shape))
            inputs, raw = size, {}
        return self.dense(layers, shape, sizes, dense_key)


def mlp(
    shape: Shape,
    *,
    key: PRNGKeyArray,
    hidden_sizes: tuple[int, ...] = (256, 256),
    norm: str = "layer_norm",
    activation: str = "relu",
    init: str = "lecun_normal",
    input_scale: float = 1.0,
    channels_first: bool = False,
) -> Sequential:
    """A multilayer perceptron over the flattened observation (purejaxql's `pqn_gymnax`)."""
    del channels_first  # makes no difference here
    style = _Style(norm, activation, init)
    return style.dense([Scale(input_scale)], shape, hidden_sizes, key)


def minatar_cnn(
    shape: Shape,
    *,
    key: PRNGKeyArray,
    hidden_sizes: tuple[int, ...] = (128,),
    channels: int = 16,
    padding: Padding = "VALID",
    norm: str = "layer_norm",
    activation: str = "relu",
    init: str = "he_normal",
    input_scale: float = 1.0,
    channels_first: bool = False,
    lowering: Lowering = "auto",
) -> Sequential:
    """One 3 × 3 convolution and a linear layer (Young & Tian 2019; purejaxql's `pqn_minatar`)."""
    _image_shape(shape, channels_first, smallest=3)
    raw = {"input_scale": input_scale, "channels_first": channels_first}
    return _Style(norm, activation, init, lowering).convolutional(
        shape, ((3, 1, channels, padding),), hidden_sizes, key, **raw
    )


def grid_cnn(
    shape: Shape,
    *,
    key: PRNGKeyArray,
    hidden_sizes: tuple[int, ...] = (128,),
    channels: int = 32,
    padding: Padding = "VALID",
    norm: str = "layer_norm",
    activation: str = "relu",
    init: str = "he_normal",
    channels_first: bool = False,
    lowering: Lowering = "auto",
    num_categories: int = 11,
) -> Sequential:
    """`minatar_cnn` over one-hot cells, for images of categories.

    MiniGrid's cells have an object, a colour and a state, each below 11 (its own
    `OneHotPartialObsWrapper` does the same). Read as quantities, a key would lie between a door and
    a ball. `num_categories`: categories per number; larger numbers become zeros.
    """
    check_whole(num_categories=num_categories)
    height, width, inputs = _image_shape(shape, channels_first, smallest=3)
    first: list[AbstractLayer] = [ChannelsLast()] if channels_first else []
    cells = _Style(norm, activation, init, lowering).convolutional(
        (height, width, inputs * num_categories),
        ((3, 1, channels, padding),),
        hidden_sizes,
        key,
        channels_first=False,
    )
    return Sequential((*first, Categories(num_categories), *cells.layers))


def nature_cnn(
    shape: Shape,
    *,
    key: PRNGKeyArray,
    hidden_sizes: tuple[int, ...] = (512,),
    padding: Padding = "VALID",
    norm: str = "layer_norm",
    activation: str = "relu",
    init: str = "he_normal",
    input_scale: float = 1.0,
    channels_first: bool = False,
    lowering: Lowering = "auto",
) -> Sequential:
    """Three convolutions and a linear layer (Mnih et al. 2015, Methods)."""
    _image_shape(shape, channels_first, smallest=36)
    convolutions: tuple[tuple[int, int, int, Padding], ...] = (
        (8, 4, 32, padding),
        (4, 2, 64, padding),
        (3, 1, 64, padding),
    )
    raw = {"input_scale": input_scale, "channels_first": channels_first}
    return _Style(norm, activation, init, lowering).convolutional(
        shape, convolutions, hidden_sizes, key, **raw
    )


def gamma(
    shape: Shape,
    *,
    key: PRNGKeyArray,
    hidden_sizes: tuple[int, ...] = (512,),
    norm: str = "layer_norm",
    activation: str = "relu",
    init: str = "he_normal",
    input_scale: float = 1.0,
    channels_first: bool = False,
    lowering: Lowering = "auto",
) -> Sequential:
    """Five small convolutions and a linear layer (aftab, 2026, arXiv 2608.07335: Gamma).

    With 2.6 times the multiplications of the Nature CNN, and 7 × 7 × 64 features like it.
    """
    _image_shape(shape, channels_first, smallest=36)
    convolutions: tuple[tuple[int, int, int, Padding], ...] = (
        (3, 2, 32, "SAME"),
        (3, 2, 48, "SAME"),
        (3, 1, 64, "VALID"),
        (3, 2, 64, "VALID"),
        (3, 1, 64, "VALID"),
    )
    raw = {"input_scale": input_scale, "channels_first": channels_first}
    return _Style(norm, activation, init, lowering).convolutional(
        shape, convolutions, hidden_sizes, key, **raw
    )


def impala(
    shape: Shape,
    *,
    key: PRNGKeyArray,
    hidden_sizes: tuple[int, ...] = (256,),
    channels: tuple[int, ...] = (16, 32, 32),
    spectral_norm: bool = False,
    pool_size: int | None = None,
    norm: str = "layer_norm",
    activation: str = "relu",
    init: str = "he_normal",
    input_scale: float = 1.0,
    channels_first: bool = False,
    lowering: Lowering = "auto",
) -> Sequential:
    """The residual network of IMPALA (Espeholt et al. 2018, Figure 3, right).

    The paper has no normalisation (`norm="none"`); by default there is one before each activation.
    BTR (Clark et al. 2024, arXiv 2411.03820, §3) has `spectral_norm` in its residual blocks,
    `pool_size=6`, twice the channels and no other normalisation.

    - `spectral_norm`: see `layers.SpectralNorm`.
    - `pool_size`: rows and columns that are left by a last `layers.AdaptiveMaxPool`.
    """
    check_whole(pool_size=1 if pool_size is None else pool_size)
    if not isinstance(spectral_norm, bool):
        raise UsageError(f"spectral_norm={spectral_norm!r}: give true or false")
    height, width, inputs = _image_shape(shape, channels_first, smallest=8)
    dense_key, *keys = jax.random.split(key, 1 + len(channels))
    raw: dict[str, Any] = {"input_scale": input_scale, "channels_first": channels_first}
    style = _Style(norm, activation, init, lowering)
    conv = partial(style.conv, padding="SAME")
    layers: list[AbstractLayer] = []
    for size, section_key in zip(channels, keys, strict=True):
        first_key, *block_keys = jax.random.split(section_key, 5)
        height, width = -(-height // 2), -(-width // 2)
        layers.append(conv(inputs, size, 3, key=first_key, **raw))
        layers.append(MaxPool(3, 2))
        wrap = SpectralNorm if spectral_norm else lambda layer: layer
        halves = [
            (*style.activate((height, width, size)), wrap(conv(size, size, 3, key=k)))
            for k in block_keys
        ]
        for first, second in (halves[:2], halves[2:]):
            layers.append(Residual(Sequential((*first, *second))))
        inputs, raw = size, {}
    layers += style.activate((height, width, inputs))
    if pool_size is not None:
        layers.append(AdaptiveMaxPool(pool_size))
    return style.dense(layers, shape, hidden_sizes, dense_key)


def hadamax(
    shape: Shape,
    *,
    key: PRNGKeyArray,
    hidden_sizes: tuple[int, ...] = (512,),
    norm: str = "layer_norm",
    activation: str = "gelu",
    init: str | None = None,
    input_scale: float = 1.0,
    channels_first: bool = False,
    lowering: Lowering = "auto",
) -> Sequential:
    """The Hadamax encoder (Kooi et al. 2025, arXiv 2505.15345, §4 and Appendix B).

    Each of the three blocks multiplies two normalised, activated convolutions of stride 1, then
    max-pools; the Nature CNN has one strided convolution instead.
    `init`: by default `xavier_normal` in the convolutions and `he_normal` in the linear layers.
    """
    _image_shape(shape, channels_first, smallest=8)
    return _products(
        shape,
        ((8, 32, 4, 4), (4, 64, 2, 2), (3, 64, 3, 1)),
        hidden_sizes,
        _Style(norm, activation, init or "xavier_normal", lowering),
        init or "he_normal",
        key,
        pool_padding="SAME",
        input_scale=input_scale,
        channels_first=channels_first,
    )


def gamma_hadamax(
    shape: Shape,
    *,
    key: PRNGKeyArray,
    hidden_sizes: tuple[int, ...] = (512,),
    norm: str = "layer_norm",
    activation: str = "gelu",
    init: str | None = None,
    input_scale: float = 1.0,
    channels_first: bool = False,
    lowering: Lowering = "auto",
) -> Sequential:
    """`gamma` with the blocks of `hadamax` (aftab, 2026, arXiv 2608.07335: Gamma-Hadamax-Valid).

    The pooling has no padding, so that there are as many features as in `gamma`. `init`: see
    `hadamax`.
    """
    _image_shape(shape, channels_first, smallest=36)
    return _products(
        shape,
        ((3, 32, 2, 2), (3, 48, 2, 2), (3, 64, 3, 1), (3, 64, 2, 2), (3, 64, 3, 1)),
        hidden_sizes,
        _Style(norm, activation, init or "xavier_normal", lowering),
        init or "he_normal",
        key,
        pool_padding="VALID",
        input_scale=input_scale,
        channels_first=channels_first,
    )


def _products(
    shape: Shape,
    blocks: tuple[tuple[int, int, int, int], ...],
    hidden_sizes: tuple[int, ...],
    style: _Style,
    dense_init: str,
    key: PRNGKeyArray,
    *,
    pool_padding: Padding,
    **raw: Any,
) -> Sequential:
    """Blocks (window, channels, pooled window, its stride), then linear layers.

    Each block multiplies two normalised, activated convolutions, then max-pools. `raw` are options
    of the first convolutions.
    """
    dense_key, *keys = jax.random.split(key, 1 + len(blocks))
    inputs = shape[0] if raw["channels_first"] else shape[-1]
    layers: list[AbstractLayer] = []
    for (window, size, pool, stride), block_key in zip(blocks, keys, strict=True):
        branches = []
        for k in jax.random.split(block_key):
            conv = style.conv(inputs, size, window, padding="SAME", key=k, **raw)
            own = output_shape(Sequential((*layers, conv)), shape)
            branches.append(Sequential((conv, *style.activate(own))))
        layers += [Product(*branches), MaxPool(pool, stride, pool_padding)]
        inputs, raw = size, {}
    return style._replace(init=dense_init).dense(layers, shape, hidden_sizes, dense_key)


def one_hot(sizes: Shape, starts: Shape, *, key: PRNGKeyArray) -> OneHot:
    """One-hot encoding of every number."""
    del key  # no parameters
    return OneHot(sizes, starts)


def embedding(
    sizes: Shape, starts: Shape, *, key: PRNGKeyArray, embedding_size: int = 16
) -> Embedding:
    """A learnt vector for each value of each number."""
    return Embedding(sizes, starts, embedding_size, key=key)


ENCODERS: dict[str, Callable[..., Sequential]] = {
    "mlp": mlp,
    "minatar_cnn": minatar_cnn,
    "grid_cnn": grid_cnn,
    "nature_cnn": nature_cnn,
    "gamma": gamma,
    "impala": impala,
    "hadamax": hadamax,
    "gamma_hadamax": gamma_hadamax,
}
STEMS: dict[str, Callable[..., AbstractLayer]] = {"one_hot": one_hot, "embedding": embedding}
