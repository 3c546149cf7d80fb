"""Searches for hyperparameters: `python scripts/tune.py --help`."""

import logging
import sys
from pathlib import Path

import yaml
from _app import (
    AUTO,
    CONF,
    adopt,
    begin,
    end_preempted,
    goes_on,
    hydra,
    launch,
    overridden,
    prepare_jax,
    run_directory,
    settings,
    store_config,
    stored_config,
    task,
)
from omegaconf import DictConfig

from eqx_q.errors import UsageError
from eqx_q.run import search_run
from eqx_q.saving.files import write_whole

logger = logging.getLogger("eqx_q")

_CHANGEABLE = {"resume", "trials", "population", "tracker", "install", "log_every"}


@hydra.main(version_base="1.3", config_path="../conf", config_name="tune")
@task
def main(config: DictConfig) -> float | None:
    """Searches; returns the best trial's result."""
    if config.distributed.coordinator is not None:
        raise UsageError(
            "distributed is not supported by searches: leave it out, and start each process with "
            "resume=DIR to share a search"
        )
    resume = bool(config.resume) and config.resume != AUTO
    if resume:
        config = _resumed(config)
    else:
        begin(config)
    if config.get("data"):
        config.data = str(Path(str(config.data)).resolve())  # for a resume from another directory
    prepare_jax(config)
    directory = run_directory(config, resume=resume, record="study.journal")
    logger.info("search directory: %s", directory)
    groups = [f"{group}={config.chosen[group]}" for group in ("agent", "env")]
    summary = search_run(
        settings(config),
        directory,
        defaults=settings(hydra.compose("tune", [*groups, "tuned=none"])),
        command=" ".join(overridden()),
        on_start=lambda: store_config(config, directory),
    )
    best = summary["best"]
    if best is not None:
        logger.info("best: %s %.4g in trial %d, %s", config.metric, *_of(best), best["params"])
    if summary["status"] == "stopped":
        logger.info("stopped: continue with `python scripts/tune.py resume=%s`", directory)
        end_preempted(summary, goes_on=resume or goes_on(config))
    elif config.install and best is not None:
        path = CONF / "tuned" / f"{config.chosen.agent}_{config.chosen.env}.yaml"
        shipped = hydra.compose("tune", groups) if path.exists() else None
        write_whole(path, [_as_long(directory / "best.yaml", shipped).encode()])
        logger.info("installed: conf/tuned/%s", path.name)
    return best and best["value"]


def _as_long(best: Path, shipped: DictConfig | None) -> str:
    """The file `best`, with the length of the `shipped` runs, since a search may be shorter."""
    text = best.read_text()
    tuned = yaml.safe_load(text)
    if shipped is not None:
        tuned |= {key: shipped[key] for key in ("total_steps", "num_updates") if key in tuned}
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    return head + yaml.safe_dump(tuned, sort_keys=False, default_flow_style=None)


def _of(best: dict) -> tuple[float, int]:
    return best["value"], best["trial"]


def _resumed(config: DictConfig) -> DictConfig:
    """The configuration of the search that `resume` names, with the changes that are allowed."""
    stored = stored_config(Path(config.resume))
    for override in overridden():
        key = override.split("=")[0].lstrip("+~")
        if key.split(".")[0] not in _CHANGEABLE:
            raise UsageError(f"resume continues a search with its own options: leave out {key}")
        adopt(override, config, stored)
    return stored


def _replacing(word: str) -> list[str]:
    """Makes an override of a space replace or add a value, since Hydra would merge ranges."""
    key, _, values = word.partition("=")
    return [f"++{key}=null", f"++{word}"] if key.startswith("search.") and values else [word]


if __name__ == "__main__":
    sys.argv[1:] = [new for word in sys.argv[1:] for new in _replacing(word)]
    launch(main)
