"""What learns."""

from .agent import (
    Agent as Agent,
    OfflineAgent as OfflineAgent,
    OnlineAgent as OnlineAgent,
    decide as decide,
)
from .dqn import BC as BC, CQL as CQL, DQN as DQN
from .population import Population as Population
from .pqn import PQN as PQN
