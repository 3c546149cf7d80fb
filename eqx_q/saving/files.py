"""Atomic writes of files, locks, and checksums."""

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError


def write_whole(path: Path, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
    """Writes a file atomically: `path` is the old file or the new one, never a partial one.

    Creates the directory if it is missing.

    **Raises:** `UsageError` if writing fails (a full disk, no permission); an old file is then
    unchanged, and nothing else is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            move(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error


def move(source: Path, path: Path) -> None:
    """Renames, and syncs to disk, so that a power failure does not undo it."""
    os.replace(source, path)
    with contextlib.suppress(OSError):  # not every file system can sync a directory
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Makes a directory, and locks it against other processes that call this.

    **Raises:** `UsageError` if another process has locked it, or it is not writable.
    """
    path = directory / ".lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise cannot_write(path, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process is using '{directory}': wait for it, or end it"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a checksum to content for JSON."""
    return {**content, "crc32": zlib.crc32(_dump(content))}


def seal(content: Mapping[str, Any]) -> bytes:
    """JSON with a checksum of itself."""
    return _dump(sealed(content))


def unseal(content: Any, *, required: bool = True) -> dict[str, Any]:
    """The sealed content of JSON that was read.

    Raises `ValueError` if it has changed, or lacks a checksum that is `required`.
    """
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    content = dict(content)
    found = content.pop("crc32", None)
    if found is None and required:
        raise ValueError("it has no checksum")
    if found is not None and zlib.crc32(_dump(content)) != found:
        raise ValueError("its checksum is wrong")
    return content


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def cannot_write(path: Path, error: OSError) -> UsageError:
    """The error for any failure to write."""
    return UsageError(
        f"cannot write '{path}' ({error.strerror or error}): free space on that disk or "
        "choose a directory that you can write to"
    )
