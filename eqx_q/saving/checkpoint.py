"""Saves trees in self-describing files, and manages checkpoints of a run.

A file has a magic line, a JSON header (readable with `head -c 2000`), and the bytes of the arrays:

    eqx_q-file 0002 0000012345 <SHA-256 of the header>
    {"versions": …, "payload": {"bytes": …, "sha256": …},
     "arrays": [{"path", "kind", "dtype", "shape", "offset"}, …],
     "tree": …}
    <little-endian arrays, each aligned to 64 bytes; those of zeros alone have no offset, nor bytes>

Nothing is pickled: `tree` is JSON; see `eqx_q.saving.structure` for what loading may execute.
"""

import difflib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from ..errors import CorruptFileError, UsageError
from .files import write_whole
from .hub import AGENT, is_name, locate
from .structure import decode, dtype_of, encode

_FORMAT = 2  # in 1, arrays of zeros had bytes too
_PREAMBLE = re.compile(rb"eqx_q-file ([0-9]{4}) ([0-9]{10}) ([0-9a-f]{64})\n")
_PREAMBLE_SIZE = len("eqx_q-file ") + len("0002 ") + len("0000012345 ") + 64 + len("\n")
_ALIGNMENT = 64
_CHECKPOINT_NAME = re.compile(r"[0-9]{12,}\.ckpt")
_logger = logging.getLogger(__name__)


def save(path: str | os.PathLike, tree: PyTree) -> None:
    """Writes a tree (an agent, a run state) so that `load` needs nothing but the path.

    Leaves may be arrays, PRNG keys, numbers, strings, Gymnasium spaces, and importable functions
    and classes. The write is atomic.

    **Raises:** `UsageError` if a part cannot be saved (the message names it), or if the file cannot
    be written; an old file is then unchanged.
    """
    structure, table, arrays = encode(tree)
    arrays = [np.asarray(x, x.dtype.newbyteorder("<"), order="C") for x in arrays]
    end = 0
    for entry, array in zip(table, arrays, strict=True):
        entry |= {"dtype": array.dtype.name, "shape": array.shape}
        if array.reshape(-1).view(np.uint8).any():
            entry["offset"] = offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = offset + array.nbytes
    digest = hashlib.sha256()
    for chunk in _payload(table, arrays):
        digest.update(chunk)
    versions = {p.__name__: p.__version__ for p in (jax, eqx, np)} | {"eqx_q": _version()}
    head = _head(versions, {"bytes": end, "sha256": digest.hexdigest()}, table, structure)
    write_whole(Path(path), [head, *_payload(table, arrays)])


def load(path: str | os.PathLike) -> PyTree:
    """Reads a file of `save`, bit for bit; JAX arrays stay JAX arrays, NumPy arrays NumPy arrays.

    **Arguments:** `path`: a file, or the name of an agent: `zoo:AGENT/ENV` for an agent that comes
    with eqx_q, `hf:USER/NAME` or `hf:USER/NAME@REVISION` for one on the Hugging Face hub.

    **Raises:** `CorruptFileError` if the file is damaged or not from eqx_q; `UsageError` if it is
    missing, or names a class that cannot be imported or now has other fields.
    """
    path = locate(path) / AGENT if is_name(path) else Path(path)
    header, payload = _read(path)
    try:
        table, structure = header["arrays"], header["tree"]
        arrays = [_view(entry, payload) for entry in table]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"'{path}' has invalid arrays ({error!r})") from error
    return decode(structure, table, arrays, f"'{path}'")


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The header of a file of `save`: versions, arrays, structure."""
    return _read(Path(path))[0]


def save_checkpoint(
    directory: str | os.PathLike, tree: PyTree, step: int, keep: int | None = 2
) -> Path:
    """Writes `directory/<step>.ckpt`, and keeps the newest `keep` good files there; `None`: all.

    **Returns:** the path. **Raises:** as `save` does; `UsageError` if `keep` is not at least 1.
    """
    if not (keep is None or (isinstance(keep, int) and keep >= 1)):
        raise UsageError(f"keep={keep}: give a whole number of checkpoints to keep, 1 or more")
    path = Path(directory) / f"{step:012d}.ckpt"
    save(path, tree)
    for half in path.parent.glob(".[0-9]*.ckpt.tmp"):  # left by a killed process
        half.unlink(missing_ok=True)
    if keep is None:
        return path
    good = 0
    for candidate in checkpoints(path.parent):
        if good >= keep:
            candidate.unlink(missing_ok=True)
        elif candidate == path or _is_good(candidate):
            good += 1
    return path


def load_latest(directory: str | os.PathLike) -> tuple[PyTree, Path]:
    """Loads the newest good checkpoint; skips damaged ones with a warning.

    **Returns:** the tree, and its file.
    **Raises:** `UsageError` if there is no good checkpoint.
    """
    candidates = checkpoints(directory)
    for candidate in candidates:
        try:
            return load(candidate), candidate
        except CorruptFileError as error:
            _logger.warning("%s: trying the previous checkpoint", error)
    if candidates:
        raise CorruptFileError(
            f"all {len(candidates)} checkpoints in '{directory}' are damaged: start a new run"
        )
    raise UsageError(
        f"'{directory}' has no checkpoint, since the run ended before its first: start a new run"
    )


def checkpoints(directory: str | os.PathLike) -> list[Path]:
    """Checkpoints in a directory, newest first; their stems are their steps."""
    found = [p for p in Path(directory).glob("*.ckpt") if _CHECKPOINT_NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.stem), reverse=True)


def newest_checkpoint(directory: str | os.PathLike) -> Path | None:
    """The newest good checkpoint in a directory, or `None`."""
    return next(filter(_is_good, checkpoints(directory)), None)


def _is_good(path: Path) -> bool:
    try:
        _read(path)
    except UsageError:
        return False
    return True


# ---- bytes


def _head(versions: dict[str, str], payload: dict[str, Any], arrays: list, tree: Any) -> bytes:
    """The magic line and the header, padded so that the arrays after it are aligned."""
    rows = ",\n  ".join(json.dumps(entry) for entry in arrays)
    text = (
        f'{{\n "versions": {json.dumps(versions)},\n "payload": {json.dumps(payload)},\n'
        f' "arrays": [\n  {rows}\n ],\n "tree": {json.dumps(tree, indent=1)}\n}}'
    ).encode()
    text += b" " * (-(_PREAMBLE_SIZE + len(text) + 1) % _ALIGNMENT) + b"\n"
    digest = hashlib.sha256(text).hexdigest()
    return b"eqx_q-file %04d %010d %s\n" % (_FORMAT, len(text), digest.encode()) + text


def _payload(table: list[dict[str, Any]], arrays: list[np.ndarray]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of the arrays, and of the gaps between them."""
    position = 0
    for entry, array in zip(table, arrays, strict=True):
        if "offset" in entry:
            yield bytes(entry["offset"] - position)
            yield array.reshape(-1).view(np.uint8).data
            position = entry["offset"] + array.nbytes


def _view(entry: dict[str, Any], payload: memoryview) -> np.ndarray:
    """The array of an entry, as a view of the payload if it has bytes there."""
    dtype, start = dtype_of(entry["dtype"]), entry.get("offset")
    if start is None:
        return np.zeros(entry["shape"], dtype)
    data = payload[start : start + math.prod(entry["shape"]) * dtype.itemsize]
    array = np.frombuffer(data, dtype.newbyteorder("<")).reshape(entry["shape"])
    return array.astype(dtype, copy=False)


def _read(path: Path) -> tuple[dict[str, Any], memoryview]:
    """Reads and checks the header and the bytes of the arrays."""
    try:
        data = memoryview(path.read_bytes())
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings)
        hint = f"did you mean {' or '.join(near)}?" if near else "check the path"
        raise UsageError(f"'{path}' does not exist: {hint}") from None
    except OSError as error:
        raise UsageError(f"cannot read '{path}' ({error.strerror}): give a file") from error

    preamble = _PREAMBLE.match(data[:_PREAMBLE_SIZE])
    if preamble is None:
        raise CorruptFileError(f"'{path}' is not an eqx_q file, or its first line is damaged")
    version, header_size, header_digest = preamble.groups()
    if not 1 <= int(version) <= _FORMAT:
        raise CorruptFileError(
            f"'{path}' has format {int(version)}, but this eqx_q reads formats 1 to {_FORMAT}: "
            "upgrade eqx_q"
        )
    text = data[preamble.end() : preamble.end() + int(header_size)]
    if len(text) < int(header_size):
        raise CorruptFileError(f"'{path}' is truncated: it ends inside its header")
    if hashlib.sha256(text).hexdigest().encode() != header_digest:
        raise CorruptFileError(f"'{path}' is damaged: the checksum of its header is wrong")
    try:
        header = json.loads(bytes(text))
        size, digest = header["payload"]["bytes"], header["payload"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"'{path}' has an invalid header") from error
    payload = data[preamble.end() + len(text) :]
    if len(payload) != size:
        raise CorruptFileError(
            f"'{path}' is truncated or was appended to: {len(payload)} bytes of arrays, not {size}"
        )
    if hashlib.sha256(payload).hexdigest() != digest:
        raise CorruptFileError(f"'{path}' is damaged: the checksum of its arrays is wrong")
    return header, payload


def _version() -> str:
    try:
        return importlib.metadata.version("eqx_q")
    except importlib.metadata.PackageNotFoundError:
        return "source"
