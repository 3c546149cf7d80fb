"""Provenance of benchmark results: command, versions, machine, commit, date."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from eqx_q.run.parts import full_overrides
from eqx_q.wrappers.registry import SUITES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_CURVE = 20  # a longer list is a curve
LOAD = os.getloadavg()[0]  # before the benchmark adds its own


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result with its provenance as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json({**provenance(), **result}))
    print(f"wrote {path}", flush=True)


def as_json(result: Any) -> str:
    """JSON with one line per list; numbers of long lists (curves) have five digits."""
    return _lines(_rounded(result)) + "\n"


def _lines(part: Any, indent: str = "") -> str:
    inner = f"\n{indent} "
    if isinstance(part, dict) and part:
        rows = [
            f"{json.dumps(str(name))}: {_lines(value, inner[1:])}" for name, value in part.items()
        ]
        return f"{{{inner}{f',{inner}'.join(rows)}\n{indent}}}"
    if isinstance(part, list) and any(isinstance(value, dict) for value in part):
        return f"[{inner}{f',{inner}'.join(_lines(x, inner[1:]) for x in part)}\n{indent}]"
    return json.dumps(part, separators=(",", ": "))


def _rounded(part: Any, in_curve: bool = False) -> Any:
    if isinstance(part, dict):
        return {name: _rounded(value) for name, value in part.items()}
    if isinstance(part, list):
        return [_rounded(value, in_curve or len(part) > _CURVE) for value in part]
    return float(f"{part:.5g}") if in_curve and isinstance(part, float) else part


def provenance() -> dict[str, Any]:
    """The provenance of a result. Paths in the command are shortened to their last part."""
    command = " ".join(re.sub(r"[^\s=]*/(?=[^/\s])", "", word) for word in sys.argv[1:])
    versions = {"python": platform.python_version()}
    suites = [suite.package for suite in SUITES.values()]
    for package in ("jax", "jaxlib", "equinox", "optax", "numpy", *suites, "mpe2"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {command}".strip(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit(ROOT),
        "machine": machine(),
        "versions": versions,
    }


def commit(checkout: Path) -> str | None:
    """The commit of a checkout; `None` outside of git.

    With `-dirty` if files differ, other than results, which benchmarks write.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    what = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return f"{what}-dirty" if changed else what or None


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and the machine's load in the last minute."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load": round(LOAD, 2),
    }


def compose(overrides: list[str]) -> dict[str, Any]:
    """The configuration that `scripts/train.py` would run with these overrides."""
    overrides = [full for override in overrides for full in full_overrides(override)]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("config", overrides), resolve=True)  # pyright: ignore
