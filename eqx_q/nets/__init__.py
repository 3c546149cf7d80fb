"""Layers and networks that compute Q-values, independent of agents and environments."""

from .network import AbstractQNetwork, FromModule, Inputs, Network, NetworkOutput, as_network
from .registry import make_network
from .team import PerAgent

__all__ = [
    "AbstractQNetwork",
    "FromModule",
    "Inputs",
    "Network",
    "NetworkOutput",
    "PerAgent",
    "as_network",
    "make_network",
]
