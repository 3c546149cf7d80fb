"""What computes Q: layers and networks. Knows no agent and no environment."""

from .feedforward import FeedForward, FromModule, as_network
from .network import AbstractQNetwork, NetworkOutput
from .quantiles import Quantiles
from .recurrent import Recurrent
from .registry import make_network
from .team import PerAgent

__all__ = [
    "AbstractQNetwork",
    "FeedForward",
    "FromModule",
    "NetworkOutput",
    "PerAgent",
    "Quantiles",
    "Recurrent",
    "as_network",
    "make_network",
]
