"""What computes Q: layers and networks. Knows no agent and no environment."""

from .feedforward import FeedForward, FromModule, as_network
from .network import AbstractQNetwork, NetworkOutput
from .recurrent import Recurrent
from .registry import make_network
from .team import PerAgent

__all__ = [
    "AbstractQNetwork",
    "FeedForward",
    "FromModule",
    "NetworkOutput",
    "PerAgent",
    "Recurrent",
    "as_network",
    "make_network",
]
