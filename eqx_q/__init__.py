"""Q-learning agents on JAX and Equinox, for Gymnasium, PettingZoo and JAX-native environments."""

from . import agents as agents
from . import nets as nets
from . import returns as returns
from . import wrappers as wrappers
from .agents import PQN as PQN
from .agents import Agent as Agent
from .agents import Population as Population
from .evaluation import evaluate as evaluate
from .training import RunState as RunState
from .training import StopTraining as StopTraining
from .training import advance as advance
from .training import start as start
from .training import train as train
from .types import Decision as Decision
from .types import Episode as Episode
from .types import Rollout as Rollout
from .types import TimeStep as TimeStep
from .wrappers import Env as Env
from .wrappers import make as make
