"""What is learnt from offline: the format of data sets, and what reads and writes others."""

from .dataset import (
    Dataset as Dataset,
    Description as Description,
    Rows as Rows,
    Shard as Shard,
    Writer as Writer,
)
from .replay import Priorities as Priorities, Replay as Replay
from .sampling import Blocks as Blocks, Sampling as Sampling
