"""What files of earlier versions call things, and what those are today.

A class that moves gets a line in `MOVED`; one whose fields change, an entry in `CHANGED`. Files
in `tests/golden/saved` must go on loading.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from ..errors import UsageError
from ..nets import AbstractQNetwork, Network
from ..nets.heads import Dueling, LinearHead
from ..nets.layers import Linear

Fields = dict[str, Any]

# References as files hold them, `"module:qualname"`.
MOVED = {
    **{
        f"eqx_q.{name}": f"eqx_q.loops.{name}"
        for name in ("training:RunState", "offline:OfflineState")
    },
    "eqx_q.nets.feedforward:FromModule": "eqx_q.nets.network:FromModule",
    "eqx_q.nets.feedforward:FeedForward": "eqx_q.nets.network:Network",
    "eqx_q.nets.recurrent:Recurrent": "eqx_q.nets.network:Network",
    "eqx_q.nets.quantiles:Quantiles": "eqx_q.nets.network:Network",
}


def _network(fields: Fields) -> Fields:
    if "num_quantiles" in fields:  # a network around another, which gave as many values
        network, num_values = fields["network"], fields["num_quantiles"]
        if not (isinstance(network, Network) and isinstance(network.head, LinearHead)):
            raise _gone("quantiles of a network other than the shipped ones")
        head = LinearHead(network.head.linear, num_values)
        (num_outputs,) = network.choices
        return vars(network) | {"head": head, "choices": (num_outputs // num_values,)}
    if "choices" in fields:
        return fields
    head = fields["head"]
    if isinstance(head, Linear):
        head = LinearHead(head, 1)
    elif not isinstance(head, Dueling):
        raise _gone(f"a head of type '{type(head).__name__}'")
    last = head.linear if isinstance(head, LinearHead) else head.advantage
    without_memory = {"recurrences": (), "last_action": False, "last_reward": False}
    fields = without_memory | fields | {"head": head, "choices": _num_outputs(last)}
    return {name: value for name, value in fields.items() if name != "num_actions"}


def _num_outputs(layer: Any) -> tuple[int]:
    """Of the last linear layer; members of a population have theirs side by side."""
    return (layer.bias.shape[-1],)


def _dueling(fields: Fields) -> Fields:
    return {"choices": _num_outputs(fields["advantage"])} | fields


def _per_agent(fields: Fields) -> Fields:
    if "num_agents" not in fields:
        return fields
    return {"members": fields["members"], "kinds": tuple(range(fields["num_agents"]))}


def _gone(what: str) -> UsageError:
    return UsageError(
        f"networks can no longer have {what}: load this with the version that saved it"
    )


def todays_statistics(network: AbstractQNetwork, statistics: PyTree) -> PyTree:
    """A network's statistics of any version, with the `None`s that stand for none today."""
    structure = jax.tree.structure(network.initial_statistics())
    return jax.tree.unflatten(structure, jax.tree.leaves(statistics))


# By today's reference: from the fields that a file holds to those of today. Each must leave fields
# alone that are today's already.
CHANGED: dict[str, Callable[[Fields], Fields]] = {
    "eqx_q.nets.network:Network": _network,
    "eqx_q.nets.network:FromModule": lambda fields: {"num_values": 1} | fields,
    "eqx_q.nets.heads:Dueling": _dueling,
    "eqx_q.nets.team:PerAgent": _per_agent,
}


def todays_name(reference: str) -> str:
    """What a reference of any version is called today."""
    return MOVED.get(reference, reference)


def todays_fields(reference: str, fields: Fields) -> Fields:
    """Fields of any version as those of today's class."""
    change = CHANGED.get(reference)
    return fields if change is None else change(fields)
