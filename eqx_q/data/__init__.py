"""What is learnt from offline: the format of data sets, and what reads and writes others."""

from .dataset import (
    Dataset as Dataset,
    Description as Description,
    Rows as Rows,
    Shard as Shard,
    Writer as Writer,
)
