"""Exports agents as standalone programs, which act without eqx_q."""

import contextlib
import importlib.metadata
import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jax import export as jax_export

from .. import policy, spaces
from ..agents import Agent
from ..errors import MissingExtraError, UsageError
from .files import write_whole

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # JAX accepts any word as a platform


def export(
    directory: str | os.PathLike, agent: Agent, *, platforms: Sequence[str] = ("cpu", "cuda")
) -> Path:
    """Exports `agent` so that it acts with only JAX and NumPy installed.

    Writes to `directory`: `agent.jaxexport`, serialised by `jax.export` (StableHLO with the
    parameters) for any number of lanes; `policy.py`, whose `Policy` calls it with the arguments of
    `Agent.act`, greedily unless given an ε; and `flatbuffers.zip`, which JAX needs to read it. JAX
    reads exports that are at most six months older than itself.

    **Arguments:** `platforms`: JAX's names; one file serves all of them.

    **Returns:** the path of `agent.jaxexport`.
    **Raises:** `UsageError` if the agent cannot be compiled for any number of lanes, or the files
    cannot be written; `MissingExtraError` without the package `flatbuffers`.
    """
    for platform in platforms:
        if platform not in _PLATFORMS:
            known = ", ".join(_PLATFORMS)
            raise UsageError(f"unknown platform '{platform}': known are {known}")
    try:
        reader = _packed("flatbuffers")
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError("flatbuffers", "train") from None
    act = jax_export.export(jax.jit(_act(agent)), platforms=list(platforms))
    try:
        with _unchecked():
            exported = act(_inputs(agent))
    except (jax.errors.InconclusiveDimensionOperation, TypeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise UsageError(
            f"the agent cannot be exported for any number of lanes ({reason}): do not use the "
            "number of lanes as a Python number in its network"
        ) from error
    path = Path(directory) / policy.FILE
    write_whole(path, [exported.serialize()])
    write_whole(path.with_name("policy.py"), [Path(policy.__file__).read_bytes()])
    write_whole(path.with_name(policy.READER), [reader])
    return path


def _inputs(agent: Agent) -> dict[str, Any]:
    """Shapes and types of the inputs of `act`, for `n` lanes (in a population, per member)."""
    members = () if agent.num_members is None else (agent.num_members,)
    team = () if agent.num_agents is None else (agent.num_agents,)
    (lanes,) = jax_export.symbolic_shape("n")
    lanes = lanes * (agent.num_members or 1)

    def of_lanes(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((lanes, *shape), jax.dtypes.canonicalize_dtype(dtype))

    return {
        "obs": spaces.shapes(agent.observation_space, lanes, *team),
        "memory": [of_lanes(shape, dtype) for shape, dtype in _memory(agent)],
        "first": of_lanes((), bool),
        "action_mask": of_lanes((*team, agent.num_choices), bool),
        "reward": of_lanes(team, np.float32),
        "epsilon": jax.ShapeDtypeStruct(members, np.float32),
        # As numbers, since a new process can read key types only after it has made a key.
        "key": jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))),
    }


def _memory(agent: Agent) -> list[tuple[tuple[int, ...], Any]]:
    """Shape and type of each array of memory in one lane; rows of agents are the first axis."""
    lanes = agent.num_members or 1
    leaves = jax.tree.leaves(jax.eval_shape(lambda: agent.initial_memory(lanes)))
    return [((x.shape[0] // lanes, *x.shape[1:]), x.dtype) for x in leaves]


def _act(agent: Agent) -> Any:
    """`agent.act` on a dictionary, with memory as a list, so that no eqx_q classes are needed."""
    structure = jax.tree.structure(agent.initial_memory(agent.num_members or 1))

    def act(inputs: dict[str, Any]) -> dict[str, Any]:
        rows = [x.reshape(-1, *x.shape[2:]) for x in inputs["memory"]]
        memory = jax.tree.unflatten(structure, rows)
        key = jax.random.wrap_key_data(inputs["key"])
        decision = agent.act(**inputs | {"memory": memory, "key": key})
        memory = [
            jnp.reshape(new, old.shape)
            for new, old in zip(jax.tree.leaves(decision.memory), inputs["memory"], strict=True)
        ]
        return {"action": decision.action, "value": decision.value, "memory": memory}

    return act


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Disables runtime checks of annotations, which do not accept symbolic sizes."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def _packed(package: str) -> bytes:
    """An installed package of Python files as an importable zip, with its METADATA."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in importlib.metadata.files(package) or []:
            if file.suffix == ".py" or file.name == "METADATA":
                archive.writestr(zipfile.ZipInfo(str(file)), file.read_text())
    return buffer.getvalue()
