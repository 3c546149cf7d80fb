"""What learns."""

from .agent import Agent as Agent
from .population import Population as Population
from .pqn import PQN as PQN
