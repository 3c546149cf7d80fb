"""The summary of a run, and its provenance."""

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
    """Writes indented JSON with a checksum of itself; non-finite numbers become `null`."""
    write_whole(path, [seal(_finite(value))])


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file of `write_json`, or of an earlier version without a checksum.

    **Raises:** `CorruptFileError` if it is damaged, `OSError` if it cannot be read.
    """
    try:
        return unseal(json.loads(path.read_bytes()), required=False)
    except ValueError as error:
        raise CorruptFileError(
            f"'{path}' is damaged or was edited ({error}): write it again, or delete it"
        ) from error


def finished(directory: Path) -> dict[str, Any] | None:
    """The summary of a run that is finished and has its agent, else `None`."""
    try:
        summary = read_json(directory / "summary.json")
    except CorruptFileError as error:
        logger.warning("%s; the run counts as unfinished, and a resume writes its end again", error)
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
    """Means per member of episode lengths and the suite's metrics."""
    values = {"length": played.lengths, **played.metrics}
    return {name: np.atleast_2d(x).mean(1).tolist() for name, x in values.items()}


def provenance() -> dict[str, Any]:
    """The device, the versions of relevant packages that are installed, and eqx_q's commit."""
    versions = {"python": platform.python_version()}
    for package in ("eqx_q", "jax", "jaxlib", "equinox", "optax", "numpy", *_SUITE_PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    device = jax.devices()[0].device_kind
    return {"device": device, "versions": versions, "commit": _commit()}


def _commit() -> str | None:
    """The commit of this checkout, with `-dirty` if files differ; `None` outside a checkout."""
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
