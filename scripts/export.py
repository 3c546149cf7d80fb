"""Exports a trained agent: `python scripts/export.py --help`."""

import logging
from pathlib import Path

from _app import hydra, launch, settings, stored_config, task
from omegaconf import DictConfig, OmegaConf

from eqx_q.errors import UsageError
from eqx_q.run import export_run, whole
from eqx_q.saving.hub import locate, results_of

logger = logging.getLogger("eqx_q")


@hydra.main(version_base="1.3", config_path="../conf", config_name="export")
@task
def main(config: DictConfig) -> None:
    """Exports an agent."""
    if OmegaConf.is_missing(config, "run"):
        raise UsageError("there is no run to export: give run=DIR")
    run, given = str(config.run), settings(config)
    directory = locate(run)
    path = export_run(
        settings(stored_config(directory)),
        directory,
        results_of(run) / "export" if given["out"] is None else Path(str(given["out"])),
        member=None if given["member"] is None else whole(given, "member"),
        platforms=given["platforms"],
    )
    logger.info("wrote %s; README.md there describes it and its use", path)


if __name__ == "__main__":
    launch(main)
