"""Exports the agent of a finished run, with a model card."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ..agents import Agent, Population
from ..errors import UsageError
from ..policy import Policy
from ..saving.exporting import export
from ..saving.files import write_whole
from ..wrappers.registry import SUITES
from .evaluation import trained_agent
from .making import learnt
from .parts import chosen_options
from .settings import Config, env_name, given, in_use
from .summary import read_json


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
    members = agent.num_members or 1
    if member is not None and not 0 <= member < members:
        raise UsageError(f"member={member}: choose one of this run's members 0 to {members - 1}")
    if isinstance(agent, Population) and member is not None:
        agent = agent.member(member)
    path = export(out, agent, platforms=platforms)
    card = _card(config, directory, agent, Policy(path), member)
    write_whole(out / "README.md", [card.encode()])
    return path


def _card(config: Config, directory: Path, agent: Agent, policy: Policy, member: int | None) -> str:
    """The model card: scores, inputs, usage, configuration and versions."""
    summary = _read(directory / "summary.json")
    ((unit, amount),) = learnt(agent).items()
    stopped = ", then training was stopped" if summary.get("status") == "stopped" else ""
    of_all = f", member {member} of {config['num_seeds']}" if member is not None else ""
    if agent.num_members:
        of_all = f", {agent.num_members} seeds as one population: lanes go member by member"
    facts = {
        "agent": f"`{config['agent']['_target_']}`{of_all}",
        "environment": f"`{env_name(config)}`",
        "environment options": f"`{_json(given(config['env']))}`",
        "learnt from": f"{amount:,} {unit.replace('_', ' ')}{stopped}",
        "data": _of_data(summary.get("data")),
        "seed": config["seed"],
        "trained on": summary.get("device"),
        "trained with": _versions(config, summary),
        "commit": summary.get("commit"),
        "exported with": f"jax {jax.__version__}, for {', '.join(policy.platforms)}",
    }
    inputs = {name: kind for name, kind in policy.inputs.items() if name != "memory"}
    inputs |= {f"memory[{i}]": kind for i, kind in enumerate(policy.inputs["memory"])}
    used = in_use(config) | {"agent": chosen_options(given(config["agent"]))}
    return f"""# {config["agent"]["_target_"].split(".")[-1]} in {env_name(config)}

An exported agent of eqx_q. It needs only JAX and NumPy.

{_table(("", ""), [(name, fact) for name, fact in facts.items() if fact not in (None, "")])}
## Scores

{_table(("return", "mean", "per seed"), _scores(config, directory, learnt(agent), member))}
## Use

In this directory, or with it on `sys.path`:

```python
{_example(agent, policy)}```

`policy.py` documents all arguments. `n` is any number of lanes.

{_table(("input", "shape", "type"), _kinds(inputs))}
## Configuration

```json
{_json(used, indent=1)}
```
"""


def _of_data(data: Any) -> str | None:
    """A summary's description of a data set; earlier versions have only its path."""
    if not isinstance(data, Mapping):
        return data and f"`{data}`"
    source = f", from `{_json(data['source'])}`" if data["source"] else ""
    return (
        f"{data['transitions']:,} transitions in {data['episodes']:,} episodes of "
        f"`{data['env']}`{source}, checksum `{data['checksum']}`"
    )


def _json(value: Any, indent: int | None = None) -> str:
    """JSON with non-finite numbers as strings."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: finite(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [finite(part) for part in value]
        is_number = isinstance(value, float)
        return str(value) if is_number and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)


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


def _scores(
    config: Config, directory: Path, amount: Mapping[str, int], member: int | None
) -> list[tuple[str, str, str]]:
    """Rows of scores from training and later evaluations of an agent that has learnt `amount`."""
    epsilon = given(config.get("eval", {})).get("epsilon", 0.0)
    how = f"with ε = {epsilon}" if epsilon else "greedy"
    names = {
        "eval_return_per_seed": f"at the end of training, {how}",
        "best_eval_return_per_seed": f"best during training, {how}",
        "train_return_per_seed": "in training, with exploration",
    }
    summary = _read(directory / "summary.json")
    results = [(name, summary, key) for key, name in names.items()]
    for path in sorted(directory.glob("evaluation_*.json")):
        result = _read(path)
        name = f"{result['protocol']}: {result['episodes']} episodes, ε = {result['epsilon']}"
        results.append((name, result, "return_per_seed"))
    rows = []
    for name, result, key in results:
        values = result.get(key) or []
        if member is not None:
            values = values[member : member + 1]
        known = [x for x in values if x is not None]
        # Skips evaluations from before a resume.
        if known and amount.items() <= result.items():
            each = ", ".join("–" if x is None else f"{x:.4g}" for x in values)
            rows.append((name, f"{sum(known) / len(known):.4g}", each))
    return rows


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


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _versions(config: Config, summary: Mapping[str, Any]) -> str:
    """Versions of the packages of the agent and its environment."""
    packages = ("eqx_q", "python", "jax", "equinox", SUITES[config["env"]["suite"]].package)
    versions = summary.get("versions", {})
    return ", ".join(f"{name} {versions[name]}" for name in packages if name in versions)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
