"""Networks by name. To add one: a function from shape to layers, and a line in `ENCODERS`."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import equinox as eqx
import gymnasium
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from ..errors import UnknownNameError, UsageError
from . import encoders
from .feedforward import FeedForward
from .heads import HEADS
from .layers import AbstractLayer, BatchNorm, ChannelsLast, Scale, Sequential, output_shape
from .network import AbstractQNetwork
from .quantiles import Quantiles
from .recurrent import RECURRENCES, Recurrent
from .team import AgentId, PerAgent

ENCODERS: dict[str, Callable[..., Sequential]] = {
    "mlp": encoders.mlp,
    "minatar_cnn": encoders.minatar_cnn,
    "nature_cnn": encoders.nature_cnn,
    "impala": encoders.impala,
    "hadamax": encoders.hadamax,
}


def has_channels_first(space: gymnasium.spaces.Box) -> bool:
    """Whether these are pictures `[C, H, W]`: bytes, with fewer channels than columns.

    Grids of features are floats, and have their features last, however many those are.
    """
    shape = space.shape
    return space.dtype == np.uint8 and len(shape) == 3 and shape[0] < shape[-1]


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
    num_quantiles: int | None = None,
    memory: str = "none",
    memory_size: int = 256,
    num_memory_layers: int = 1,
    last_action: bool = True,
    last_reward: bool = False,
    num_agents: int | None = None,
    share_parameters: bool = True,
    agent_id: bool = True,
    **options: Any,
) -> AbstractQNetwork:
    """A shipped network: input, encoder, memory, head.

    **Arguments:**

    - `name`: one of `ENCODERS`, or `"auto"` to choose by the shape of the observations.
    - `observation_space`: of one lane.
    - `num_actions`: `A`.
    - `key`: for the parameters.
    - `normalize_input`: batch normalisation of the raw observations, instead of scaling them.
    - `input_scale`: a factor for the observations; by default 1/255 for `uint8`, else 1.
    - `channels_first`: whether images are `[C, H, W]`; by default bytes with fewer channels than
        columns are, and floats are not.
    - `head`: `"linear"` or `"dueling"`.
    - `init`: of the weights, one of `layers.INITIALIZERS`. By default each encoder's own, and
        `lecun_normal` after it, like purejaxql; `"orthogonal"`, with gain √2 everywhere (1 in the
        memory), is like CleanRL.
    - `num_quantiles`: of each action's return, where its distribution is to be learnt (QR-DQN).
    - `memory`: `"none"`, or one of `RECURRENCES`, between encoder and head.
    - `memory_size`, `num_memory_layers`: features of each recurrence, and how many of them.
    - `last_action`, `last_reward`: whether the memory sees those too.
    - `num_agents`: of a team, whose agents are lanes, see `team`. `None`: there is no team.
    - `share_parameters`: whether one network serves all agents of a team, or each has its own.
    - `agent_id`: whether a network that is shared sees which agent it computes for, as one-hot
        beside the observation's last axis (in pictures: constant channels).
    - `options`: of the encoder: `hidden_sizes`, `norm`, `activation`, and more, see there.

    **Raises:** `UsageError` for a name, an option or a shape that cannot work.
    """
    shape = observation_space.shape
    channels_first = (
        has_channels_first(observation_space) if channels_first is None else channels_first
    )
    if name == "auto":
        name = choose_encoder((*shape[1:], shape[0]) if channels_first else shape)
    if name not in ENCODERS:
        raise UnknownNameError("network", name, [*ENCODERS, "auto"])
    if head not in HEADS:
        raise UnknownNameError("head", head, HEADS)
    if memory not in {"none", *RECURRENCES}:
        raise UnknownNameError("memory", memory, ["none", *RECURRENCES])
    known = set(inspect.signature(ENCODERS[name]).parameters) - {"shape", "key"}
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of network '{name}':", option, known | _OPTIONS)
    if normalize_input and input_scale is not None:
        raise UsageError("normalize_input and input_scale exclude each other: drop one")
    sizes = {"memory_size": memory_size, "num_memory_layers": num_memory_layers}
    sizes |= {"num_quantiles": 1 if num_quantiles is None else num_quantiles}
    for option, size in {**sizes, "num_agents": 1 if num_agents is None else num_agents}.items():
        if not isinstance(size, int) or size < 1:
            raise UsageError(f"{option} must be a whole number of at least 1, got {size!r}")
    if num_quantiles is not None and (head, memory, num_agents) != ("linear", "none", None):
        raise UsageError("num_quantiles goes with a linear head, without memory and without a team")
    if input_scale is None:
        input_scale = 1 / 255 if observation_space.dtype == np.uint8 else 1.0
    options = {
        k: tuple(v) if isinstance(v, Iterable) and not isinstance(v, str) else v
        for k, v in options.items()
    }
    if init is not None:
        options["init"] = init
    make_encoder = partial(
        _make_encoder,
        ENCODERS[name],
        shape,
        num_agents=num_agents if share_parameters and agent_id else None,
        normalize_input=normalize_input,
        input_scale=float(input_scale),
        channels_first=channels_first,
        options=options,
    )
    init = init or "lecun_normal"

    def make(key: PRNGKeyArray) -> AbstractQNetwork:
        encoder_key, head_key, memory_key = jax.random.split(key, 3)
        layers, features = make_encoder(encoder_key)
        if num_quantiles is not None:
            q_head = HEADS[head](features, num_actions * num_quantiles, key=head_key, init=init)
            return Quantiles(FeedForward(Sequential(tuple(layers)), q_head), num_quantiles)
        if memory == "none":
            q_head = HEADS[head](features, num_actions, key=head_key, init=init)
            return FeedForward(Sequential(tuple(layers)), q_head)
        inputs = features + num_actions * last_action + last_reward
        recurrences = []
        for k in jax.random.split(memory_key, num_memory_layers):
            recurrences.append(RECURRENCES[memory](inputs, memory_size, key=k, init=init))
            inputs = memory_size
        q_head = HEADS[head](inputs, num_actions, key=head_key, init=init)
        return Recurrent(
            Sequential(tuple(layers)),
            tuple(recurrences),
            q_head,
            num_actions,
            last_action,
            last_reward,
        )

    if num_agents is None or share_parameters:
        return make(key)
    return PerAgent(eqx.filter_vmap(make)(jax.random.split(key, num_agents)), num_agents)


def _make_encoder(
    encoder: Callable[..., Sequential],
    shape: tuple[int, ...],
    key: PRNGKeyArray,
    *,
    num_agents: int | None,
    normalize_input: bool,
    input_scale: float,
    channels_first: bool,
    options: dict[str, Any],
) -> tuple[list[AbstractLayer], int]:
    """Layers from raw observations to features, and how many features there are."""
    layers: list[AbstractLayer] = []
    if channels_first and (normalize_input or num_agents is not None):
        layers.append(ChannelsLast())
        shape, channels_first = (*shape[1:], shape[0]), False
    if normalize_input:
        layers.append(BatchNorm(shape[-1]))
        input_scale = 1.0
    if num_agents is not None:
        layers += [Scale(input_scale), AgentId(num_agents)]
        shape, input_scale = (*shape[:-1], shape[-1] + num_agents), 1.0
    layers.append(
        encoder(shape, key=key, input_scale=input_scale, channels_first=channels_first, **options)
    )
    (features,) = output_shape(layers[-1], shape)
    return layers, features


_OPTIONS = {
    name
    for name, parameter in inspect.signature(make_network).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "key"
}
