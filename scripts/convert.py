"""Converts recorded data from and to other formats: `python scripts/convert.py --help`."""

import logging
import time
from typing import Any

from _app import hydra, launch, settings, task
from omegaconf import DictConfig, OmegaConf

from eqx_q.data import Dataset, Source, convert, from_dqn_replay, from_minari, from_rlu, to_minari
from eqx_q.errors import UnknownNameError, UsageError
from eqx_q.progress import Display
from eqx_q.run import whole_or_none

logger = logging.getLogger("eqx_q")

_ATARI = {"rlu": from_rlu, "dqn_replay": from_dqn_replay}
_ONLY_ATARI = ("run", "shards", "rows_per_shard", "num_actions")


@hydra.main(version_base="1.3", config_path="../conf", config_name="convert")
@task
def main(config: DictConfig) -> None:
    """Converts data."""
    for key in ("format", "source", "out"):
        if OmegaConf.is_missing(config, key):
            raise UsageError(f"there is no {key}: give {key}=..., see --help")
    given = settings(config)
    progress = _Progress()
    try:
        if given["format"] == "to_minari":
            _check_unused(given, *_ONLY_ATARI, "num_workers", "env", "leave_out")
            to_minari(Dataset(given["source"]), str(given["out"]), on_rows=progress)
            progress.close()
            logger.info("wrote the Minari data set '%s'", given["out"])
            return
        source = _source(given)
        workers = whole_or_none(given, "num_workers")
        dataset = convert(source, given["out"], num_workers=workers, on_rows=progress)
    except KeyboardInterrupt:
        then = "start over" if given["format"] == "to_minari" else "continue"
        raise KeyboardInterrupt(f"stopped: run this again to {then}") from None
    finally:
        progress.close()
    logger.info(
        "wrote %s: %s transitions of %s; episodes: %s, shards: %d",
        given["out"],
        f"{dataset.num_transitions:,}",
        dataset.description.env,
        f"{dataset.num_episodes:,}",
        len(dataset.shards),
    )


def _source(given: dict[str, Any]) -> Source:
    expected = given.get("env")
    env = f"{expected['suite']}/{expected['name']}" if expected else None
    if given["format"] == "minari":
        _check_unused(given, *_ONLY_ATARI)
        return from_minari(str(given["source"]), env=env, leave_out=given["leave_out"] or ())
    if given["format"] not in _ATARI:
        raise UnknownNameError("format", given["format"], [*_ATARI, "minari", "to_minari"])
    _check_unused(given, "leave_out")
    run = given["run"]
    return _ATARI[given["format"]](
        given["source"],
        run=_numbers("run", run) if isinstance(run, list) else whole_or_none(given, "run"),
        shards=None if given["shards"] is None else _numbers("shards", given["shards"]),
        rows_per_shard=whole_or_none(given, "rows_per_shard"),
        env=env,
        num_actions=whole_or_none(given, "num_actions"),
    )


def _check_unused(given: dict[str, Any], *keys: str) -> None:
    for key in keys:
        if given.get(key) is not None:
            raise UsageError(f"format={given['format']} does not support {key}: leave it out")


def _numbers(key: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
        raise UsageError(f"{key}={value}: give whole numbers, such as {key}=[0,1]")
    return value


class _Progress:
    """Shows frames and frames/s."""

    def __init__(self):
        self._display = Display(at_once=False)
        self._rows, self._began = 0, time.perf_counter()

    def __call__(self, part: str, rows: int) -> None:
        """Counts written rows."""
        self._rows += rows
        speed = self._rows / (time.perf_counter() - self._began)
        line = f"{self._rows:,} frames  {speed:,.0f} frames/s  {part}"
        self._display(self._rows, None, " frames", part, line)

    def close(self) -> None:
        """Closes the display and leaves it on the screen."""
        self._display.close()


if __name__ == "__main__":
    launch(main)
