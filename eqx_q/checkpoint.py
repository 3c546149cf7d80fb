"""Any tree of ours in one self-describing file, and checkpoints of a run.

A file is a line of magic, a JSON header that `head -c 2000` shows, and the arrays' bytes:

    eqx_q-file 0001 0000012345 <SHA-256 of the header>
    {"versions": …, "payload": {"bytes": …, "sha256": …},
     "arrays": [{"path", "kind", "dtype", "shape", "offset"}, …],
     "tree": …}
    <little-endian arrays, each aligned to 64 bytes>

`tree` describes the structure: which classes, with which fields, and which entry of `arrays`
stands where. Nothing is pickled. Loading imports the modules that the header names and fills in
their dataclasses and named tuples without calling any function of theirs. It does give back the
functions that the header names (an activation, say), so load agents of people you trust.
"""

import dataclasses
import difflib
import enum
import functools
import hashlib
import importlib
import importlib.metadata
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from . import spaces
from .errors import CorruptFileError, UsageError
from .files import write_whole

_FORMAT = 1
_PREAMBLE = re.compile(rb"eqx_q-file ([0-9]{4}) ([0-9]{10}) ([0-9a-f]{64})\n")
_PREAMBLE_SIZE = len("eqx_q-file ") + len("0001 ") + len("0000012345 ") + 64 + len("\n")
_ALIGNMENT = 64
_CHECKPOINT_NAME = re.compile(r"[0-9]{12,}\.ckpt")
_logger = logging.getLogger(__name__)

# A space is built anew from what its constructor takes. Its random state is not kept.
_SPACE_ARGUMENTS = {
    "Box": ("low", "high", "shape", "dtype"),
    "Discrete": ("n", "start", "dtype"),
    "MultiBinary": ("n",),
    "MultiDiscrete": ("nvec", "start", "dtype"),
    "Dict": ("spaces",),
    "Tuple": ("spaces",),
}


def save(path: str | os.PathLike, tree: PyTree) -> None:
    """Writes a tree (an agent, a run state) so that `load` needs nothing but the path.

    Leaves may be arrays, PRNG keys, numbers, strings, Gymnasium spaces, and functions and classes
    that can be imported. The file appears whole or not at all.

    **Raises:** `UsageError` where a part cannot be saved (it names the part), or where the file
    cannot be written; a file that stood there before is then unchanged.
    """
    path = Path(path)
    encoder = _Encoder()
    structure = encoder.encode(tree, "")
    digest = hashlib.sha256()
    for chunk in encoder.payload():
        digest.update(chunk)
    head = _head(
        {p.__name__: p.__version__ for p in (jax, eqx, np)} | {"eqx_q": _version()},
        {"bytes": encoder.size, "sha256": digest.hexdigest()},
        encoder.table,
        structure,
    )
    write_whole(path, [head, *encoder.payload()])


def load(path: str | os.PathLike) -> PyTree:
    """Reads what `save` wrote, bit for bit; JAX arrays come back as such, NumPy's as NumPy's.

    **Raises:** `CorruptFileError` where the file is damaged or not ours; `UsageError` where it is
    missing, or names a class that cannot be imported or has other fields by now.
    """
    path = Path(path)
    header, payload = _read(path)
    try:
        return _Decoder(path, header["arrays"], payload).decode(header["tree"])
    except UsageError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"'{path}' holds a tree that makes no sense ({error!r})") from error


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The header of a file that `save` wrote: versions, arrays, structure."""
    return _read(Path(path))[0]


def save_checkpoint(directory: str | os.PathLike, tree: PyTree, step: int, keep: int = 2) -> Path:
    """Writes `directory/<step>.ckpt`; of the files there, the newest `keep` good ones stay.

    **Returns:** the path. **Raises:** as `save` does.
    """
    path = Path(directory) / f"{step:012d}.ckpt"
    save(path, tree)
    good = 0
    for candidate in _checkpoints(path.parent):
        if good >= keep:
            candidate.unlink(missing_ok=True)
        elif candidate == path or _is_good(candidate):
            good += 1
    return path


def load_latest(directory: str | os.PathLike) -> tuple[PyTree, Path]:
    """Loads the newest good checkpoint; damaged ones are passed over with a warning.

    **Returns:** the tree, and the file it came from.
    **Raises:** `UsageError` where there is no checkpoint, or none that is good.
    """
    candidates = _checkpoints(Path(directory))
    for candidate in candidates:
        try:
            return load(candidate), candidate
        except CorruptFileError as error:
            _logger.warning("%s: trying the checkpoint before it", error)
    if candidates:
        raise CorruptFileError(
            f"all {len(candidates)} checkpoints in '{directory}' are damaged: start the run anew"
        )
    raise UsageError(f"there is no checkpoint in '{directory}': give the directory of a run")


def _checkpoints(directory: Path) -> list[Path]:
    """Checkpoints in a directory, the newest first."""
    found = [p for p in directory.glob("*.ckpt") if _CHECKPOINT_NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.stem), reverse=True)


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


def _read(path: Path) -> tuple[dict[str, Any], memoryview]:
    """The header and the bytes of the arrays, both checked."""
    try:
        data = memoryview(path.read_bytes())
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings)
        hint = f"did you mean {' or '.join(near)}?" if near else "check the path"
        raise UsageError(f"there is no file '{path}': {hint}") from None
    except OSError as error:
        raise UsageError(f"cannot read '{path}' ({error.strerror}): give a file") from error

    preamble = _PREAMBLE.match(data[:_PREAMBLE_SIZE])
    if preamble is None:
        raise CorruptFileError(f"'{path}' is not a file of eqx_q, or its first line is damaged")
    version, header_size, header_digest = preamble.groups()
    if int(version) != _FORMAT:
        raise CorruptFileError(
            f"'{path}' has format {int(version)}, and this eqx_q reads format {_FORMAT}: "
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
        raise CorruptFileError(f"'{path}' has a header that makes no sense") from error
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


# ---- structure


class _Encoder:
    """Describes a tree as JSON, and collects its arrays."""

    def __init__(self):
        self.table: list[dict[str, Any]] = []
        self.size = 0
        self._arrays: list[np.ndarray] = []

    def payload(self) -> Iterator[memoryview | bytes]:
        """The bytes of the arrays, with the gaps between them."""
        position = 0
        for entry, array in zip(self.table, self._arrays, strict=True):
            yield bytes(entry["offset"] - position)
            yield array.reshape(-1).view(np.uint8).data
            position = entry["offset"] + array.nbytes

    def encode(self, node: Any, where: str) -> Any:
        """The JSON description of a node; `where` is its path, for messages."""
        if node is None or type(node) in (bool, int, str):
            return node
        if type(node) is float:
            return node if math.isfinite(node) else {"float": repr(node)}
        if type(node) is list:
            return [self.encode(child, f"{where}[{i}]") for i, child in enumerate(node)]
        if type(node) is tuple:
            return {"tuple": [self.encode(child, f"{where}[{i}]") for i, child in enumerate(node)]}
        if type(node) is dict:
            pairs = ((self.encode(k, where), k, v) for k, v in node.items())
            return {"dict": [[k, self.encode(v, f"{where}[{name!r}]")] for k, name, v in pairs]}
        if isinstance(node, jax.Array | np.ndarray | np.generic):
            return {"array": self._array(node, where)}
        if isinstance(node, np.dtype):
            return {"dtype": node.name}
        kind = type(node).__name__
        hashable = type(node) in (spaces.Box, spaces.Discrete)
        if kind in _SPACE_ARGUMENTS and (hashable or type(node) is getattr(gymnasium.spaces, kind)):
            arguments = {name: getattr(node, name) for name in _SPACE_ARGUMENTS[kind]}
            if kind == "Dict":  # which sorts a dict, and keeps the order of pairs
                arguments = {"spaces": list(node.spaces.items())}
            arguments = self._fields(arguments, where)
            return {"space": kind, "hashable": hashable, "arguments": arguments}
        if isinstance(node, enum.Enum):
            return {"enum": _reference(type(node), where), "name": node.name}
        if isinstance(node, functools.partial):
            parts = {"func": node.func, "args": node.args, "keywords": node.keywords}
            name = "jax_partial" if isinstance(node, jax.tree_util.Partial) else "partial"
            return {name: self._fields(parts, where)}
        if hasattr(node, "__qualname__") or isinstance(node, jnp.ufunc | np.ufunc):
            return {"import": _reference(node, where)}
        names = _field_names(type(node))
        if names is not None:
            fields = {name: getattr(node, name) for name in names}
            return {"type": _reference(type(node), where), "fields": self._fields(fields, where)}
        raise UsageError(
            f"{_place(where)} is of type '{kind}', which cannot be saved: keep "
            "arrays, numbers, strings, importable functions, dataclasses and Modules in it"
        )

    def _fields(self, fields: dict[str, Any], where: str) -> dict[str, Any]:
        return {name: self.encode(value, f"{where}.{name}") for name, value in fields.items()}

    def _array(self, node: jax.Array | np.ndarray | np.generic, where: str) -> int:
        entry: dict[str, Any] = {"path": where}
        if isinstance(node, jax.Array) and jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
            entry |= {"kind": "key", "impl": str(jax.random.key_impl(node))}
            node = jax.random.key_data(node)
        elif isinstance(node, jax.Array):
            entry |= {"kind": "jax", "weak_type": jax.typeof(node).weak_type}
        else:
            entry["kind"] = "numpy" if isinstance(node, np.ndarray) else "scalar"
        array = np.asarray(node)
        if array.dtype != bool and not jnp.issubdtype(array.dtype, np.number):
            raise UsageError(
                f"{_place(where)} is an array of {array.dtype}, which cannot be saved: keep "
                "numbers or booleans in it"
            )
        array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        offset = -(-self.size // _ALIGNMENT) * _ALIGNMENT
        entry |= {"dtype": array.dtype.name, "shape": list(array.shape), "offset": offset}
        self.size = offset + array.nbytes
        self.table.append(entry)
        self._arrays.append(array)
        return len(self.table) - 1


class _Decoder:
    """Builds the tree that an `_Encoder` described."""

    def __init__(self, path: Path, table: list[dict[str, Any]], payload: memoryview):
        self._path, self._table, self._payload = path, table, payload

    def decode(self, node: Any) -> Any:
        """The value of a node."""
        if isinstance(node, list):
            return [self.decode(child) for child in node]
        if not isinstance(node, dict):
            return node
        match node:
            case {"float": text}:
                return float(text)
            case {"tuple": children}:
                return tuple(self.decode(children))
            case {"dict": pairs}:
                return {self.decode(key): self.decode(value) for key, value in pairs}
            case {"array": index}:
                return self._array(self._table[index])
            case {"dtype": name}:
                return _dtype(name)
            case {"space": kind, "hashable": hashable, "arguments": arguments} if (
                kind in _SPACE_ARGUMENTS
            ):
                space = getattr(gymnasium.spaces, kind)(**self._fields(arguments))
                return getattr(spaces, kind)(space) if hashable else space
            case {"enum": reference, "name": name}:
                return self._class(reference, enum.Enum)[name]
            case {"partial": parts}:
                parts = self._fields(parts)
                return functools.partial(parts["func"], *parts["args"], **parts["keywords"])
            case {"jax_partial": parts}:
                parts = self._fields(parts)
                return jax.tree_util.Partial(parts["func"], *parts["args"], **parts["keywords"])
            case {"import": reference}:
                return self._import(reference)
            case {"type": reference, "fields": fields}:
                return self._build(reference, self._fields(fields))
        raise CorruptFileError(f"'{self._path}' holds a node that is unknown here: {list(node)}")

    def _fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {name: self.decode(value) for name, value in fields.items()}

    def _array(self, entry: dict[str, Any]) -> Any:
        dtype, shape = _dtype(entry["dtype"]), entry["shape"]
        end = entry["offset"] + math.prod(shape) * dtype.itemsize
        array = np.frombuffer(self._payload[entry["offset"] : end], dtype.newbyteorder("<"))
        array = array.reshape(shape)
        match entry["kind"]:
            case "numpy":
                return array.astype(dtype)  # a copy, which can be written to
            case "scalar":
                return dtype.type(array[()])
            case "key":
                return jax.random.wrap_key_data(jnp.array(array), impl=entry["impl"])
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise UsageError(
                f"'{self._path}' holds an array of {dtype}: set JAX_ENABLE_X64=1 to load it"
            )
        value = jnp.array(array)
        if entry["weak_type"]:  # else Python's promotion, and so a compiled run, would differ
            weak = jnp.full(shape, dtype.type(0).item())
            value = weak.at[...].set(value) if weak.dtype == dtype else value
        return value

    def _build(self, reference: str, fields: dict[str, Any]) -> Any:
        cls = self._class(reference, object)
        names = _field_names(cls)
        if names is None:
            raise CorruptFileError(
                f"'{self._path}' wants to build '{reference}', which is no Module, dataclass or "
                "named tuple: do not trust this file"
            )
        if set(names) != set(fields):
            gone, new = sorted(set(fields) - set(names)), sorted(set(names) - set(fields))
            raise UsageError(
                f"'{reference}' has changed since '{self._path}' was saved (fields gone: {gone}, "
                f"new: {new}): load it with the version that saved it"
            )
        if issubclass(cls, tuple):
            return tuple.__new__(cls, [fields[name] for name in names])
        node = object.__new__(cls)
        for name, value in fields.items():
            object.__setattr__(node, name, value)
        return node

    def _class(self, reference: str, base: type) -> Any:
        cls = self._import(reference)
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise CorruptFileError(
                f"'{self._path}' names '{reference}' as a class, which it is not: do not trust it"
            )
        return cls

    def _import(self, reference: str) -> Any:
        if _is_standard_library(reference):
            raise CorruptFileError(
                f"'{self._path}' names '{reference}', which no file of ours does: do not trust it"
            )
        try:
            found = _resolve(reference)
        except (ImportError, AttributeError) as error:
            mend = (
                "load it from that script, or define it in a module"
                if reference.startswith("__main__:")
                else "install or import the package that defines it, in the version that saved it"
            )
            raise UsageError(
                f"'{self._path}' needs '{reference}', which is not there ({error}): {mend}"
            ) from error
        if not callable(found):
            raise CorruptFileError(
                f"'{self._path}' names '{reference}', which is no function or class: "
                "do not trust this file"
            )
        return found


def _field_names(cls: type) -> tuple[str, ...] | None:
    """Fields of a dataclass (an `eqx.Module` is one) or a named tuple; `None` for the rest."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return tuple(cls._fields)  # pyright: ignore[reportAttributeAccessIssue]
    return None


def _reference(node: Any, where: str) -> str:
    """`"module:qualname"`, by the most public name there is, of what can be imported."""
    module = getattr(node, "__module__", None) or ""
    name = getattr(node, "__qualname__", None) or getattr(node, "__name__", "")
    public = module.split("._")[0]  # `optax._src.transform` -> `optax`
    for candidate in (public, "jax.nn", "jax.numpy", "jax.lax", module):
        try:
            reference = f"{candidate}:{name}"
            if not _is_standard_library(reference) and _resolve(reference) is node:
                return reference
        except (ImportError, AttributeError, ValueError):
            continue
    raise UsageError(
        f"{_place(where)} is '{name or node!r}' of module '{module}', which cannot be imported by "
        "that name: define it at module level with `def` or `class` (no lambda, nothing local)"
    )


def _is_standard_library(reference: str) -> bool:
    """No tree has business there, and `os:system` is one of its functions."""
    return re.split("[.:]", reference)[0] in sys.stdlib_module_names


def _resolve(reference: str) -> Any:
    module, _, qualname = reference.partition(":")
    found = importlib.import_module(module)
    return functools.reduce(getattr, qualname.split("."), found)


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(jnp, name, name))  # jnp knows bfloat16 and its kin


def _place(where: str) -> str:
    return f"'{where.lstrip('.')}'" if where else "the tree itself"
