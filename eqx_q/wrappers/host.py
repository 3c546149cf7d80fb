"""Environments that live in Python, which compiled code calls back in order."""

import abc
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import equinox as eqx
import jax
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, PRNGKeyArray, PyTree, Shaped, UInt8

from ..errors import LaneError, UsageError
from ..spaces import Leaf, Space
from ..types import AnyArray, TimeStep
from .autoreset import Report, Running
from .drawing import quiet_pygame
from .env import Env, Recording

Reported: TypeAlias = dict[str, PyTree[np.ndarray]]  # fields of a `Report`, of all lanes


class Host(abc.ABC):
    """Python environments in lockstep.

    Hashed by identity, since compiled code is bound to the one it calls. `reset` and `step` run in
    callbacks, where JAX must not be used, so they use NumPy. Both report the same fields, with the
    shapes and types in `shapes`.
    """

    observation_space: Space
    action_space: Leaf
    num_envs: int
    num_agents: int | None
    max_episode_steps: int | None
    shapes: dict[str, PyTree[jax.ShapeDtypeStruct]]
    is_open: bool
    leave_out: tuple[str, ...] = ()
    agent_kinds: tuple[int, ...] | None = None
    state_size: int | None = None
    failure: Exception | None = None  # the last exception in a callback

    @abc.abstractmethod
    def reset(self) -> Reported:
        """Starts an episode in every lane. Only the first reset uses the seed."""

    @abc.abstractmethod
    def step(self, action: Shaped[AnyArray, "N *M_and_action"]) -> Reported:
        """Acts in every lane, but resets the lanes whose episode ended in the previous step."""

    @abc.abstractmethod
    def replicate(self, num_envs: int, seed: int, options: dict[str, Any]) -> "Host":
        """Makes another of the same kind, which shares nothing with this one."""

    @abc.abstractmethod
    def render(self, lane: int) -> Any:
        """A picture of one lane, or `None`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the environments; `is_open` is false from then on."""

    def check_open(self) -> None:
        """Raises `UsageError` after `close`."""
        if not self.is_open:
            raise UsageError("this environment is closed: make it again")

    def call(self, function: Callable[..., Reported], *arguments: Any) -> Reported:
        """Runs `function` in a callback from compiled code, and keeps its exception."""
        try:
            self.check_open()  # it may have been closed after compilation
            reported = function(*arguments)
            _check_finite(reported)
            return reported
        except Exception as error:
            self.failure = error
            raise


def _check_finite(reported: Reported) -> None:
    """Raises `LaneError` if a reported number other than an observation is not finite."""
    for name, part in reported.items():
        for x in jax.tree.leaves(part) if name != "obs" else ():  # parts of `obs` may be hidden
            if x.dtype.kind == "f" and not np.isfinite(x).all():
                lanes = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))
                raise LaneError(
                    f"the environment of lane {', '.join(map(str, lanes))} failed: its {name} is "
                    "not finite"
                )


def shapes_of(reported: Reported) -> dict[str, PyTree[jax.ShapeDtypeStruct]]:
    """Shapes and types of a report, which compiled code needs in advance."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), reported)


class HostEnv(Env):
    """The environments of a `Host`.

    They are seeded when they are made, and `reset` ignores its key.
    """

    host: Host = eqx.field(static=True)
    observation_space: Space = eqx.field(static=True)
    action_space: Leaf = eqx.field(static=True)
    num_envs: int = eqx.field(static=True)
    num_agents: int | None = eqx.field(static=True)
    on_host: bool = eqx.field(static=True)
    max_episode_steps: int | None = eqx.field(static=True)

    def __init__(self, host: Host):
        self.host = host
        self.observation_space = host.observation_space
        self.action_space = host.action_space
        self.num_envs = host.num_envs
        self.num_agents = host.num_agents
        self.on_host = True
        self.max_episode_steps = host.max_episode_steps

    @property
    def recording(self) -> Recording:
        """See `Env`; it notes `leave_out`."""
        left_out = list(self.host.leave_out)
        return Recording(preprocessing={"leave_out": left_out} if left_out else {})

    @property
    def agent_kinds(self) -> tuple[int, ...] | None:
        return self.host.agent_kinds

    @property
    def state_size(self) -> int | None:
        return self.host.state_size

    def reset(self, key: PRNGKeyArray) -> tuple[Running, TimeStep]:
        reported = self._call_back(self.host.reset)
        return Running.start(self.num_envs).follow(Report(**reported))

    def step(
        self, state: Running, action: Shaped[Array, "N *M_and_action"], key: PRNGKeyArray
    ) -> tuple[Running, TimeStep]:
        reported = self._call_back(self.host.step, action)
        return state.follow(Report(**reported))

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any) -> "HostEnv":
        return HostEnv(self.host.replicate(num_envs, seed, options))

    def render(self, state: Running, lane: int = 0) -> UInt8[np.ndarray, "height width 3"] | None:
        if not self.host.is_open:
            return None
        jax.effects_barrier()  # no step may be running
        quiet_pygame()
        picture = self.host.render(lane)
        return None if picture is None else np.asarray(picture)

    def close(self) -> None:
        if self.host.is_open:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # a failed step is over, too
                jax.effects_barrier()
            self.host.close()

    def _call_back(self, function: Callable[..., Reported], *arguments: Any) -> Any:
        self.host.check_open()
        call = functools.partial(self.host.call, function)
        return io_callback(call, self.host.shapes, *arguments, ordered=True)


@contextlib.contextmanager
def closing(env: Env) -> Iterator[Env]:
    """Closes `env` at the end of the block, and raises its errors like `own_errors`."""
    with own_errors(env):
        try:
            yield env
        finally:
            env.close()


@contextlib.contextmanager
def own_errors(env: Env) -> Iterator[None]:
    """Re-raises the original exception of a callback of the environment.

    JAX would log it, and raise a `JaxRuntimeError` with its traceback as the message.
    """
    log = logging.getLogger("jax._src.callback")
    silence = logging.Filter("of no logger")
    log.addFilter(silence)
    try:
        yield
    except jax.errors.JaxRuntimeError:
        for host in _hosts(env):
            if host.failure is not None:
                raise host.failure from host.failure.__cause__
        raise
    finally:
        log.removeFilter(silence)


def _hosts(env: Env) -> list[Host]:
    """The hosts of the environment and of its parts."""
    parts = jax.tree.leaves(env, is_leaf=lambda part: isinstance(part, HostEnv))
    return [part.host for part in parts if isinstance(part, HostEnv)]
