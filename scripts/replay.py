"""Replays the updates that made a run diverge: `python scripts/replay.py --help`."""

import logging
from pathlib import Path

import numpy as np
from _app import hydra, launch, prepare_jax, settings, stored_config, task
from omegaconf import DictConfig, OmegaConf

from eqx_q.errors import UsageError
from eqx_q.run import replay_run, whole

logger = logging.getLogger("eqx_q")

_SHOWN = ("env_steps", "num_updates", "loss", "td_error", "q_value", "grad_norm", "learning_rate")


@hydra.main(version_base="1.3", config_path="../conf", config_name="replay")
@task
def main(config: DictConfig) -> None:
    """Replays a run, and shows the last good updates."""
    if OmegaConf.is_missing(config, "run"):
        raise UsageError("there is no run to replay: give run=DIR")
    directory, given = Path(config.run), settings(config)
    stored = stored_config(directory)
    OmegaConf.update(stored, "distributed", None, force_add=True)
    prepare_jax(stored)
    told = replay_run(
        settings(stored),
        directory,
        updates=whole(given, "updates", least=1),
        rows=whole(given, "rows", least=1),
    )
    names = [name for name in _SHOWN if told and name in told[-1]]
    print("".join(f"{name:>15}" for name in names))
    for row in told:
        print("".join(f"{_shown(row[name]):>15}" for name in names))


def _shown(value) -> str:
    """Formats a count, a number, or the mean over members."""
    return f"{value:,}" if isinstance(value, int) else f"{float(np.mean(value)):.6g}"


if __name__ == "__main__":
    launch(main)
