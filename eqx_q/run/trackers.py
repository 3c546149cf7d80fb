"""The trackers that a configuration names."""

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from ..tracking import RemoteTracker, Tracker, installed
from .making import named_class
from .settings import Config, env_name, given

logger = logging.getLogger(__name__)


def make_trackers(
    config: Config, directory: str | os.PathLike | None, *, command: str = "", **members: Any
) -> list[Tracker]:
    """What the key `tracker` asks for: beside `repo`, options by the names of trackers.

    Options with a `_target_` are those of a class of one's own, and of earlier versions, which had
    one tracker.

    **Arguments:** `directory`: of the run, or `None`. `command`: what the command line chose.
    `members`: see `RemoteTracker`.
    """
    chosen = dict(config["tracker"])
    if "_target_" in chosen:
        chosen = {"own": chosen} if chosen["_target_"] else {}
    repo = chosen.pop("repo", ".")
    agent = (config.get("chosen") or {}).get("agent") or config["agent"]["_target_"]
    about = {
        "repo": repo,
        "description": f"{agent} in {env_name(config)}" + (command and f": {command}"),
        "tags": [agent, env_name(config)],
    }
    made: list[Tracker] = []
    for name, options in chosen.items():
        if not isinstance(options, Mapping):
            raise UsageError(f"tracker.{name}={options}: give what is in it, or tracker=NAME")
        options = given(options)
        if "_target_" in options:
            create: Any = named_class(options.pop("_target_"), Tracker)
            made.append(create(directory, **members, **options))
        else:
            backend = _default() if name == "auto" else name
            made.append(RemoteTracker(backend, directory, **members, **about, **options))
    return made


def _default() -> str:
    """Aim where it runs, else TensorBoard; the log says which."""
    if sys.version_info >= (3, 12):
        choice, reason = "tensorboard", "Aim needs a Python before 3.12"
    elif not installed("aim"):
        choice, reason = "tensorboard", "Aim is not installed"
    else:
        choice, reason = "aim", "it is installed"
    logger.info("tracker=auto: %s, since %s", choice, reason)
    return choice
