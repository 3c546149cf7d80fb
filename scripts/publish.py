"""Publishes a trained agent: `python scripts/publish.py --help`."""

import contextlib
import logging
import tempfile
from pathlib import Path

from _app import hydra, launch, settings, store_config, stored_config, task
from omegaconf import DictConfig, OmegaConf

from eqx_q.errors import UsageError
from eqx_q.run import publish_run, whole
from eqx_q.saving.hub import locate, push

logger = logging.getLogger("eqx_q")


@hydra.main(version_base="1.3", config_path="../conf", config_name="publish")
@task
def main(config: DictConfig) -> None:
    """Publishes an agent."""
    if OmegaConf.is_missing(config, "run"):
        raise UsageError("there is no run to publish: give run=DIR")
    given = settings(config)
    to, out = given["to"], given["out"]
    if out is None and to is None:
        raise UsageError("there is no destination: give out=DIR or to=hf:USER/NAME")
    directory = locate(str(given["run"]))
    stored = settings(stored_config(directory))
    with contextlib.ExitStack() as stack:
        if out is None:
            out = stack.enter_context(tempfile.TemporaryDirectory())
        out = Path(str(out))
        member = None if given["member"] is None else whole(given, "member")
        used = publish_run(stored, directory, out, member=member, name=to)
        store_config(OmegaConf.create(used), out)
        if given["out"] is not None:
            logger.info("wrote %s; README.md there describes the agent and its use", out)
        if to is not None:
            url = push(out, str(to), private=given["private"])
            logger.info("pushed %s; load it with eqx_q.load('%s')", url, to)


if __name__ == "__main__":
    launch(main)
