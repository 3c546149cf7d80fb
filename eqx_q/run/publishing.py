"""Publishes the agent of a finished run, for others to use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..agents import Agent
from ..agents.acting import QAgent
from ..errors import UsageError
from ..saving.checkpoint import save
from ..saving.hub import AGENT, name_of
from ..wrappers.registry import SUITES
from .card import later_evaluations, read_summary, write_card
from .evaluation import trained_agent
from .exporting import member_of
from .settings import Config, env_name, given, without_paths
from .summary import write_json

_PRIVATE = {"resume", "distributed", "tracker"}  # keys of a configuration
_OMITTED = {"returns", "return_mean", "device", "versions", "commit"}  # keys of an evaluation


def publish_run(
    config: Config,
    directory: Path,
    out: Path,
    *,
    member: int | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Writes one agent of a finished run, its summary and a model card to a directory.

    The agent has a fresh optimiser state, which keeps the file small. Paths and addresses of the
    machine are left out.

    **Arguments:** `out`: the directory. `member`: the one to publish of several seeds; by default
    the best in the last evaluation. `name`: the name to load it by, for the card.

    **Returns:** the configuration to store in `out`.
    **Raises:** `UsageError` if the run is not finished, has no such member, or `out` holds a run.
    """
    if (out / "metrics.jsonl").exists() or (out / "checkpoints").exists():
        raise UsageError(f"'{out}' holds a run: choose another directory with out=DIR")
    summary = read_summary(directory)
    agent, seed = one_of(trained_agent(directory), summary, member)
    is_best = seed is not None and member is None
    if isinstance(agent, QAgent):
        agent = agent.with_fresh_optimizer()
    config = without_paths({k: v for k, v in config.items() if k not in _PRIVATE})
    evaluations = [
        _of_member({k: v for k, v in result.items() if k not in _OMITTED}, seed)
        for result in later_evaluations(directory, agent)
    ]
    told = {"agent": config["agent"]["_target_"], "env": env_name(config)}
    told |= without_paths(_of_member(summary, seed)) | {"evaluations": evaluations}
    if seed is not None:
        (mean,) = told.get("eval_return_per_seed") or [None]
        told |= {"member": seed, "eval_return_mean": mean}
    save(out / AGENT, agent)
    write_json(out / "summary.json", told)
    write_card(
        out,
        config,
        directory,
        agent,
        seed,
        opening="A trained agent of eqx_q. Its optimiser state is fresh.",
        usage=_usage(config, name or name_of(out)),
        facts={"chosen as": "the best member in the last evaluation"} if is_best else {},
    )
    return dict(config)


def one_of(
    agent: Agent, summary: Mapping[str, Any], member: int | None
) -> tuple[Agent, int | None]:
    """One agent of a run.

    **Arguments:** `member`: of a population; by default the best in the last evaluation.

    **Returns:** the agent, and which member of a population it is.
    **Raises:** `UsageError` if there is no such member, or none was evaluated.
    """
    if agent.num_members is None:
        return member_of(agent, member or 0), None
    if member is None:
        returns = enumerate(summary.get("eval_return_per_seed") or [])
        known = {index: value for index, value in returns if value is not None}
        if not known:
            raise UsageError("this run has no evaluations: choose a member with member=0")
        member = max(known, key=known.__getitem__)
    return member_of(agent, member), member


def _of_member(results: Mapping[str, Any], member: int | None) -> dict[str, Any]:
    """A summary or an evaluation, reduced to one member."""
    if member is None:
        return dict(results)

    def reduced(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: reduced(part) for name, part in value.items()}
        return value[member : member + 1] if isinstance(value, list) else value

    return {
        name: reduced(value) if name.endswith("per_seed") or name == "transitions" else value
        for name, value in results.items()
    }


def _usage(config: Config, name: str | None) -> str:
    """Example code that loads and evaluates the agent."""
    env = given(config["env"]) | given(config["protocol"])
    suite = SUITES[env.pop("suite")]
    del env["name"]
    options = "".join(f", {option}={value!r}" for option, value in env.items())
    extras = [suite.extra, "hub" if name and name.startswith("hf:") else None]
    package = f"eqx_q[{','.join(filter(None, extras))}]".removesuffix("[]")
    return f"""{"With" if name else "In this directory, with"} `pip install '{package}'`:

```python
import eqx_q
import jax

agent = eqx_q.load("{name or AGENT}")
env = eqx_q.make("{env_name(config)}", num_envs=8{options})
returns = eqx_q.evaluate(agent, env, num_episodes=8, key=jax.random.key(0))
print(returns.mean())
```

In a checkout of eqx_q:

```sh
python scripts/evaluate.py run={name or "DIR"}
python scripts/watch.py run={name or "DIR"}
```
"""
