"""Code that the recorded Atari data sets share: all were played by Dopamine's DQN.

Agarwal et al. 2020 (arXiv 1907.04543) trained it with the protocol of Machado et al. 2018
(arXiv 1709.06009): minimal action sets, sticky actions with probability 0.25, four frames per step,
games of at most 27,000 steps. RL Unplugged (arXiv 2006.13888) comes from the same runs.
"""

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from ..errors import UnknownNameError, UsageError
from ..spaces import Box, Discrete
from .dataset import Description

STACK = 4
LONGEST_GAME = 27_000
_PREPROCESSING = {  # with EnvPool's names
    "frame_skip": 4,
    "repeat_action_probability": 0.25,
    "gray_scale": True,
    "use_inter_area_resize": True,
    "full_action_space": False,
    "episodic_life": False,
    "use_fire_reset": False,
    "max_episode_steps": LONGEST_GAME,
}


def game_folder(source: Path, pattern: str) -> Path:
    """Returns `source` if it is the folder of a game, with files that match the pattern.

    **Raises:** `UsageError` if it is not; the message suggests folders.
    """
    if not source.is_dir():
        near = _near(source.name, source.parent, pattern)
        raise UsageError(f"'{source}' is not a folder" + (near and f": did you mean {near}?"))
    if not any(source.glob(pattern)):
        games = sorted({path for path in source.glob("*") if any(path.glob(pattern))})
        hint = f", such as '{games[0]}'" if games else ""
        raise UsageError(f"'{source}' has no files '{pattern}': give a game's folder{hint}")
    return source


def choose(
    found: Mapping[int, Mapping[int, Any]],
    folder: Path,
    run: int | Sequence[int] | None,
    shards: Sequence[int] | None,
) -> list[tuple[int, int, Any]]:
    """The requested runs and shards; `None` for all.

    **Raises:** `UsageError` if one does not exist.
    """
    runs = sorted(found) if run is None else [run] if isinstance(run, int) else list(run)
    chosen = []
    for one in runs:
        if one not in found:
            raise UsageError(f"'{folder}' has no run {one}: choose from {_ranges(found)}")
        for shard in sorted(found[one]) if shards is None else shards:
            if shard not in found[one]:
                raise UsageError(
                    f"run {one} in '{folder}' has no shard {shard}: choose from "
                    f"{_ranges(found[one])}"
                )
            chosen.append((one, shard, found[one][shard]))
    if not chosen:
        raise UsageError(f"no run or no shard of '{folder}' is chosen: give at least one of each")
    return chosen


def describe(
    folder: Path,
    frame_shape: tuple[int, int],
    *,
    env: str | None,
    num_actions: int | None,
    reward_clip: bool,
    source: Mapping[str, Any],
) -> Description:
    """The description of a game's data set. The folder is named after the game.

    **Arguments:** `env`: the expected game, or `None`. `num_actions`: of the game, if EnvPool,
    which knows it, is not installed.

    **Raises:** `UsageError` if the folder is of another game, or the number of actions is unknown
    or wrong.
    """
    game = folder.resolve().name
    if env is not None and env.rpartition("/")[2].partition("-v")[0].lower() != game.lower():
        raise UsageError(f"'{folder}' holds {game}, but env is {env}: give the folder of that game")
    known = _known_actions(game)
    number = known or num_actions
    if number is None:
        raise UsageError(
            f"the number of actions of {game} is unknown: give num_actions=N, or run "
            "`pip install 'eqx_q[atari]'`"
        )
    if known is not None and num_actions not in (None, known):
        raise UsageError(f"num_actions={num_actions}, but {game} has {known}: leave it out")
    space = gymnasium.spaces.Box(0, 255, (STACK, *frame_shape), np.uint8)
    size = {"img_height": frame_shape[0], "img_width": frame_shape[1]}
    return Description(
        env=f"envpool/{game}-v5",
        observation_space=Box(space),
        action_space=Discrete(gymnasium.spaces.Discrete(number)),
        stack=STACK,
        stack_start="zeros",
        preprocessing={**_PREPROCESSING, **size, "reward_clip": reward_clip},
        source={**source, "game": game},
    )


def check_actions(action: np.ndarray, description: Description, path: Path) -> None:
    """Raises `UsageError` for an action that the game does not have."""
    space: Any = description.action_space
    number = int(space.n)
    if len(action) and not 0 <= action.min() <= action.max() < number:
        wrong = action[(action < 0) | (action >= number)][0]
        raise UsageError(
            f"'{path}' has action {wrong}, but {description.source['game']} has {number} actions: "
            "check the name of the folder"
        )


def check_limit(rows_per_shard: int | None) -> None:
    """Raises `UsageError` if there are too few rows for a transition."""
    if rows_per_shard is not None and rows_per_shard < 2:
        raise UsageError(f"rows_per_shard={rows_per_shard}: give 2 or more")


@functools.cache
def _known_actions(game: str) -> int | None:
    """The number according to EnvPool, if installed. Raises `UnknownNameError` for other games."""
    try:
        import envpool
    except ModuleNotFoundError:
        return None
    names = [name for name in envpool.list_all_envs() if name.endswith("-v5")]
    if f"{game}-v5" not in names:
        raise UnknownNameError("game", game, {name.removesuffix("-v5") for name in names})
    return int(envpool.make_spec(f"{game}-v5").gymnasium_action_space.n)


def _near(name: str, parent: Path, pattern: str) -> str:
    """Folders of games in `parent`, the most similar names first."""
    folders = [path.name for path in parent.glob("*") if any(path.glob(pattern))]
    near = difflib.get_close_matches(name, folders, n=3, cutoff=0.5) or sorted(folders)[:5]
    return " or ".join(f"'{parent / folder}'" for folder in near)


def _ranges(numbers: Iterable[int]) -> str:
    """`0 to 3, 7` for 0, 1, 2, 3, 7."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in spans)
