"""What learns."""

from .agent import Agent as Agent, decide as decide
from .population import Population as Population
from .pqn import PQN as PQN
