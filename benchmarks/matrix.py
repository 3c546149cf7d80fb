"""Tests that all parts of an agent work together.

A cell of the matrix is one choice on each axis: observations, actions, value, head, memory, team,
and online or offline learning. In each cell an agent is created, acts, learns from random
experience, is saved and loaded. Refused cells must say why.

  python benchmarks/matrix.py              # all cells
  python benchmarks/matrix.py --sample 20  # 20 random cells; writes nothing
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from record import RESULTS, write

import eqx_q
from eqx_q.agents import Agent
from eqx_q.errors import UsageError
from eqx_q.types import Episode, Rollout, TimeStep, Transitions

_spaces = gymnasium.spaces
_PICTURE = _spaces.Box(0, 255, (5, 5, 2), np.uint8)
OBSERVATIONS = {
    "box": _spaces.Box(-1, 1, (3,), np.float32),
    "image": _PICTURE,
    "dict": _spaces.Dict(
        camera=_PICTURE,
        arm=_spaces.Dict(speed=_spaces.Box(-np.inf, np.inf, (2,), np.float32)),
        tool=_spaces.Discrete(3, start=1),
    ),
    "discrete": _spaces.Discrete(4),
}
ACTIONS = {
    "discrete": _spaces.Discrete(3, start=1),
    "multi_discrete": _spaces.MultiDiscrete([2, 3]),
    "box": _spaces.Box(-1, 1, (2,), np.float32),
}
VALUES = {
    "scalar": "scalar",
    "hl_gauss": {"name": "hl_gauss", "num_bins": 5},
    "quantile": {"name": "quantile", "num_quantiles": 3},
}
AXES: dict[str, tuple[str, ...]] = {
    "observations": tuple(OBSERVATIONS),
    "actions": tuple(ACTIONS),
    "value": tuple(VALUES),
    "head": ("linear", "dueling"),
    "memory": ("none", "gru"),
    "team": ("alone", "independent", "vdn", "qmix"),
    "learning": ("online", "offline"),
}
Cell = dict[str, str]

_FAST_COMPILATION = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
_LANES, _LENGTH, _AGENTS, _STATE = 2, 3, 2, 4


def cells() -> list[Cell]:
    """All cells."""
    return [dict(zip(AXES, choices, strict=True)) for choices in itertools.product(*AXES.values())]


def is_refused(cell: Cell) -> bool:
    """Whether the cell is refused: quantiles cannot be mixed."""
    return cell["value"] == "quantile" and cell["team"] in ("vdn", "qmix")


def pairs(cell: Cell) -> set[tuple[tuple[str, str], ...]]:
    """The choices of a cell on any two axes."""
    return set(itertools.combinations(cell.items(), 2))


def cover(seed: int = 3) -> list[Cell]:
    """A small greedy set of cells with every pair of choices that is not refused."""
    known = [cell for cell in cells() if not is_refused(cell)]
    order = np.random.default_rng(seed).permutation(len(known))
    missing, chosen = set().union(*map(pairs, known)), []
    while missing:
        best = max((known[i] for i in order), key=lambda cell: len(pairs(cell) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def create(cell: Cell) -> Agent:
    """Creates a tiny agent. Raises `UsageError` if the cell is refused."""
    team, has_memory = cell["team"], cell["memory"] != "none"
    options: dict[str, Any] = {"hidden_sizes": (8,), "head": cell["head"], "memory": cell["memory"]}
    if has_memory:
        options |= {"memory_size": 4, "last_reward": True}
    if cell["observations"] in ("image", "dict"):
        options |= {"channels": 2}
    shared: dict[str, Any] = {
        "key": jax.random.key(0),
        "network_options": options,
        "value": VALUES[cell["value"]],
        "burn_in": int(has_memory),
    }
    if cell["actions"] == "box":
        shared["bins"] = (2, 3)
    if team != "alone":
        shared |= {"num_agents": _AGENTS, "mixer": team}
        shared["state_size"] = _STATE if _has_state(cell) else None
    space, act_space = OBSERVATIONS[cell["observations"]], ACTIONS[cell["actions"]]
    if cell["learning"] == "online":
        return eqx_q.PQN.create(
            space, act_space, rollout_length=_LENGTH, num_epochs=1, num_minibatches=2, **shared
        )
    return eqx_q.CQL.create(space, act_space, batch_size=_LANES, n_step=2, **shared)


def experience(cell: Cell, agent: Agent) -> Rollout | Transitions:
    """Random experience for the agent, with an episode's end, masks and dead agents."""
    rng, learns_from = np.random.default_rng(0), agent.learns_from
    if isinstance(learns_from, eqx_q.agents.Rollouts):
        steps = learns_from.length + learns_from.burn_in
    elif learns_from.sequence_length is not None:
        steps = learns_from.sequence_length
    else:
        return _transitions(cell, rng, learns_from.n_step)
    team = () if agent.num_agents is None else (agent.num_agents,)
    axes = (steps + 1, _LANES)
    ended, first = np.zeros(axes, bool), np.zeros(axes, bool)
    ended[-2, 0] = first[-1, 0] = True
    alive = rng.random((*axes, *team)) < 0.8
    reward = rng.normal(size=axes).astype(np.float32)
    timesteps = TimeStep(
        obs=_draw(OBSERVATIONS[cell["observations"]], *axes, *team),
        reward=reward,
        terminated=ended,
        truncated=np.zeros(axes, bool),
        first=first,
        episode=Episode(ended, reward, np.zeros(axes, np.int32)),
        action_mask=_mask(cell, rng, *axes, *team),
        agent_mask=alive if team else None,
        agent_reward=rng.normal(size=(*axes, *team)).astype(np.float32) if team else None,
        global_state=_state(rng, *axes) if team and _has_state(cell) else None,
    )
    actions = _draw(ACTIONS[cell["actions"]], steps, _LANES, *team)
    return Rollout(timesteps, actions, agent.initial_memory(_LANES))


def check(cell: Cell) -> None:
    """Creates, runs, updates, saves and loads an agent of the cell. Raises if that fails."""
    agent = _compiled(lambda: create(cell))()
    batch = jax.tree.map(jnp.asarray, experience(cell, agent))
    update = _compiled(lambda agent, batch: agent.update(batch, key=jax.random.key(0)))
    learnt, metrics = update(agent, batch)
    assert jax.tree.structure(learnt) == jax.tree.structure(agent), "update changes its structure"
    _check_finite("the agent that has learnt", learnt)
    _check_finite("metrics of update", metrics)
    before, after = (jax.tree.leaves(eqx.filter(x, eqx.is_inexact_array)) for x in (agent, learnt))
    assert any(np.any(x != y) for x, y in zip(before, after, strict=True)), "nothing was learnt"
    team = () if agent.num_agents is None else (agent.num_agents,)
    act_space = ACTIONS[cell["actions"]]
    obs = _draw(OBSERVATIONS[cell["observations"]], _LANES, *team)
    mask = _mask(cell, np.random.default_rng(1), _LANES, *team)
    reward, first = np.ones(_LANES, np.float32), np.array([True, False])

    act = _compiled(
        lambda agent, memory, key: agent.act(
            obs, memory, first=first, action_mask=mask, reward=reward, key=key
        )
    )
    memory = learnt.initial_memory(_LANES)
    greedy = act(learnt, memory, None)
    for decision in (greedy, act(learnt, greedy.memory, jax.random.key(1))):
        _check_finite("a decision", decision)
        actions = np.asarray(decision.action, act_space.dtype)
        shape = act_space.shape or ()
        assert actions.shape == (_LANES, *team, *shape), f"actions of shape {actions.shape}"
        for action in actions.reshape(-1, *shape):
            assert act_space.contains(action), f"{action} is not an action of {act_space}"
    with tempfile.TemporaryDirectory() as directory:
        eqx_q.save(Path(directory) / "agent.eqx", learnt)
        loaded = eqx_q.load(Path(directory) / "agent.eqx")
    again = act(loaded, memory, None)
    assert np.array_equal(again.action, greedy.action), "once loaded, it acts otherwise"
    assert np.array_equal(again.value, greedy.value), "once loaded, its values are others"


def run(chosen: Iterable[Cell]) -> dict[str, Any]:
    """Checks cells, and counts the outcomes."""
    start, passed, refused, failures = time.perf_counter(), 0, Counter(), []
    for number, cell in enumerate(chosen):
        try:
            check(cell)
            passed += 1
        except UsageError as error:
            if is_refused(cell):
                refused[str(error)] += 1
            else:
                failures.append({**cell, "error": str(error)})
        except Exception as error:
            failures.append({**cell, "error": f"{type(error).__name__}: {error}"})
        if number % 20 == 19:
            jax.clear_caches()  # without this, memory grows
            seconds = time.perf_counter() - start
            print(f"{number + 1} cells, {len(failures)} failures, {seconds:.0f} s", flush=True)
    return {
        "cells": passed + sum(refused.values()) + len(failures),
        "passed": passed,
        "refused": dict(refused),
        "failures": failures,
        "seconds": round(time.perf_counter() - start),
    }


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like `eqx.filter_jit`, without optimisation, since compilation takes most of the time."""

    def call(*arguments: Any) -> Any:
        arrays, static = eqx.partition(arguments, eqx.is_array)
        rest = []

        def run(arrays: Any) -> Any:
            result, other = eqx.partition(function(*eqx.combine(arrays, static)), eqx.is_array)
            rest.append(other)
            return result

        result = jax.jit(run, compiler_options=_FAST_COMPILATION)(arrays)
        return eqx.combine(result, rest[0])

    return call


def _draw(space: gymnasium.Space, *axes: int) -> Any:
    """Random elements of a space."""
    space.seed(0)
    rows = [space.sample() for _ in range(int(np.prod(axes)))]
    return jax.tree.map(lambda *x: np.stack(x).reshape(*axes, *np.shape(x[0])), *rows)


def _mask(cell: Cell, rng: np.random.Generator, *axes: int) -> Any:
    """Random legal choices; for a `Box`, all are legal."""
    sizes = {"discrete": 3, "multi_discrete": 5}
    return rng.random((*axes, sizes[cell["actions"]])) < 0.7 if cell["actions"] in sizes else None


def _has_state(cell: Cell) -> bool:
    """Whether there is a global state; otherwise mixers use the observations."""
    return cell["observations"] == "box"


def _state(rng: np.random.Generator, *axes: int) -> Any:
    return rng.normal(size=(*axes, _STATE)).astype(np.float32)


def _transitions(cell: Cell, rng: np.random.Generator, n: int) -> Transitions:
    space = OBSERVATIONS[cell["observations"]]
    obs = _draw(space, 2, _LANES)
    return Transitions(
        obs=jax.tree.map(lambda x: x[0], obs),
        action=_draw(ACTIONS[cell["actions"]], _LANES),
        reward=rng.normal(size=(_LANES, n)).astype(np.float32),
        length=np.full(_LANES, n, np.int32),
        terminated=np.array([True, False]),
        next_obs=jax.tree.map(lambda x: x[1], obs),
        next_action_mask=_mask(cell, rng, _LANES),
    )


def _check_finite(name: str, tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_inexact_array)):
        is_limit = any(word in str(path) for word in ("schedule_steps", "max_grad_norm"))
        assert is_limit or np.all(np.isfinite(leaf)), f"{name}: {path} is not finite"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="number of cells to test instead of all")
    count = parser.parse_args().sample
    # XLA's older emitters compile three times as fast; no compiler option chooses them.
    older = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {older}"
    chosen = cells()
    if count is not None:
        rows = np.random.default_rng(0).choice(len(chosen), count, replace=False)
        chosen = [chosen[row] for row in rows]
    result = run(chosen)
    print(result)
    if count is None:
        write(RESULTS / "matrix.json", result)
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
