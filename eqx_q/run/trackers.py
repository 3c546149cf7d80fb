"""The trackers that a configuration names."""

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

from ..errors import UnknownNameError, UsageError
from ..tracking import BACKENDS, RemoteTracker, Tracker, installed
from .making import named_class
from .settings import Config, env_name, given

logger = logging.getLogger(__name__)


def make_trackers(
    config: Config, directory: str | os.PathLike | None, *, command: str = "", **members: Any
) -> list[Tracker]:
    """What the key `tracker` asks for: beside `repo`, options by the names of trackers.

    Options with a `_target_` are those of a class of one's own.

    **Arguments:** `directory`: of the run, or `None`. `command`: what the command line chose.
    `members`: see `RemoteTracker`.
    """
    chosen = _of_today(config["tracker"])
    repo = chosen.pop("repo", ".")
    agent = (config.get("chosen") or {}).get("agent") or config["agent"]["_target_"]
    about = {
        "repo": repo,
        "description": f"{agent} in {env_name(config)}" + (command and f": {command}"),
        "tags": [agent, env_name(config)],
    }
    makers: list[Any] = []  # all of them, before the first one starts
    for name, options in chosen.items():
        if not isinstance(options, Mapping):
            raise UsageError(f"tracker.{name}={options}: give what is in it, or tracker=NAME")
        options = given(options)
        if "_target_" in options:
            create: Any = named_class(options.pop("_target_"), Tracker)
        elif name in BACKENDS or name == "auto":
            backend = _default() if name == "auto" else name
            create, options = functools.partial(RemoteTracker, backend), {**about, **options}
        else:
            raise UnknownNameError("tracker", name, [*BACKENDS, "auto"])
        makers.append(functools.partial(create, directory, **{**members, **options}))
    return [make() for make in makers]


def _of_today(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of any version: in earlier ones those of one tracker stood there by themselves."""
    rest = dict(options)
    target = rest.pop("_target_", None)
    if target is None:
        return rest
    if target == "eqx_q.tracking.AimTracker":
        return {"aim": rest}
    rest.pop("repo", None)
    return {"own": {"_target_": target, **rest}}


def _default() -> str:
    """Aim where it runs, else TensorBoard; the log says which."""
    if installed("aim"):
        logger.info("tracker: aim, which is installed")
        return "aim"
    logger.info("tracker: tensorboard, since aim is not installed for this Python")
    return "tensorboard"
