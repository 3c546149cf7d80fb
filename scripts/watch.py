"""Shows a trained agent at work: `python scripts/watch.py --help`."""

from pathlib import Path

from _app import hydra, launch, settings, stored_config, task
from omegaconf import DictConfig, OmegaConf

from eqx_q.errors import UsageError
from eqx_q.run import fraction, number, watch_run, whole
from eqx_q.saving.hub import locate, results_of


@hydra.main(version_base="1.3", config_path="../conf", config_name="watch")
@task
def main(config: DictConfig) -> None:
    """Plays episodes."""
    if OmegaConf.is_missing(config, "run"):
        raise UsageError("there is no run to watch: give run=DIR")
    run, given = str(config.run), settings(config)
    directory = locate(run)
    watch_run(
        settings(stored_config(directory)),
        directory,
        out=None if given["out"] is None else Path(str(given["out"])),
        otherwise=results_of(run) / "media" / "watch.gif",
        episodes=whole(given, "episodes", least=1),
        member=None if given["member"] is None else whole(given, "member"),
        fps=number(given, "fps", least=1),
        epsilon=fraction(given, "epsilon"),
        seed=whole(given, "seed"),
        protocol=given.get("protocol"),
    )


if __name__ == "__main__":
    launch(main)
