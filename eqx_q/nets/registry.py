"""Networks by name. To add an encoder: write it in `encoders`, and add a line to a table there."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import gymnasium
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from .. import spaces
from ..errors import UnknownNameError, UsageError, check_whole, explained, in_words
from .encoders import ENCODERS, STEMS, mlp
from .heads import HEADS, Hidden
from .layers import (
    AbstractLayer,
    ChannelsLast,
    Flatten,
    Join,
    Scale,
    Sequential,
    make_norm,
    output_shape,
)
from .network import AbstractQNetwork, Network
from .recurrent import RECURRENCES, AbstractRecurrence
from .team import AgentId, PerAgent
from .torsos import TORSOS, Simplicial
from .transformer import GTrXL

MEMORIES: dict[str, Callable[..., AbstractRecurrence]] = RECURRENCES | {"gtrxl": GTrXL}
INPUT_NORMS = ("none", "batch_norm", "batch_renorm")  # those of `layers.NORMS` that accept bytes


def has_channels_first(space: gymnasium.Space) -> bool:
    """Whether these are images `[C, H, W]`: bytes, with fewer channels than columns.

    Grids of features are floats, and always have their features last.
    """
    shape = _shape(space)
    return space.dtype == np.uint8 and len(shape) == 3 and shape[0] < shape[-1]


def choose_encoder(shape: tuple[int, ...]) -> str:
    """The usual encoder for observations of this shape (channels last)."""
    if len(shape) != 3 or min(shape[:2]) < 3:
        return "mlp"
    return "nature_cnn" if min(shape[:2]) >= 36 else "minatar_cnn"


def make_network(
    name: str,
    observation_space: gymnasium.Space,
    choices: tuple[int, ...],
    *,
    num_values: int = 1,
    key: PRNGKeyArray,
    encoders: Mapping[str, str] | None = None,
    normalize_input: bool | str = False,
    input_scale: float | None = None,
    channels_first: bool | None = None,
    head: str = "linear",
    head_sizes: Iterable[int] = (),
    init: str | None = None,
    torso: str = "none",
    torso_options: Mapping[str, Any] | None = None,
    simplex_size: int | None = None,
    simplex_temperature: float = 1.0,
    memory: str = "none",
    memory_size: int = 256,
    num_memory_layers: int = 1,
    memory_options: Mapping[str, Any] | None = None,
    last_action: bool = True,
    last_reward: bool = False,
    num_agents: int | None = None,
    share_parameters: bool | str = True,
    agent_kinds: Iterable[int] | None = None,
    agent_id: bool = True,
    **options: Any,
) -> AbstractQNetwork:
    """Makes a shipped network: input, encoder, torso, memory, head.

    If an observation has several parts, each has an encoder without hidden layers; their features
    are concatenated, and hidden layers follow. The defaults of these are those of the first image's
    encoder, or else of `mlp`.

    **Arguments:**

    - `name`: the encoder of all parts that it fits: one of `ENCODERS` (`mlp` for numbers, the
        others for images) or `STEMS` (for categorical numbers), or `"auto"` to choose by their
        spaces and shapes.
    - `observation_space`: of one lane.
    - `choices`: number of choices of each factor of an action.
    - `num_values`: `K`, for each choice.
    - `key`: for the parameters.
    - `encoders`: encoders of single parts, by path (`"camera"`, `"arm.joints"`).
    - `normalize_input`: one of `INPUT_NORMS` for raw observations (`Box`), instead of scaling them;
        `True` is `"batch_norm"`.
    - `input_scale`: a factor for raw observations; by default 1/255 for `uint8`, else 1. Both are
        refused if no part is a `Box` with an encoder that scales it.
    - `channels_first`: whether images are `[C, H, W]`; by default, only if they are bytes with
        fewer channels than columns.
    - `head`: `"linear"` or `"dueling"`.
    - `head_sizes`: of hidden layers in the head; `dueling` has such layers for the value, and
        others for the advantages.
    - `init`: of the weights, one of `layers.INITIALIZERS`. The default is each encoder's own, then
        `lecun_normal`, like purejaxql; `"orthogonal"`, with gain √2 everywhere (1 in GRU and LSTM),
        is like CleanRL.
    - `torso`: `"none"`, or one of `TORSOS`, after the encoder, which then has no hidden layers
        unless `hidden_sizes` says so.
    - `torso_options`: of the torso's function: `{"size": 512, "num_blocks": 3}` of `multi_skip`.
    - `simplex_size`: of the groups of features of a simplicial embedding (see
        `torsos.Simplicial`), which follows encoder and torso; `simplex_temperature`: of its
        softmax.
    - `memory`: `"none"`, or one of `MEMORIES`, between encoder and head.
    - `memory_size`, `num_memory_layers`: features of each recurrence, and number of recurrences.
    - `memory_options`: of the memory's class: `{"context": 128}` of `GTrXL`.
    - `last_action`, `last_reward`: whether the memory also reads these.
    - `num_agents`: of a team, whose agents are lanes, see `team`. `None`: no team.
    - `share_parameters`: whether one network serves all agents of a team, or each has its own;
        `"kind"`: agents of one kind share one.
    - `agent_kinds`: for `"kind"`, the kind of each agent, counted from 0: `(0, 0, 1)`.
    - `agent_id`: whether a network that serves all agents also reads which agent it computes for,
        as one-hot after the observation's last axis (in images: constant channels), or after the
        features of its parts.
    - `options`: of the encoders: `hidden_sizes`, `norm`, `activation`, and more, see there.

    **Raises:** `UsageError` for an invalid name, option or shape.
    """
    if isinstance(normalize_input, bool | None):
        normalize_input = "batch_norm" if normalize_input else "none"
    for kind, given, known in (
        ("head", head, HEADS),
        ("torso", torso, ("none", *TORSOS)),
        ("memory", memory, ("none", *MEMORIES)),
        ("normalize_input", normalize_input, INPUT_NORMS),
    ):
        if given not in tuple(known):  # a tuple also accepts unhashable values
            raise UnknownNameError(kind, given, known)
    is_normalized = normalize_input != "none"
    if is_normalized and input_scale is not None:
        raise UsageError("normalize_input and input_scale exclude each other: remove one")
    check_whole(memory_size=memory_size, num_memory_layers=num_memory_layers)
    check_whole(simplex_size=1 if simplex_size is None else simplex_size)
    check_whole(num_values=num_values, num_agents=1 if num_agents is None else num_agents)
    of_memory = _own_options("memory", memory, MEMORIES, memory_options)
    of_torso = _own_options("torso", torso, TORSOS, torso_options)
    switches = {"channels_first": channels_first, "agent_id": agent_id}
    switches |= {"last_action": last_action, "last_reward": last_reward}
    for option, switch in switches.items():
        if switch not in (True, False, None):
            raise UsageError(f"{option}={switch}: give true or false")
    if not isinstance(encoders, Mapping | None):
        raise UsageError(f"encoders={encoders}: give a mapping of parts of observations to names")
    observation_space = spaces.of_observations(observation_space)
    kinds = _kinds(num_agents, share_parameters, agent_kinds)
    parts = _parts(name, encoders or {}, observation_space, channels_first)
    if init is not None:
        options["init"] = init
    of_torso = {k: options[k] for k in ("norm", "activation", "init") if k in options} | of_torso
    if torso != "none":
        options = {"hidden_sizes": ()} | options
    options = {
        k: tuple(v) if isinstance(v, Iterable) and not isinstance(v, str) else v
        for k, v in options.items()
    }
    names = "+".join(dict.fromkeys(part.encoder for part in parts))
    if (is_normalized or input_scale is not None) and not any(part.is_scaled for part in parts):
        raise UsageError(
            f"network '{names}' does not scale these observations: leave out normalize_input "
            "and input_scale (set them to null)"
        )
    known = set(_LINEAR).union(*(part.takes for part in parts))
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of network '{names}':", option, known | _OPTIONS)
    together = isinstance(observation_space, spaces.Dict | spaces.Tuple)
    joined = together or parts[0].encoder in STEMS
    make_encoder = partial(
        _join if joined else _read,
        parts if joined else parts[0],
        num_agents=num_agents if kinds is None and agent_id else None,
        normalize_input=normalize_input,
        input_scale=input_scale,
        options=options,
    )
    init = init or "lecun_normal"

    def make(key: PRNGKeyArray) -> Network:
        encoder_key, head_key, memory_key = jax.random.split(key, 3)
        encoder, features = make_encoder(encoder_key)
        further: list[AbstractLayer] = []
        if torso != "none":
            torso_key = jax.random.fold_in(encoder_key, 1)
            further.append(TORSOS[torso](features, key=torso_key, **of_torso))
            (features,) = output_shape(further[0], (features,))
        if simplex_size is not None:
            further.append(Simplicial(simplex_size, float(simplex_temperature)))
            if features % simplex_size:
                raise UsageError(
                    f"simplex_size={simplex_size} does not divide {features} features: change it, "
                    "or the size of the last layer before it"
                )
        if further:
            encoder = Sequential((encoder, *further))
        recurrences = []
        if memory != "none":
            features += sum(choices) * last_action + last_reward
            for k in jax.random.split(memory_key, num_memory_layers):
                layer = MEMORIES[memory](features, memory_size, key=k, init=init, **of_memory)
                recurrences.append(layer)
                features = memory_size
        return Network(
            encoder,
            tuple(recurrences),
            HEADS[head](features, choices, num_values, key=head_key, init=init, hidden=hidden),
            choices,
            last_action and memory != "none",
            last_reward and memory != "none",
        )

    told = options if input_scale is None else {**options, "input_scale": input_scale}
    told = {**told, "head_sizes": head_sizes} if head_sizes else told
    with explained(f"network '{name}' cannot have {in_words(told)}"):
        style = {k: options[k] for k in ("norm", "activation") if k in options}
        hidden = Hidden(tuple(head_sizes), **style)
        if kinds is None:
            return make(key)
        return PerAgent(eqx.filter_vmap(make)(jax.random.split(key, max(kinds) + 1)), kinds)


def _own_options(
    kind: str, name: str, makers: Mapping[str, Callable], options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Checks the names of a part's own options; those that are `None` keep their default."""
    if not isinstance(options, Mapping | None):
        raise UsageError(f"{kind}_options={options}: give a mapping of options to values")
    given = {key: value for key, value in (options or {}).items() if value is not None}
    takes = inspect.signature(makers[name]).parameters if name in makers else {}
    known = takes.keys() - {"inputs", "key"} - ({"size", "init"} if kind == "memory" else set())
    for key in given:
        if key not in known:
            raise UnknownNameError(f"option of {kind} '{name}':", key, known)
    return {key: tuple(x) if isinstance(x, list) else x for key, x in given.items()}


_OPTIONS = {
    name
    for name, parameter in inspect.signature(make_network).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "key"
}
# Options of the linear layers after joined features.
_LINEAR = {"hidden_sizes", "norm", "activation", "init"}


def _kinds(
    num_agents: int | None, share_parameters: bool | str, agent_kinds: Iterable[int] | None
) -> tuple[int, ...] | None:
    """The index of each agent's parameters; `None` if all share them."""
    if not isinstance(share_parameters, bool) and share_parameters != "kind":
        raise UnknownNameError("share_parameters", share_parameters, ["true", "false", "kind"])
    if num_agents is None or share_parameters is True:
        return None
    if share_parameters is False:
        return tuple(range(num_agents))
    kinds = () if agent_kinds is None else tuple(agent_kinds)
    if len(kinds) != num_agents or set(kinds) != set(range(len(set(kinds)))):
        raise UsageError(
            f"share_parameters='kind' needs the kind of each of {num_agents} agents, counted from "
            f"0, got agent_kinds={agent_kinds!r}: give them, or set share_parameters to true"
        )
    return kinds


# Encoders --------------------------------------------------------------------------------------


def _shape(space: gymnasium.Space) -> tuple[int, ...]:
    return space.shape or ()


class _Part(NamedTuple):
    """A leaf of observations, and the encoder that reads it."""

    space: spaces.Leaf
    channels_first: bool
    encoder: str

    @property
    def takes(self) -> set[str]:
        """The options of its encoder."""
        make = (ENCODERS | STEMS)[self.encoder]
        return set(inspect.signature(make).parameters) - {"shape", "sizes", "starts", "key"}

    @property
    def is_scaled(self) -> bool:
        """Whether its numbers are quantities, which are scaled or normalised first."""
        return isinstance(self.space, spaces.Box) and "input_scale" in self.takes


def _parts(
    name: str, named: Mapping[str, str], space: spaces.Space, channels_first: bool | None
) -> list[_Part]:
    """Every leaf with its encoder: the `named` one, else `name` if it fits, else the usual one."""
    leaves = dict(spaces.leaves(space))
    for path in named:
        if path not in leaves:
            raise UnknownNameError("part of observations", path, leaves)
    for encoder in (name, *named.values()):
        if encoder not in ("auto", *ENCODERS, *STEMS):
            raise UnknownNameError("network", encoder, [*ENCODERS, *STEMS, "auto"])
    parts, fits = [], name in {"auto", "mlp"}
    for path, leaf in leaves.items():
        shape = _shape(leaf)
        first = has_channels_first(leaf) if channels_first is None else channels_first
        first = first and len(shape) == 3
        if isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete):
            usual, fit = "one_hot", name in STEMS
        else:
            usual = choose_encoder((*shape[1:], shape[0]) if first else shape)
            fit = name == "mlp" or (name in ENCODERS and usual != "mlp")
        chosen = named.get(path, name if fit else "auto")
        parts.append(_Part(leaf, first, usual if chosen == "auto" else chosen))
        fits |= fit or path in named
    # If `name` fits no part, it is tried anyway: its error says what it needs.
    return parts if fits else [part._replace(encoder=name) for part in parts]


def _numbers(name: str, space: spaces.Leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The count of values and the first value of each number in a leaf."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),), (int(space.start),)
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(map(int, space.nvec.ravel())), tuple(map(int, space.start.ravel()))
    raise UsageError(f"'{name}' reads Discrete or MultiDiscrete, not {space}: use network 'auto'")


def _read(
    part: _Part,
    key: PRNGKeyArray,
    *,
    num_agents: int | None,
    normalize_input: str,
    input_scale: float | None,
    options: dict[str, Any],
) -> tuple[AbstractLayer, int]:
    """Layers from a leaf of raw observations to features, and the number of features."""
    space, channels_first, name = part
    shape = _shape(space)
    options = {option: value for option, value in options.items() if option in part.takes}
    if name in STEMS:
        stem = STEMS[name](*_numbers(name, space), key=key, **options)
        (features,) = output_shape(stem, shape)
        return stem, features
    layers: list[AbstractLayer] = []
    if channels_first and (normalize_input != "none" or num_agents is not None):
        layers.append(ChannelsLast())
        shape, channels_first = (*shape[1:], shape[0]), False
    if not shape:
        layers.append(Flatten())
        shape = (1,)
    if not part.is_scaled:
        normalize_input, input_scale = "none", 1.0
    if normalize_input != "none":
        layers.append(make_norm(normalize_input, shape))
        input_scale = 1.0
    if input_scale is None:
        input_scale = 1 / 255 if space.dtype == np.uint8 else 1.0
    if num_agents is not None:
        layers += [Scale(float(input_scale)), AgentId(num_agents)]
        shape, input_scale = (*shape[:-1], shape[-1] + num_agents), 1.0
    options["channels_first"] = channels_first
    if "input_scale" in part.takes:
        options["input_scale"] = float(input_scale)
    layers.append(ENCODERS[name](shape, key=key, **options))
    (features,) = output_shape(layers[-1], shape)
    return Sequential(tuple(layers)), features


def _join(
    parts: list[_Part],
    key: PRNGKeyArray,
    *,
    num_agents: int | None,
    options: dict[str, Any],
    **raw: Any,
) -> tuple[AbstractLayer, int]:
    """Joined stems of all parts, then linear layers. `raw` are arguments of `_read`."""
    linear_key, *keys = jax.random.split(key, 1 + len(parts))
    of_stems = options | {"hidden_sizes": ()}
    stems, sizes = zip(
        *(
            _read(part, k, num_agents=None, options=of_stems, **raw)
            for part, k in zip(parts, keys, strict=True)
        ),
        strict=True,
    )
    layers: list[AbstractLayer] = [Join(stems)]
    if num_agents is not None:
        layers.append(AgentId(num_agents))
    pictures = (part.encoder for part in parts if part.encoder in ENCODERS.keys() - {"mlp"})
    usual = inspect.signature(ENCODERS[next(pictures, "mlp")]).parameters
    linear = {name: options.get(name, usual[name].default) for name in _LINEAR}
    linear["init"] = linear["init"] or "he_normal"  # as in Hadamax's linear layers
    features = sum(sizes) + (num_agents or 0)
    layers.append(mlp((features,), key=linear_key, **linear))
    (features,) = output_shape(layers[-1], (features,))
    return Sequential(tuple(layers)), features
