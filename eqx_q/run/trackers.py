"""Creates the trackers that a configuration names."""

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
    """Creates the trackers of the key `tracker`, which has `repo` and the options of each tracker.

    Options with a `_target_` create a tracker class of the user's.

    **Arguments:**

    - `directory`: the run directory, or `None`.
    - `command`: the overrides of the command line.
    - `members`: `num_members` and `names` of `RemoteTracker`.

    **Raises:** `UsageError` if there is no such tracker, or if its options are not a mapping.
    """
    chosen = _upgraded(config["tracker"])
    repo = chosen.pop("repo", ".")
    agent = (config.get("chosen") or {}).get("agent") or config["agent"]["_target_"]
    common = {
        "repo": repo,
        "description": f"{agent} in {env_name(config)}" + (command and f": {command}"),
        "tags": [agent, env_name(config)],
    }
    makers: list[Any] = []  # check all options before the first tracker starts
    for name, options in chosen.items():
        if not isinstance(options, Mapping):
            raise UsageError(
                f"tracker.{name}={options}: set its entries instead, or take tracker={name}"
            )
        options = given(options)
        if "_target_" in options:
            create: Any = named_class(options.pop("_target_"), Tracker)
        elif name in BACKENDS or name == "auto":
            backend = _default() if name == "auto" else name
            create, options = functools.partial(RemoteTracker, backend), {**common, **options}
        else:
            raise UnknownNameError("tracker", name, [*BACKENDS, "auto"])
        makers.append(functools.partial(create, directory, **{**members, **options}))
    return [make() for make in makers]


def _upgraded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Converts configurations of earlier versions, which had the options of a single tracker."""
    rest = dict(options)
    target = rest.pop("_target_", None)
    if target is None:
        return rest
    if target == "eqx_q.tracking.AimTracker":
        return {"aim": rest}
    rest.pop("repo", None)
    return {"own": {"_target_": target, **rest}}


def _default() -> str:
    """Aim if it is installed, else TensorBoard. Logs the choice."""
    if installed("aim"):
        logger.info("tracker: aim, since it is installed")
        return "aim"
    logger.info("tracker: tensorboard, since aim is not installed for this Python")
    return "tensorboard"
