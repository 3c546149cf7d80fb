"""Q-learning agents on JAX and Equinox, for Gymnasium, PettingZoo and JAX-native environments."""

from . import (
    agents as agents,
    data as data,
    nets as nets,
    policy as policy,
    returns as returns,
    wrappers as wrappers,
)
from .agents import (
    BC as BC,
    CQL as CQL,
    DQN as DQN,
    PQN as PQN,
    Agent as Agent,
    Population as Population,
)
from .checkpoint import load as load, save as save
from .evaluation import evaluate as evaluate
from .exporting import export as export
from .offline import (
    OfflineState as OfflineState,
    advance_offline as advance_offline,
    start_offline as start_offline,
    train_offline as train_offline,
)
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
    Transitions as Transitions,
)
from .wrappers import Env as Env, make as make
