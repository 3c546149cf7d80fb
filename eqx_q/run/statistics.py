"""Statistics of returns over seeds and games.

Interquartile means with 95 % intervals from a stratified bootstrap (Agarwal et al. 2021, "Deep RL
at the edge of the statistical precipice", arXiv 2108.13264: rliable's method). Atari scores are
also human-normalised, with the no-op scores in `atari_scores.csv` (Wang et al. 2016, arXiv
1511.06581, as tabulated by Badia et al. 2020, arXiv 2003.13350, Appendix H).
"""

import csv
import functools
from pathlib import Path

import numpy as np
from jaxtyping import Float


def iqm(scores: Float[np.ndarray, "..."]) -> float:
    """Mean of the middle half of all scores."""
    return float(_middle(scores.reshape(1, -1))[0])


def interval(
    scores: Float[np.ndarray, "seeds tasks"], resamples: int = 10_000
) -> tuple[float, float]:
    """95 % percentile interval of the interquartile mean.

    Stratified: seeds are resampled for each task separately.
    """
    seeds, tasks = scores.shape
    draws = np.random.default_rng(0).integers(seeds, size=(resamples, seeds, tasks))
    means = _middle(scores[draws, np.arange(tasks)].reshape(resamples, -1))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _middle(scores: Float[np.ndarray, "rows scores"]) -> Float[np.ndarray, " rows"]:
    from scipy import stats  # imported here, since it would delay every script

    return stats.trim_mean(scores, 0.25, axis=1)


def human_normalised(
    game: str, returns: Float[np.ndarray, "*seeds"]
) -> Float[np.ndarray, "*seeds"] | None:
    """Scores where 0 is a random player and 1 a human; `None` for games without these scores.

    **Arguments:** `game`: an Atari game, such as `"Pong"`.
    """
    if game not in _atari_scores():
        return None
    random, human = _atari_scores()[game]
    return np.asarray((returns - random) / (human - random))


@functools.cache
def _atari_scores() -> dict[str, tuple[float, float]]:
    """The scores of a random and a human player, by game."""
    with Path(__file__).with_name("atari_scores.csv").open() as file:
        return {
            row["game"]: (float(row["random"]), float(row["human"])) for row in csv.DictReader(file)
        }
