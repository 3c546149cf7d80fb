"""Agents: Q-learning algorithms, their parts, and populations of them."""

from .agent import (
    Agent as Agent,
    Batches as Batches,
    Rollouts as Rollouts,
    decide as decide,
)
from .offline import BC as BC, CQL as CQL, DQN as DQN
from .population import Population as Population
from .pqn import PQN as PQN
