"""Converts names and fields in files of earlier versions to current ones.

Add a line to `MOVED` for a class that moves, a line to `NEW` for one that gains a field, and a
function to `CHANGED` for one whose fields change. Files in `tests/golden/saved` must still load.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from ..agents.exploration import EpsilonGreedy
from ..agents.mixers import Independent
from ..agents.optimizers import Optimizer, make_optimizer
from ..agents.values import AbstractValue, Quantile, Scalar
from ..errors import UsageError
from ..nets import Network
from ..nets.heads import Dueling, LinearHead
from ..nets.layers import Linear
from ..nets.parameters import split_parameters
from ..types import Count

Fields = dict[str, Any]

# References as stored in files, `"module:qualname"`.
MOVED = {
    "eqx_q.training:RunState": "eqx_q.loops.training:RunState",
    "eqx_q.offline:OfflineState": "eqx_q.loops.offline:OfflineState",
    "eqx_q.agents.pqn:PQNMemory": "eqx_q.agents.acting:AgentMemory",
    "eqx_q.agents.dqn:DQN": "eqx_q.agents.offline:DQN",
    "eqx_q.nets.feedforward:FromModule": "eqx_q.nets.network:FromModule",
    "eqx_q.nets.feedforward:FeedForward": "eqx_q.nets.network:Network",
    "eqx_q.nets.recurrent:Recurrent": "eqx_q.nets.network:Network",
    "eqx_q.nets.quantiles:Quantiles": "eqx_q.nets.network:Network",
}

# Fields that classes did not have, with equivalent values.
NEW: dict[str, Fields] = {
    "eqx_q.types:TimeStep": {"global_state": None},
    "eqx_q.types:Rollout": {"weight": None},
    "eqx_q.nets.network:FromModule": {"num_values": 1},
    "eqx_q.nets.layers:MaxPool": {"padding": "SAME"},
    "eqx_q.agents.pqn:PQN": {"precision": "float32"},
    "eqx_q.agents.offline:DQN": {"precision": "float32"},
    "eqx_q.agents.offline:CQL": {"precision": "float32"},
    "eqx_q.agents.offline:BC": {"precision": "float32"},
}


# Networks ---------------------------------------------------------------------------------------


def _network(reference: str, fields: Fields) -> tuple[str, Fields]:
    if "num_quantiles" in fields:  # a wrapper around a network with that many values
        network, num_values = fields["network"], fields["num_quantiles"]
        if not (isinstance(network, Network) and isinstance(network.head, LinearHead)):
            raise _gone("quantiles of a network other than the shipped ones")
        head = LinearHead(network.head.linear, num_values)
        (num_outputs,) = network.choices
        return reference, vars(network) | {"head": head, "choices": (num_outputs // num_values,)}
    if "choices" in fields:
        return reference, fields
    head = fields["head"]
    if isinstance(head, Linear):
        head = LinearHead(head, 1)
    elif not isinstance(head, Dueling):
        raise _gone(f"a head of type '{type(head).__name__}'")
    last = head.linear if isinstance(head, LinearHead) else head.advantage
    without_memory = {"recurrences": (), "last_action": False, "last_reward": False}
    fields = without_memory | fields | {"head": head, "choices": _num_outputs(last)}
    return reference, {name: value for name, value in fields.items() if name != "num_actions"}


def _num_outputs(layer: Any) -> tuple[int]:
    """Outputs of the last linear layer; populations have a leading axis of members."""
    return (layer.bias.shape[-1],)


def _dueling(reference: str, fields: Fields) -> tuple[str, Fields]:
    if "choices" in fields:
        return reference, fields
    return reference, {"choices": _num_outputs(fields["advantage"])} | fields


def _per_agent(reference: str, fields: Fields) -> tuple[str, Fields]:
    if "num_agents" not in fields:
        return reference, fields
    kinds = tuple(range(fields["num_agents"]))
    return reference, {"members": fields["members"], "kinds": kinds}


def _gone(what: str) -> UsageError:
    return UsageError(
        f"networks no longer support {what}: load this with the version that saved it"
    )


# Agents -----------------------------------------------------------------------------------------


def _pqn(reference: str, fields: Fields) -> tuple[str, Fields]:
    fields = _counted_in_two_words(fields, "env_steps")
    if "value" in fields:
        return reference, fields
    return reference, _with_parts(fields, Scalar(), make_optimizer("radam"), fields["mixer"])


def _run_state(reference: str, fields: Fields) -> tuple[str, Fields]:
    return reference, _counted_in_two_words(fields, "transitions")


def _counted_in_two_words(fields: Fields, name: str) -> Fields:
    count = fields[name]
    return fields if isinstance(count, Count) else fields | {name: Count.of(count)}


def _dqn(reference: str, fields: Fields) -> tuple[str, Fields]:
    """Three presets of one class became separate classes."""
    if "value" in fields:
        return reference, fields
    td_loss, epsilon = fields.pop("td_loss"), fields.pop("adam_epsilon")
    head = fields["network"].head if isinstance(fields["network"], Network) else None
    num_values = head.num_values if isinstance(head, LinearHead) else 1
    value = Scalar(td_loss) if num_values == 1 else Quantile(num_values)
    fields = _with_parts(fields, value, Optimizer("adam", {"eps": epsilon}, ()), Independent())
    fields |= {"target_mixer": Independent(), "num_agents": None}
    fields |= {"sequence_length": None, "burn_in": 0}
    name = "DQN"
    if np.any(np.asarray(fields["alpha"]) > 0):
        name = "CQL" if np.any(np.asarray(fields["td_weight"]) > 0) else "BC"
    return f"eqx_q.agents.offline:{name}", fields


def _with_parts(fields: Fields, value: AbstractValue, optimizer: Optimizer, mixer: Any) -> Fields:
    """Adds parts that agents did not have; restructures statistics and optimiser state."""
    network = fields["network"]
    parameters, _ = split_parameters((network, mixer))
    states = {
        "statistics": network.initial_statistics(),
        "optimizer_state": optimizer.init(parameters),
    }
    fields = fields | {name: like(today, fields[name]) for name, today in states.items()}
    parts = {"value": value, "optimizer": optimizer, "mixer": mixer}
    return fields | parts | {"exploration": EpsilonGreedy(), "bins": 2}


def like(today: PyTree, tree: PyTree) -> PyTree:
    """The leaves of a tree of any version in the structure of `today`."""
    return jax.tree.unflatten(jax.tree.structure(today), jax.tree.leaves(tree))


def _memory(reference: str, fields: Fields) -> tuple[str, Fields]:
    """Earlier memory had one factor, without an axis, and none of exploration."""
    if "exploration" in fields:
        return reference, fields
    fields = {**fields, "last_action": fields["last_action"][..., None], "exploration": ()}
    return reference, fields


# By current reference: functions from it and the fields in a file to the current ones. They must
# not change fields that are current already.
CHANGED: dict[str, Callable[[str, Fields], tuple[str, Fields]]] = {
    "eqx_q.nets.network:Network": _network,
    "eqx_q.nets.heads:Dueling": _dueling,
    "eqx_q.nets.team:PerAgent": _per_agent,
    "eqx_q.agents.pqn:PQN": _pqn,
    "eqx_q.agents.offline:DQN": _dqn,
    "eqx_q.agents.acting:AgentMemory": _memory,
    "eqx_q.loops.training:RunState": _run_state,
}


def todays_name(reference: str) -> str:
    """The current name of a reference of any version."""
    return MOVED.get(reference, reference)


def todays(reference: str, fields: Fields) -> tuple[str, Fields]:
    """The current class and fields of an object of any version."""
    reference = todays_name(reference)
    fields = NEW.get(reference, {}) | fields
    change = CHANGED.get(reference)
    return (reference, fields) if change is None else change(reference, fields)
