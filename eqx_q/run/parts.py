"""An agent's parts in a configuration, which lists the options of all parts of a kind together."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..agents.exploration import EXPLORATIONS
from ..agents.mixers import MIXERS
from ..agents.optimizers import OPTIMIZERS
from ..agents.values import VALUES
from ..errors import UsageError

Options = Mapping[str, Any]

KINDS: dict[str, Mapping[str, Callable[..., Any]]] = {
    "value": VALUES,
    "mixer": MIXERS,
    "exploration": EXPLORATIONS,
    "optimizer": OPTIMIZERS,
}

# Options that earlier versions named differently.
RENAMED = {"td_loss": "value.td_loss", "adam_epsilon": "optimizer.eps"}


def full_overrides(override: str) -> list[str]:
    """Expands a command-line override.

    `agent.value=hl_gauss` names a part; keys of earlier versions still work.
    """
    key, equals, value = override.partition("=")
    plain = key.lstrip("+")
    _, dot, name = plain.partition("agent.")
    if not (equals and dot and plain == f"agent.{name}"):
        return [override]
    if name in KINDS and not value.startswith(("{", "null")):
        return [f"{key}.name={value}"]
    if name in RENAMED:
        return [f"agent.{RENAMED[name]}={value}"]
    if name == "network_options.num_quantiles":
        return ["agent.value.name=quantile", f"agent.value.num_quantiles={value}"]
    return [override]


def chosen_options(options: Options) -> dict[str, Any]:
    """Options of an agent, with only the options of the chosen part of each kind.

    An option that no part of its kind has is kept, to be refused later.
    """
    options = _of_today(options)
    for kind, known in KINDS.items():
        part = options.get(kind)
        if isinstance(part, Mapping) and part.get("name") in known:
            own = _parameters(known[part["name"]])
            of_others = set().union(*(_parameters(make) for make in known.values())) - own
            options[kind] = {name: x for name, x in part.items() if name not in of_others}
    return options


def check_of_chosen(options: Options, path: str, names: Iterable[str] = ()) -> None:
    """Raises `UsageError` for an option (`"value.sigma"`) that the chosen part of its kind lacks.

    An option that no part of its kind has is refused when the part is made.

    **Arguments:** `names`: other parts that may be chosen instead.
    """
    kind, _, option = path.partition(".")
    if kind not in KINDS:
        return
    having = [name for name, make in KINDS[kind].items() if option in _parameters(make)]
    chosen = (_of_today(options).get(kind) or {}).get("name")
    if having and chosen in KINDS[kind] and not {chosen, *names} & set(having):
        raise UsageError(
            f"agent.{path} needs agent.{kind}={' or '.join(having)}, but {chosen} is chosen: leave "
            "it out, or choose such a part"
        )


def _of_today(options: Options) -> dict[str, Any]:
    """Converts options of earlier versions, which the configuration of an old run may have."""
    options = dict(options)
    for kind in KINDS:
        if isinstance(options.get(kind), str):
            options[kind] = {"name": options[kind]}
    default = {"value": "scalar", "optimizer": "adam"}
    for old, new in RENAMED.items():
        if old in options:
            kind, _, name = new.partition(".")
            before = {"name": default[kind], name: options.pop(old)}
            options[kind] = before | dict(options.get(kind, {}))  # the current name overrides
    network = options.get("network_options") or {}
    if not isinstance(network, Mapping):
        raise UsageError(f"agent.network_options={network}: give a mapping of names to values")
    if "num_quantiles" in network:
        network = dict(network)
        options["value"] = {"name": "quantile", "num_quantiles": network.pop("num_quantiles")}
        options["network_options"] = network
    return options


def _parameters(make: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(make).parameters)
