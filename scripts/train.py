"""Trains an agent: `python scripts/train.py --help`."""

import logging
from pathlib import Path

from _app import (
    AUTO,
    begin,
    end_preempted,
    end_sweep,
    goes_on,
    hydra,
    launch,
    overridden,
    prepare_jax,
    resumed,
    run_directory,
    settings,
    store_config,
    task,
)
from omegaconf import DictConfig

from eqx_q.processes import as_first_says, is_first_process
from eqx_q.run import finished, train_run
from eqx_q.saving.checkpoint import checkpoints

logger = logging.getLogger("eqx_q")


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
@task
def main(config: DictConfig) -> float | None:
    """Trains; returns the mean return of the last evaluation, for sweepers."""
    resume = bool(config.resume) and config.resume != AUTO
    if resume:
        config = resumed(config)
    else:
        prepare_jax(config)
        begin(config)
    if config.get("data"):
        config.data = str(Path(str(config.data)).resolve())  # for a resume from another directory
    again = resume or goes_on(config)
    directory = run_directory(config, resume=resume)
    if goes_on(config):
        summary = finished(directory)
        done, resume = as_first_says(
            summary is not None, bool(checkpoints(directory / "checkpoints"))
        )
        if done:
            logger.info("already done: %s", directory)
            return None if summary is None else summary["eval_return_mean"]
    if not is_first_process():
        logger.setLevel(logging.WARNING)
    logger.info("run directory: %s", directory)
    summary = train_run(
        settings(config),
        directory,
        resume=resume,
        command=" ".join(overridden()),
        on_start=lambda: store_config(config, directory),
    )
    if summary is None:  # another process has the results
        return None
    logger.info("%s", _in_words(summary))
    if summary["status"] == "stopped":
        logger.info("stopped: continue with `python scripts/train.py resume=%s`", directory)
        end_preempted(summary, goes_on=again)
        end_sweep()
    return summary["eval_return_mean"]


def _in_words(summary: dict) -> str:
    returns = summary["eval_return_per_seed"]
    shown = "none" if returns is None else "  ".join(f"{value:.4g}" for value in returns)
    unit = "env_steps" if "env_steps" in summary else "num_updates"
    noun = unit.split("_")[-1]
    return (
        f"{summary['status']}: {summary[unit]:,} {noun} at "
        f"{summary[f'{noun}_per_second']:,.0f} {noun}/s; evaluation returns: {shown}"
    )


if __name__ == "__main__":
    launch(main)
