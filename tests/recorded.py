"""Raw episodes, and their transitions by a loop: the expected content of converted files."""

from typing import NamedTuple

import numpy as np
from formats import Raw


def raw_episodes(lengths, seed=0, size=(8, 6), num_actions=6):
    """Random episodes; every second one is terminated, the others truncated."""
    rng = np.random.default_rng(seed)
    return [
        Raw(
            rng.integers(1, 256, (length + 1, *size), np.uint8),
            rng.integers(0, num_actions, length),
            rng.integers(-3, 4, length).astype(np.float32),
            terminated=number % 2 == 0,
        )
        for number, length in enumerate(lengths)
    ]


class Transition(NamedTuple):
    """What an agent learns from, of frames."""

    frame: bytes
    action: int
    reward: float
    next_frame: bytes
    terminated: bool
    truncated: bool
    first: bool


def transitions(episodes):
    """Of raw episodes, by a loop."""
    found = []
    for episode in episodes:
        for t in range(len(episode.action)):
            ends = t == len(episode.action) - 1
            found.append(
                Transition(
                    episode.frames[t].tobytes(),
                    int(episode.action[t]),
                    float(episode.reward[t]),
                    episode.frames[t + 1].tobytes(),
                    ends and episode.terminated,
                    ends and not episode.terminated,
                    t == 0,
                )
            )
    return found


def stored_transitions(dataset):
    """Of a data set, by a loop over its rows."""
    found, rows = [], dataset.rows
    for t in range(len(dataset)):
        if rows.action[t] >= 0:
            found.append(
                Transition(
                    rows.obs[t].tobytes(),
                    int(rows.action[t]),
                    float(rows.reward[t]),
                    rows.obs[t + 1].tobytes(),
                    bool(rows.terminated[t]),
                    bool(rows.truncated[t]),
                    bool(rows.first[t]),
                )
            )
    return found
