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
from .loops import callbacks as callbacks, evolution as evolution
from .loops.evaluation import evaluate as evaluate
from .loops.offline import (
    OfflineState as OfflineState,
    advance_offline as advance_offline,
    start_offline as start_offline,
    train_offline as train_offline,
)
from .loops.running import StopTraining as StopTraining
from .loops.training import (
    RunState as RunState,
    advance as advance,
    start as start,
    train as train,
)
from .saving.checkpoint import load as load, save as save
from .saving.exporting import export as export
from .types import (
    Decision as Decision,
    Episode as Episode,
    Rollout as Rollout,
    TimeStep as TimeStep,
    Transitions as Transitions,
)
from .wrappers import Env as Env, make as make
