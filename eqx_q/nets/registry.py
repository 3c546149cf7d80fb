"""Networks by name. To add one: a function from shape to layers, and a line in `ENCODERS`."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from ..errors import UnknownNameError, UsageError
from . import encoders
from .feedforward import FeedForward
from .heads import HEADS
from .layers import AbstractLayer, BatchNorm, ChannelsLast, Sequential, output_shape

ENCODERS: dict[str, Callable[..., Sequential]] = {
    "mlp": encoders.mlp,
    "minatar_cnn": encoders.minatar_cnn,
    "nature_cnn": encoders.nature_cnn,
    "impala": encoders.impala,
    "hadamax": encoders.hadamax,
}


def has_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether images of this shape are `[C, H, W]`: fewer channels than columns."""
    return len(shape) == 3 and shape[0] < shape[-1]


def choose_encoder(shape: tuple[int, ...]) -> str:
    """The usual encoder for observations of this shape (channels last)."""
    if len(shape) != 3 or min(shape[:2]) < 3:
        return "mlp"
    return "nature_cnn" if min(shape[:2]) >= 36 else "minatar_cnn"


def make_network(
    name: str,
    observation_space: gymnasium.spaces.Box,
    num_actions: int,
    *,
    key: PRNGKeyArray,
    normalize_input: bool = False,
    input_scale: float | None = None,
    channels_first: bool | None = None,
    head: str = "linear",
    init: str | None = None,
    **options: Any,
) -> FeedForward:
    """A shipped network: input, encoder, head.

    **Arguments:**

    - `name`: one of `ENCODERS`, or `"auto"` to choose by the shape of the observations.
    - `observation_space`: of one lane.
    - `num_actions`: `A`.
    - `key`: for the parameters.
    - `normalize_input`: batch normalisation of the raw observations, instead of scaling them.
    - `input_scale`: a factor for the observations; by default 1/255 for `uint8`, else 1.
    - `channels_first`: whether images are `[C, H, W]`; by default that is seen from their shape.
    - `head`: `"linear"` or `"dueling"`.
    - `init`: of the weights, one of `layers.INITIALIZERS`. By default each encoder's own, and
        `lecun_normal` in the head, like purejaxql; `"orthogonal"`, with gain √2 everywhere, is
        like CleanRL.
    - `options`: of the encoder: `hidden_sizes`, `norm`, `activation`, and more, see there.

    **Raises:** `UsageError` for a name, an option or a shape that cannot work.
    """
    shape = observation_space.shape
    channels_first = has_channels_first(shape) if channels_first is None else channels_first
    if name == "auto":
        name = choose_encoder((*shape[1:], shape[0]) if channels_first else shape)
    if name not in ENCODERS:
        raise UnknownNameError("network", name, [*ENCODERS, "auto"])
    if head not in HEADS:
        raise UnknownNameError("head", head, HEADS)
    known = set(inspect.signature(ENCODERS[name]).parameters) - {"shape", "key"}
    for option in options:
        if option not in known:
            raise UnknownNameError(
                f"option of network '{name}':", option, known | {"normalize_input", "head"}
            )
    if normalize_input and input_scale is not None:
        raise UsageError("normalize_input and input_scale exclude each other: drop one")
    if input_scale is None:
        input_scale = 1 / 255 if observation_space.dtype == np.uint8 else 1.0
    options = {
        k: tuple(v) if isinstance(v, Iterable) and not isinstance(v, str) else v
        for k, v in options.items()
    }
    if init is not None:
        options["init"] = init
    encoder_key, head_key = jax.random.split(key)
    layers: list[AbstractLayer] = []
    if normalize_input:
        if channels_first:
            layers.append(ChannelsLast())
            shape = (*shape[1:], shape[0])
        layers.append(BatchNorm(shape[-1]))
    else:
        options.update(input_scale=float(input_scale), channels_first=channels_first)
    encoder = ENCODERS[name](shape, key=encoder_key, **options)
    (features,) = output_shape(encoder, shape)
    make_head = HEADS[head](features, num_actions, key=head_key, init=init or "lecun_normal")
    return FeedForward(Sequential((*layers, encoder, make_head)))
