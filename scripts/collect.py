"""Records a data set with trained agents: `python scripts/collect.py --help`."""

import logging
from pathlib import Path
from typing import Any

from _app import hydra, launch, settings, stored_config, task
from omegaconf import DictConfig, OmegaConf

from eqx_q.data import Dataset
from eqx_q.errors import UsageError
from eqx_q.run import collect_run, fraction, whole, whole_or_none
from eqx_q.saving.hub import locate

logger = logging.getLogger("eqx_q")


@hydra.main(version_base="1.3", config_path="../conf", config_name="collect")
@task
def main(config: DictConfig) -> None:
    """Records a data set."""
    for key, what in (("run", "run to record"), ("out", "directory for the data set")):
        if OmegaConf.is_missing(config, key):
            raise UsageError(f"there is no {what}: give {key}=DIR")
    given = settings(config)
    directories = [locate(str(run)) for run in _listed(given["run"])]
    epsilons = [0.0] if given["epsilon"] is None else _listed(given["epsilon"])
    if not directories or not epsilons:
        raise UsageError("run or epsilon is an empty list: give at least one of each")
    dataset = collect_run(
        [(settings(stored_config(directory)), directory) for directory in directories],
        Path(str(given["out"])),
        steps=whole(given, "steps", least=1),
        epsilons=[fraction({"epsilon": epsilon}, "epsilon") for epsilon in epsilons],
        steps_of_checkpoints=_checkpoints(given["checkpoints"]),
        num_envs=whole_or_none(given, "num_envs"),
        seed=whole(given, "seed"),
        protocol=given.get("protocol"),
    )
    print(_table(dataset))
    logger.info("wrote %s", dataset.path)


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _checkpoints(value: Any) -> list[int] | str | None:
    if value is None or value == "all":
        return value
    steps = [whole({"checkpoints": step}, "checkpoints") for step in _listed(value)]
    if not steps:
        raise UsageError("checkpoints=[]: give all, or a list of steps")
    return steps


def _table(dataset: Dataset) -> str:
    """A table of the shards."""
    width = max(len(shard.name) for shard in dataset.shards)
    rows = [f"{'shard':<{width}}{'transitions':>13}{'episodes':>10}{'cut':>6}{'return':>12}"]
    for shard in dataset.shards:
        recorded = shard.source
        mean = recorded["return_mean"]
        rows.append(
            f"{shard.name:<{width}}{recorded['transitions']:>13,}{recorded['episodes']:>10,}"
            f"{recorded['cut']:>6,}{'-' if mean is None else f'{mean:.2f}':>12}"
        )
    size = sum(path.stat().st_size for path in dataset.path.iterdir())
    rows.append(
        f"{dataset.num_transitions:,} transitions, {dataset.num_episodes:,} episodes, "
        f"{size / 1e6:,.1f} MB"
    )
    return "\n".join(rows)


if __name__ == "__main__":
    launch(main)
