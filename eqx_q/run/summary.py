"""What a run leaves for the record."""

import contextlib
import json
import logging
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..errors import CorruptFileError
from ..loops.evaluation import Episodes
from ..saving.files import seal, unseal, write_whole
from ..wrappers.registry import SUITES

logger = logging.getLogger(__name__)

_SUITE_PACKAGES = (*(suite.package for suite in SUITES.values()), "mpe2")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes indented JSON with a checksum of itself; what is not finite becomes `null`."""
    write_whole(path, [seal(_finite(value))])


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, or an earlier version without a checksum.

    **Raises:** `CorruptFileError` where it is damaged, `OSError` where it cannot be read.
    """
    try:
        return unseal(json.loads(path.read_bytes()), required=False)
    except ValueError as error:
        raise CorruptFileError(
            f"'{path}' is damaged or was edited ({error}): make it anew, or delete it"
        ) from error


def finished(directory: Path) -> dict[str, Any] | None:
    """The summary of a run that came to its end and whose agent is there, else `None`."""
    try:
        summary = read_json(directory / "summary.json")
    except CorruptFileError as error:
        logger.warning("%s; the run counts as not finished, and a resume ends it again", error)
        return None
    except OSError:
        return None
    is_done = summary.get("status") == "done"
    return summary if is_done and (directory / "agent.eqx").exists() else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def episode_means(played: Episodes) -> dict[str, list[float]]:
    """Per member, of the length and of what the suite says of episodes."""
    values = {"length": played.lengths, **played.metrics}
    return {name: np.atleast_2d(x).mean(1).tolist() for name, x in values.items()}


def provenance() -> dict[str, Any]:
    """The device, the versions of what matters where it is installed, and our commit."""
    versions = {"python": platform.python_version()}
    for package in ("eqx_q", "jax", "jaxlib", "equinox", "optax", "numpy", *_SUITE_PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    device = jax.devices()[0].device_kind
    return {"device": device, "versions": versions, "commit": _commit()}


def _commit() -> str | None:
    """Of the checkout that this file is in, `-dirty` where files differ; `None` outside of one."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return (
            subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
        )
    except (OSError, subprocess.SubprocessError):
        return None
