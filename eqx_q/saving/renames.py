"""What files of earlier versions call things, and what those are today.

A class that moves gets a line in `MOVED`; one whose fields change, an entry in `CHANGED`. Files
in `tests/golden/saved` must go on loading.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..agents.exploration import EpsilonGreedy
from ..agents.mixers import Independent
from ..agents.optimizers import Optimizer, make_optimizer
from ..agents.values import AbstractValue, Quantile, Scalar
from ..nets.parameters import split_parameters

Fields = dict[str, Any]

# References as files hold them, `"module:qualname"`.
MOVED = {
    "eqx_q.training:RunState": "eqx_q.loops.training:RunState",
    "eqx_q.offline:OfflineState": "eqx_q.loops.offline:OfflineState",
    "eqx_q.agents.pqn:PQNMemory": "eqx_q.agents.acting:AgentMemory",
    "eqx_q.agents.dqn:DQN": "eqx_q.agents.offline:DQN",
}


# Fields that classes did not have, with what they were as good as.
NEW: dict[str, Fields] = {
    "eqx_q.types:TimeStep": {"global_state": None},
    "eqx_q.types:Rollout": {"weight": None},
}


def _pqn(reference: str, fields: Fields) -> tuple[str, Fields]:
    if "value" in fields:
        return reference, fields
    return reference, _with_parts(
        fields, Scalar(), make_optimizer("radam"), mixer=fields["mixer"]
    )


def _dqn(reference: str, fields: Fields) -> tuple[str, Fields]:
    """What were three presets of one class are classes of their own."""
    if "value" in fields:
        return reference, fields
    num_values = getattr(getattr(fields["network"], "head", None), "num_values", 1)
    td_loss, epsilon = fields.pop("td_loss"), fields.pop("adam_epsilon")
    value = Scalar(td_loss) if num_values == 1 else Quantile(num_values)
    fields = _with_parts(fields, value, Optimizer("adam", {"eps": epsilon}, ()), Independent())
    fields |= {"target_mixer": Independent(), "num_agents": None}
    fields |= {"sequence_length": None, "burn_in": 0}
    name = "DQN"
    if np.any(np.asarray(fields["alpha"]) > 0):
        name = "CQL" if np.any(np.asarray(fields["td_weight"]) > 0) else "BC"
    return f"eqx_q.agents.offline:{name}", fields


def _with_parts(
    fields: Fields, value: AbstractValue, optimizer: Optimizer, mixer: Any
) -> Fields:
    """With the parts that agents had not; the rest in today's structure."""
    network = fields["network"]
    parameters, _ = split_parameters((network, mixer))
    states = {
        "statistics": network.initial_statistics(),
        "optimizer_state": optimizer.init(parameters),
    }
    for name, today in states.items():
        leaves = jax.tree.leaves(fields[name])
        fields[name] = jax.tree.unflatten(jax.tree.structure(today), leaves)
    parts = {"value": value, "optimizer": optimizer, "mixer": mixer}
    return fields | parts | {"exploration": EpsilonGreedy(), "bins": 2}


def _memory(reference: str, fields: Fields) -> tuple[str, Fields]:
    """There was one factor, without an axis, and exploration remembered nothing."""
    if "exploration" in fields:
        return reference, fields
    fields = {**fields, "last_action": fields["last_action"][..., None], "exploration": ()}
    return reference, fields


# By today's reference: from that and the fields that a file holds to those of today. Each must
# leave fields alone that are today's already.
CHANGED: dict[str, Callable[[str, Fields], tuple[str, Fields]]] = {
    "eqx_q.agents.pqn:PQN": _pqn,
    "eqx_q.agents.offline:DQN": _dqn,
    "eqx_q.agents.acting:AgentMemory": _memory,
}


def todays_name(reference: str) -> str:
    """What a reference of any version is called today."""
    return MOVED.get(reference, reference)


def todays(reference: str, fields: Fields) -> tuple[str, Fields]:
    """The class of an object of any version and its fields, as they are today."""
    reference = todays_name(reference)
    change = CHANGED.get(reference)
    fields = {name: x for name, x in NEW.get(reference, {}).items() if name not in fields} | fields
    return (reference, fields) if change is None else change(reference, fields)
