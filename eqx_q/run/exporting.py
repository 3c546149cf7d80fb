"""Exports the agent of a finished run, with a model card."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ..agents import Agent, Population
from ..errors import UsageError
from ..policy import Policy
from ..saving.exporting import export
from .card import table, write_card
from .evaluation import trained_agent
from .settings import Config


def export_run(
    config: Config,
    directory: Path,
    out: Path,
    *,
    member: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda"),
) -> Path:
    """Exports the agent of a finished run, with a model card, `README.md`.

    **Arguments:** `out`: a directory. `member`: the one to export of several seeds; by default all
    as one population.

    **Returns:** the path of the artefact; see `eqx_q.export` for the other files.
    **Raises:** `UsageError` if the run is not finished, or has no such member.
    """
    agent = trained_agent(directory)
    if member is not None:
        agent = member_of(agent, member)
    path = export(out, agent, platforms=platforms)
    policy = Policy(path)
    exported_with = f"jax {jax.__version__}, for {', '.join(policy.platforms)}"
    write_card(
        out,
        config,
        directory,
        agent,
        member,
        opening="An exported agent of eqx_q. It needs only JAX and NumPy.",
        usage=_usage(agent, policy),
        facts={"exported with": exported_with},
    )
    return path


def member_of(agent: Agent, member: int) -> Agent:
    """A member of a population; an agent itself is its member 0.

    **Raises:** `UsageError` if there is no such member.
    """
    members = agent.num_members or 1
    if not 0 <= member < members:
        raise UsageError(f"member={member}: choose one of this run's members 0 to {members - 1}")
    return agent.member(member) if isinstance(agent, Population) else agent


def _usage(agent: Agent, policy: Policy) -> str:
    """Example code and a table of the inputs."""
    inputs = {name: kind for name, kind in policy.inputs.items() if name != "memory"}
    inputs |= {f"memory[{i}]": kind for i, kind in enumerate(policy.inputs["memory"])}
    return f"""In this directory, or with it on `sys.path`:

```python
{_example(agent, policy)}```

`policy.py` documents all arguments. `n` is any number of lanes.

{table(("input", "shape", "type"), _kinds(inputs))}"""


def _example(agent: Agent, policy: Policy) -> str:
    """Example code that acts a few times."""
    lanes = 2 * (agent.num_members or 1)
    obs = _zeros(policy.inputs["obs"], lanes)
    act = """decision = policy.act(obs)  # greedy
decision = policy.act(obs, epsilon=0.05, key=jax.random.key(0))
"""
    if policy.inputs["memory"]:
        act = f"""decision = policy.act(obs)  # greedy, at the start of an episode in every lane
first = np.zeros({lanes}, bool)  # lanes in which an episode starts
decision = policy.act(obs, decision.memory, first=first)
"""
    return f"""import jax
import numpy as np
from policy import Policy

policy = Policy("agent.jaxexport")
obs = {obs}  # {lanes} lanes
{act}print(decision.action, decision.value)
"""


def _zeros(kind: Any, lanes: int) -> str:
    """Code that makes arrays of a kind, in its dicts and tuples."""
    if isinstance(kind, dict):
        entries = (f'"{name}": {_zeros(child, lanes)}' for name, child in kind.items())
        return f"{{{', '.join(entries)}}}"
    if isinstance(kind, tuple):
        return f"({''.join(f'{_zeros(child, lanes)}, ' for child in kind)})"
    return f"np.zeros({(lanes, *map(int, kind.shape[1:]))}, np.{kind.dtype})"


def _kinds(inputs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (f"`{name}`", f"`[{', '.join(map(str, kind.shape))}]`", str(kind.dtype))
        for name, kind in _flat("", inputs)
    ]


def _flat(path: str, kinds: Any) -> Iterator[tuple[str, Any]]:
    """Yields the arrays of dicts and tuples with their paths."""
    if isinstance(kinds, dict | tuple):
        entries = kinds.items() if isinstance(kinds, dict) else enumerate(kinds)
        for name, child in entries:
            yield from _flat(f"{path}.{name}".lstrip("."), child)
    else:
        yield path, kinds
