"""What computes Q: layers and networks. Knows no agent and no environment."""

from .feedforward import FeedForward, FromModule, as_network
from .network import AbstractQNetwork, NetworkOutput
from .registry import make_network

__all__ = [
    "AbstractQNetwork",
    "FeedForward",
    "FromModule",
    "NetworkOutput",
    "as_network",
    "make_network",
]
