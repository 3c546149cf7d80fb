"""Data sets for offline learning: their format, and conversion from and to other formats."""

from .conversion import Part as Part, Source as Source, convert as convert
from .dataset import (
    Dataset as Dataset,
    Description as Description,
    Rows as Rows,
    Shard as Shard,
)
from .dqn_replay import from_dqn_replay as from_dqn_replay
from .minari import from_minari as from_minari, to_minari as to_minari
from .replay import Priorities as Priorities, Replay as Replay
from .rlu import from_rlu as from_rlu
from .sampling import Blocks as Blocks, Sampling as Sampling
from .writer import Writer as Writer
