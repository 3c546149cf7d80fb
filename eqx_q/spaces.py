"""Gymnasium spaces that can be static fields of a PyTree: hashable, and compared quickly.

Gymnasium's own spaces define equality without a hash, so `jit` cannot key on them.
"""

import gymnasium

from .errors import UsageError


class Box(gymnasium.spaces.Box):
    """A hashable [`gymnasium.spaces.Box`][]."""

    def __init__(self, space: gymnasium.spaces.Box):
        super().__init__(space.low, space.high, space.shape, space.dtype.type)
        self._hash = hash((self.shape, self.dtype.str, self.low.tobytes(), self.high.tobytes()))

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)

    def __hash__(self) -> int:
        return self._hash


class Discrete(gymnasium.spaces.Discrete):
    """A hashable [`gymnasium.spaces.Discrete`][]."""

    def __init__(self, space: gymnasium.spaces.Discrete):
        super().__init__(int(space.n), start=int(space.start))

    def __hash__(self) -> int:
        return hash((int(self.n), int(self.start)))


def observation_box(space: gymnasium.Space) -> Box:
    """`space` as a hashable `Box`. Raises `UsageError` for any other kind of space."""
    if not isinstance(space, gymnasium.spaces.Box):
        raise UsageError(
            f"observations must be a Box, got {space}: "
            "wrap the environment in gymnasium.wrappers.FlattenObservation"
        )
    return Box(space)


def action_discrete(space: gymnasium.Space) -> Discrete:
    """`space` as a hashable `Discrete` from 0. Raises `UsageError` for any other kind of space."""
    if not isinstance(space, gymnasium.spaces.Discrete):
        raise UsageError(
            f"Q-learning needs Discrete actions, got {space}: discretise the actions first"
        )
    if int(space.start) != 0:
        raise UsageError(f"actions must count from 0, got {space}: shift them first")
    return Discrete(space)
