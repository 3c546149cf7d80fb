"""Q-learning agents on JAX and Equinox, for Gymnasium, PettingZoo and JAX-native environments."""

from . import (
    agents,
    data,
    nets,
    policy,
    returns,
    testing,
    wrappers,
)
from .agents import (
    BC,
    CQL,
    DQN,
    PQN,
    Agent,
    Population,
)
from .loops import callbacks, evolution
from .loops.evaluation import evaluate
from .loops.offline import (
    OfflineState,
    advance_offline,
    start_offline,
    train_offline,
)
from .loops.running import StopTraining
from .loops.training import (
    RunState,
    advance,
    start,
    train,
)
from .saving.checkpoint import load, save
from .saving.exporting import export
from .types import (
    Decision,
    Episode,
    Rollout,
    TimeStep,
    Transitions,
)
from .wrappers import Env, env_ids, make, register

__all__ = [
    "BC",
    "CQL",
    "DQN",
    "PQN",
    "Agent",
    "Decision",
    "Env",
    "Episode",
    "OfflineState",
    "Population",
    "Rollout",
    "RunState",
    "StopTraining",
    "TimeStep",
    "Transitions",
    "advance",
    "advance_offline",
    "agents",
    "callbacks",
    "data",
    "env_ids",
    "evaluate",
    "evolution",
    "export",
    "load",
    "make",
    "nets",
    "policy",
    "register",
    "returns",
    "save",
    "start",
    "start_offline",
    "testing",
    "train",
    "train_offline",
    "wrappers",
]
