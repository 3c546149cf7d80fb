"""Converts trees to JSON and arrays, and back.

The JSON describes the classes in the tree and their fields; arrays are in a separate list, each
with an entry in a table. Nothing is pickled. Decoding fills in dataclasses and named tuples without
calling their functions. It imports only modules of packages that eqx_q's trees consist of; others
must be imported before. It does return named functions (such as an activation), which run when the
loaded tree is used.
"""

import dataclasses
import enum
import functools
import importlib
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .. import spaces
from ..errors import CorruptFileError, UsageError
from ..wrappers.registry import SUITES
from .renames import todays, todays_name

# Packages that a file may import. Suites are included for the classes of their states.
_PACKAGES = {"eqx_q", "equinox", "gymnasium", "jax", "jaxtyping", "numpy", "optax"}
_PACKAGES |= {suite.package for suite in SUITES.values()}

# A space is rebuilt from its constructor's arguments. Its random state is not kept.
_SPACE_ARGUMENTS = {
    "Box": ("low", "high", "shape", "dtype"),
    "Discrete": ("n", "start", "dtype"),
    "MultiBinary": ("n",),
    "MultiDiscrete": ("nvec", "start", "dtype"),
    "Dict": ("spaces",),
    "Tuple": ("spaces",),
}


def encode(tree: PyTree) -> tuple[Any, list[dict[str, Any]], list[np.ndarray]]:
    """**Returns:** JSON, the table of arrays, and the arrays.

    **Raises:** `UsageError` for a part that could not be rebuilt; the message names it.
    """
    encoder = _Encoder()
    return encoder.encode(tree, ""), encoder.table, encoder.arrays


def decode(
    structure: Any, table: Sequence[dict[str, Any]], arrays: Sequence[np.ndarray], source: str
) -> PyTree:
    """The tree that `encode` described; `source` is its name in messages.

    **Raises:** `CorruptFileError` if it is invalid, or names something that eqx_q never saves;
    `UsageError` if a class cannot be imported or now has other fields.
    """
    try:
        return _Decoder(table, arrays, source).decode(structure)
    except UsageError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{source} holds an invalid tree ({error!r})") from error


class _Encoder:
    """Describes a tree as JSON, and collects its arrays."""

    def __init__(self):
        self.table: list[dict[str, Any]] = []
        self.arrays: list[np.ndarray] = []

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
        hashable = type(node) in spaces.KINDS.values()
        if kind in _SPACE_ARGUMENTS and (hashable or type(node) is getattr(gymnasium.spaces, kind)):
            arguments = {name: getattr(node, name) for name in _SPACE_ARGUMENTS[kind]}
            if kind == "Dict":  # it sorts a dict, but keeps the order of pairs
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
        self.table.append(entry)
        self.arrays.append(array)
        return len(self.table) - 1


class _Decoder:
    """Builds the tree that an `_Encoder` described."""

    def __init__(self, table: Sequence[dict[str, Any]], arrays: Sequence[np.ndarray], source: str):
        self._table, self._arrays, self._source = table, arrays, source

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
                return self._array(self._table[index], self._arrays[index])
            case {"dtype": name}:
                return dtype_of(name)
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
        raise CorruptFileError(f"{self._source} holds an unknown node: {list(node)}")

    def _fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {name: self.decode(value) for name, value in fields.items()}

    def _array(self, entry: dict[str, Any], array: np.ndarray) -> Any:
        match entry["kind"]:
            case "numpy":
                return array.copy()  # a writable copy
            case "scalar":
                return array[()]
            case "key":
                return jax.random.wrap_key_data(jnp.array(array), impl=entry["impl"])
        dtype = array.dtype
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise UsageError(
                f"{self._source} holds an array of {dtype}: set JAX_ENABLE_X64=1 to load it"
            )
        value = jnp.array(array)
        if entry["weak_type"]:  # without it, type promotion in a compiled run would differ
            weak = jnp.full(array.shape, dtype.type(0).item())
            value = weak.at[...].set(value) if weak.dtype == dtype else value
        return value

    def _build(self, reference: str, fields: dict[str, Any]) -> Any:
        reference, fields = todays(reference, fields)
        cls = self._class(reference, object)
        names = _field_names(cls)
        if names is None:
            raise CorruptFileError(
                f"{self._source} names '{reference}', which is not a Module, dataclass or named "
                "tuple: do not trust it"
            )
        if set(names) != set(fields):
            gone, new = sorted(set(fields) - set(names)), sorted(set(names) - set(fields))
            raise UsageError(
                f"'{reference}' has changed since {self._source} was saved (fields gone: {gone}, "
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
                f"{self._source} names '{reference}', which is not a class of the right kind: do "
                "not trust it"
            )
        return cls

    def _import(self, reference: str) -> Any:
        reference = todays_name(reference)
        module = reference.partition(":")[0]
        is_known = module.partition(".")[0] in _PACKAGES or module in sys.modules
        if not (is_known or _is_standard_library(reference)):
            raise UsageError(
                f"{self._source} needs '{reference}': import {module} first, if you trust the "
                "author of that file"
            )
        try:
            # Checked before the import, and again in case another module exposes it.
            found = None if _is_standard_library(reference) else _resolve(reference)
            if found is None or _is_standard_library(getattr(found, "__module__", None) or ""):
                raise CorruptFileError(
                    f"{self._source} names '{reference}', which eqx_q never saves: do not trust it"
                )
        except (ImportError, AttributeError) as error:
            mend = (
                "load it from that script, or define it in a module"
                if reference.startswith("__main__:")
                else "install or import the package that defines it, in the version that saved it"
            )
            raise UsageError(
                f"{self._source} needs '{reference}', which was not found ({error}): {mend}"
            ) from error
        if not callable(found):
            raise CorruptFileError(
                f"{self._source} names '{reference}', which is not a function or class: do not "
                "trust it"
            )
        return found


def _field_names(cls: type) -> tuple[str, ...] | None:
    """Fields of a dataclass (such as an `eqx.Module`) or named tuple; `None` for other classes."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return tuple(cls._fields)  # pyright: ignore[reportAttributeAccessIssue]
    return None


def _reference(node: Any, where: str) -> str:
    """`"module:qualname"` of an importable object, with its most public name."""
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
    if module in sys.modules and module != "__main__" and not _is_standard_library(module):
        for alias, value in vars(sys.modules[module]).items():
            if value is node:  # such as a lambda with a name in a library
                return f"{module}:{alias}"
    raise UsageError(
        f"{_place(where)} is '{name or node!r}' of module '{module}', which cannot be imported by "
        "that name: define it at module level with `def` or `class`, not as a lambda or locally"
    )


def _is_standard_library(reference: str) -> bool:
    """Whether it is in the standard library, which trees never need; it has `os:system`."""
    return re.split("[.:]", reference)[0] in sys.stdlib_module_names


def _resolve(reference: str) -> Any:
    module, _, qualname = reference.partition(":")
    found = importlib.import_module(module)
    return functools.reduce(getattr, qualname.split("."), found)


def dtype_of(name: str) -> np.dtype:
    """The data type of a `numpy.dtype.name`."""
    return np.dtype(getattr(jnp, name, name))  # jnp has bfloat16 and similar types


def _place(where: str) -> str:
    return f"'{where.lstrip('.')}'" if where else "the tree itself"
