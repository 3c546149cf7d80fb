"""Compares the runs of a sweep: `python scripts/summarize.py --help`."""

import logging
from pathlib import Path

from _app import hydra, launch, settings, stored_config, task
from omegaconf import DictConfig, OmegaConf

from eqx_q.errors import UsageError
from eqx_q.run import as_markdown, summarize_sweep

logger = logging.getLogger("eqx_q")


@hydra.main(version_base="1.3", config_path="../conf", config_name="summarize")
@task
def main(config: DictConfig) -> None:
    """Summarizes a sweep."""
    if OmegaConf.is_missing(config, "sweep"):
        raise UsageError("there is no sweep to summarize: give sweep=DIR")
    sweep = Path(str(config.sweep))
    directories = sorted(path.parent for path in sweep.rglob("config.yaml"))
    if not directories:
        raise UsageError(f"there are no runs below '{sweep}': give the directory of a sweep")
    out = sweep if config.out is None else Path(str(config.out))
    runs = [(settings(stored_config(directory)), directory) for directory in directories]
    print(as_markdown(summarize_sweep(runs, out, metric=str(config.metric))))
    logger.info("wrote sweep.md, sweep.json, sweep.csv and sweep.png to %s", out)


if __name__ == "__main__":
    launch(main)
