"""Replays the updates that led to a non-finite loss."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ..data import Dataset
from ..errors import DivergedError, UsageError
from ..loops.callbacks import with_env, without_env
from ..loops.offline import Feed, blocks_of, train_offline
from ..loops.running import Metrics, StopTraining
from ..loops.source import next_update
from ..loops.training import Lanes, train
from ..saving.checkpoint import load, save
from ..sharding import OneDevice
from ..wrappers import Env
from ..wrappers.host import closing
from .making import lanes_of_all, make_env, make_sampling
from .settings import Config, Settings, read_settings

logger = logging.getLogger(__name__)

_BEFORE, _UPDATE = "diverged.ckpt", "diverged_update.eqx"


def keep_diverged(directory: Path, error: DivergedError, env: Env) -> bool:
    """Saves the state for `replay_run`. Returns whether there was one and it was written."""
    if error.run_state is None:
        return False
    state = without_env(error.run_state) if env.on_host else error.run_state
    with contextlib.suppress(UsageError):  # a full disk must not hide the error about the loss
        save(directory / _BEFORE, state)
        return True
    return False


def replay_run(
    config: Config, directory: Path, *, updates: int = 10_000, rows: int = 20
) -> list[Metrics]:
    """Continues from the last good state of a diverged run, update by update.

    With environments in JAX, and from data, this repeats the run bit for bit. Emulators play other
    episodes and cannot repeat a rollout, so their update is not saved.

    The update with the non-finite loss is saved as `diverged_update.eqx`, for `eqx_q.load`: a
    dictionary with the `agent` before it, the `experience` and the `key`, so that
    `agent.update(experience, key=key)` is that update.

    **Arguments:** `updates`: the maximum number of updates. `rows`: the number of last good updates
    to return.

    **Returns:** the metrics of these updates.
    **Raises:** `UsageError` if the run has not diverged, or does not diverge again.
    """
    if not (directory / _BEFORE).exists():
        raise UsageError(
            f"'{directory / _BEFORE}' does not exist, so this run has not diverged: choose another"
        )
    settings = read_settings(config)
    told: list[Metrics] = []
    with closing(make_env(config, lanes_of_all(settings, settings.num_envs))) as env:
        state: Any = with_env(load(directory / _BEFORE), env)
        last = int(state.num_updates) + updates

        def keep(run_state: Any, metrics: Metrics) -> None:
            told.append(metrics)
            del told[:-rows]
            if int(run_state.num_updates) >= last:
                raise StopTraining

        how: dict[str, Any] = {"key": state.key, "run_state": state, "log_every": 1}
        how |= {"callbacks": [keep], "devices": settings.devices}
        dataset = None if settings.data is None else Dataset(settings.data)
        try:
            if dataset is None:
                train(state.agent, env, total_steps=settings.total, **how)
            else:
                how["sampling"] = make_sampling(settings)
                train_offline(state.agent, dataset, num_updates=settings.total, **how)
        except DivergedError as error:
            logger.info("%s", error)
            state = error.run_state
        else:
            raise UsageError(
                f"this time the loss stays finite for {updates} updates, or to the end, since "
                "emulators play other episodes and other machines round differently: try again"
            )
        if not env.on_host or dataset is not None:
            update = _update(settings, env, dataset, state)
            for line in _look_at(update):
                logger.info("%s", line)
            save(directory / _UPDATE, update)
            logger.info("wrote %s", directory / _UPDATE)
    return told


def _update(settings: Settings, env: Env, dataset: Dataset | None, state: Any) -> dict[str, Any]:
    """The next update: agent, experience and key."""
    with contextlib.ExitStack() as stack:
        source: Any = Lanes(env)
        if dataset is not None:
            sampling = make_sampling(settings)
            feed = Feed(blocks_of(state, dataset, sampling), sampling, OneDevice())
            stack.callback(feed.close)
            state, source = feed.source(state, int(state.num_updates))
        experience, _, key, _ = eqx.filter_jit(next_update)(source, state)
    return {"agent": state.agent, "experience": experience, "key": key}


def _look_at(update: dict[str, Any]) -> Iterator[str]:
    """Lists the non-finite inputs of an update; if there are none, the largest ones."""
    arrays = [
        (jax.tree_util.keystr(path), np.asarray(x))
        for path, x in jax.tree_util.tree_leaves_with_path(update)
        if eqx.is_inexact_array(x) and x.size
    ]
    chosen = update["agent"].hyperparameters()  # these may be infinite, and are often large
    arrays = [
        (name, x)
        for name, x in arrays
        if name.removeprefix("['agent'].").removeprefix("members.") not in chosen
    ]
    wrong = [(name, np.count_nonzero(~np.isfinite(x)), x.size) for name, x in arrays]
    if any(count for _, count, _ in wrong):
        for name, count, size in wrong:
            if count:
                yield f"not finite before that update: {name}, {count} of {size} values"
        return
    yield "all inputs of the update are finite; the largest are:"
    for name, x in sorted(arrays, key=lambda pair: -np.abs(pair[1]).max())[:5]:
        yield f"  {np.abs(x).max():12.4g}  {name}"
