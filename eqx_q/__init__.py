"""Q-learning agents on JAX and Equinox, for Gymnasium, PettingZoo and JAX-native environments."""

from . import agents as agents, nets as nets, returns as returns, wrappers as wrappers
from .agents import PQN as PQN, Agent as Agent, Population as Population
from .checkpoint import load as load, save as save
from .evaluation import evaluate as evaluate
from .training import (
    RunState as RunState,
    StopTraining as StopTraining,
    advance as advance,
    start as start,
    train as train,
)
from .types import (
    Decision as Decision,
    Episode as Episode,
    Rollout as Rollout,
    TimeStep as TimeStep,
)
from .wrappers import Env as Env, make as make
