"""Q-learning agents on JAX and Equinox, for Gymnasium, PettingZoo and JAX-native environments."""

from . import agents as agents
from . import nets as nets
from . import returns as returns
from . import wrappers as wrappers
from .agents import PQN as PQN
from .agents import Agent as Agent
from .agents import Population as Population
from .evaluate import evaluate as evaluate
from .train import RunState as RunState
from .train import StopTraining as StopTraining
from .train import advance as advance
from .train import start as start
from .train import train as train
from .types import Decision as Decision
from .types import Episode as Episode
from .types import Rollout as Rollout
from .types import TimeStep as TimeStep
from .wrappers import Env as Env
from .wrappers import make as make
