"""Environments that live in Python, called back from compiled code in order."""

import abc
from typing import Any, TypeAlias

import equinox as eqx
import gymnasium
import jax
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Int, PRNGKeyArray, UInt8

from ..errors import UsageError
from ..spaces import Box, Discrete
from ..types import AnyArray, TimeStep
from .autoreset import Report, Running
from .drawing import quiet_pygame
from .env import Env

Reported: TypeAlias = dict[str, np.ndarray]  # fields of a `Report`, of all lanes


class Host(abc.ABC):
    """Python environments in lockstep.

    Hashed by identity: compiled code is bound to the one it calls. `reset` and `step` are called
    back from there, where JAX must not be used: all is NumPy. Both report the same fields, of the
    shapes and types in `shapes`.
    """

    observation_space: Box
    action_space: Discrete
    num_envs: int
    num_agents: int | None
    max_episode_steps: int | None
    shapes: dict[str, jax.ShapeDtypeStruct]
    is_open: bool

    @abc.abstractmethod
    def reset(self) -> Reported:
        """Starts an episode in every lane. The first reset takes the seed, later ones go on."""

    @abc.abstractmethod
    def step(self, action: Int[AnyArray, "N *M"]) -> Reported:
        """Acts in every lane; resets a lane instead where its episode ended in the step before."""

    @abc.abstractmethod
    def replicate(self, num_envs: int, seed: int, options: dict[str, Any]) -> "Host":
        """Another of the same kind, that shares nothing with this one."""

    @abc.abstractmethod
    def render(self, lane: int) -> Any:
        """A picture of one lane, or `None`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the environments; `is_open` is false from then on."""


def cast_box(space: gymnasium.spaces.Box) -> Box:
    """`space` with values of `uint8` where it has those, else of `float32`."""
    dtype = np.uint8 if space.dtype == np.uint8 else np.float32
    with np.errstate(over="ignore"):  # the largest float64 becomes infinite
        low, high = space.low.astype(dtype), space.high.astype(dtype)
    return Box(gymnasium.spaces.Box(low, high, space.shape, dtype))


def shapes_of(reported: Reported) -> dict[str, jax.ShapeDtypeStruct]:
    """What compiled code must know of a report before it has one."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in reported.items()}


class HostEnv(Env):
    """The environments of a `Host`.

    They are seeded when they are made, and `reset` ignores its key.
    """

    host: Host = eqx.field(static=True)
    observation_space: Box = eqx.field(static=True)
    action_space: Discrete = eqx.field(static=True)
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

    def reset(self, key: PRNGKeyArray) -> tuple[Running, TimeStep]:
        self._check_open()
        reported = io_callback(self.host.reset, self.host.shapes, ordered=True)
        return Running.start(self.num_envs).follow(Report(**reported))

    def step(
        self, state: Running, action: Int[Array, "N *M"], key: PRNGKeyArray
    ) -> tuple[Running, TimeStep]:
        self._check_open()
        reported = io_callback(self.host.step, self.host.shapes, action, ordered=True)
        return state.follow(Report(**reported))

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any) -> "HostEnv":
        return HostEnv(self.host.replicate(num_envs, seed, options))

    def render(self, state: Running, lane: int = 0) -> UInt8[np.ndarray, "height width 3"] | None:
        if not self.host.is_open:
            return None
        jax.effects_barrier()  # no step may be under way
        quiet_pygame()
        picture = self.host.render(lane)
        return None if picture is None else np.asarray(picture)

    def close(self) -> None:
        if self.host.is_open:
            jax.effects_barrier()
            self.host.close()

    def _check_open(self) -> None:
        if not self.host.is_open:
            raise UsageError("this environment is closed: make it anew")
