"""Gymnasium: any environment of any installed package, stepped in Python (gymnasium.farama.org)."""

import functools
import importlib
import os
import signal
from collections.abc import Callable
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.envs.registration import EnvSpec, VectorizeMode, load_env_creator
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import FlattenObservation
from jax.experimental import io_callback
from jaxtyping import Array, Int, PRNGKeyArray, UInt8

from ..errors import UnknownNameError, UsageError
from ..spaces import Box, Discrete
from ..types import TimeStep
from .autoreset import Report, Running
from .drawing import quiet_pygame
from .env import Env

VECTORIZATIONS = ("auto", "sync", "async")


class Host:
    """The Python environments. Hashed by identity: compiled code is bound to the one it calls.

    Its methods are called back from compiled code, where JAX must not be used: all is NumPy.
    """

    def __init__(self, vector: VectorEnv, seed: int, recipe: tuple[Any, dict[str, Any]]):
        self.vector: VectorEnv | None = vector
        self.seed: int | None = seed
        self.recipe = recipe
        self.num_envs = vector.num_envs
        space, actions = vector.single_observation_space, vector.single_action_space
        if not isinstance(actions, gymnasium.spaces.Discrete):
            raise UsageError(f"Q-learning needs Discrete actions, not {actions}: discretise them")
        if not isinstance(space, gymnasium.spaces.Box):
            raise UsageError(f"observations of {space} cannot be made one flat array")
        dtype = np.uint8 if space.dtype == np.uint8 else np.float32
        with np.errstate(over="ignore"):  # the largest float64 becomes infinite
            low, high = space.low.astype(dtype), space.high.astype(dtype)
        self.observation_space = Box(gymnasium.spaces.Box(low, high, space.shape, dtype))
        self.action_space = Discrete(gymnasium.spaces.Discrete(int(actions.n)))
        self.first_action = int(actions.start)
        self.has_mask = "action_mask" in vector.reset(seed=seed)[1]

    def reset(self) -> tuple[np.ndarray, ...]:
        """Observations and, if there are any, action masks. The first reset takes the seed."""
        obs, info = self.open().reset(seed=self.seed)
        self.seed = None
        return (self._cast(obs), *self._mask(info))

    def step(self, action: Int[Array, " N"]) -> tuple[np.ndarray, ...]:
        """Observations, rewards, both flags and, if there are any, action masks."""
        actions = np.asarray(action, np.int64) + self.first_action
        obs, reward, terminated, truncated, info = self.open().step(actions)
        return (
            self._cast(obs),
            np.asarray(reward, np.float32),
            np.asarray(terminated, bool),
            np.asarray(truncated, bool),
            *self._mask(info),
        )

    def open(self) -> VectorEnv:
        """The environments. Raises `UsageError` after `close`."""
        if self.vector is None:
            raise UsageError("this environment is closed: make it anew")
        return self.vector

    def _cast(self, obs: Any) -> np.ndarray:
        return np.asarray(obs, self.observation_space.dtype)

    def _mask(self, info: dict[str, Any]) -> tuple[np.ndarray, ...]:
        """Lanes that give no mask now may do anything."""
        if not self.has_mask:
            return ()
        masks = np.ones((self.num_envs, int(self.action_space.n)), bool)
        given = info.get("_action_mask", np.zeros(self.num_envs, bool))
        if given.any():
            masks[given] = info["action_mask"][given]
        return (masks,)


class GymnasiumEnv(Env):
    """Python environments in lockstep, called back from compiled code in order.

    Observations are `float32`, or `uint8` where they are so; spaces other than `Box` are flattened
    (`Discrete` becomes one-hot). An `info["action_mask"]` becomes the action mask.
    The environments are seeded when they are made, and `reset` ignores its key.
    """

    host: Host = eqx.field(static=True)
    observation_space: Box = eqx.field(static=True)
    action_space: Discrete = eqx.field(static=True)
    num_envs: int = eqx.field(static=True)
    num_agents: None = eqx.field(static=True)
    on_host: bool = eqx.field(static=True)
    max_episode_steps: int | None = eqx.field(static=True)

    def __init__(self, host: Host, max_episode_steps: int | None):
        self.host = host
        self.observation_space = host.observation_space
        self.action_space = host.action_space
        self.num_envs = host.num_envs
        self.num_agents = None
        self.on_host = True
        self.max_episode_steps = max_episode_steps

    def reset(self, key: PRNGKeyArray) -> tuple[Running, TimeStep]:
        self.host.open()
        obs, _, _, _, *mask = self._shapes()
        obs, *mask = io_callback(self.host.reset, (obs, *mask), ordered=True)
        zero, no = jnp.zeros(self.num_envs), jnp.zeros(self.num_envs, bool)
        report = Report(obs, zero, no, no, action_mask=mask[0] if mask else None)
        return Running.start(self.num_envs).follow(report)

    def step(
        self, state: Running, action: Int[Array, " N"], key: PRNGKeyArray
    ) -> tuple[Running, TimeStep]:
        self.host.open()
        obs, reward, terminated, truncated, *mask = io_callback(
            self.host.step, self._shapes(), action, ordered=True
        )
        mask = mask[0] if mask else None
        return state.follow(Report(obs, reward, terminated, truncated, action_mask=mask))

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any) -> "GymnasiumEnv":
        source, made_with = self.host.recipe
        return make(source, num_envs, seed=seed, **(made_with | options))

    def render(self, state: Running, lane: int = 0) -> UInt8[np.ndarray, "height width 3"] | None:
        vector = self.host.vector
        if vector is None or vector.render_mode != "rgb_array":
            return None
        jax.effects_barrier()  # no step may be under way
        quiet_pygame()
        if isinstance(vector, SyncVectorEnv):
            return np.asarray(vector.envs[lane].render())
        frames = vector.render()
        return None if frames is None else np.asarray(frames[lane])

    def close(self) -> None:
        if self.host.vector is not None:
            jax.effects_barrier()
            self.host.vector.close()
            self.host.vector = None

    def _shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        n, space = self.num_envs, self.observation_space
        obs = jax.ShapeDtypeStruct((n, *space.shape), space.dtype)
        reward, flag = jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((n,), bool)
        mask = jax.ShapeDtypeStruct((n, int(self.action_space.n)), bool)
        return (obs, reward, flag, flag, *([mask] if self.host.has_mask else []))


def ids() -> list[str]:
    """All registered environments. Importing a package may register more."""
    return list(gymnasium.registry)


def accepts(source: Any) -> bool:
    """Whether `source` may be a function that returns a `gymnasium.Env`."""
    return callable(source)


def make(
    source: str | Callable[[], gymnasium.Env],
    num_envs: int,
    *,
    seed: int = 0,
    vectorization: str = "auto",
    **options: Any,
) -> GymnasiumEnv:
    """Makes a vector of Python environments.

    **Arguments:**

    - `source`: a registered id (`"package:Id-v0"` imports the package first), or a function that
        returns a `gymnasium.Env`.
    - `num_envs`: lanes.
    - `seed`: of the environments: lane `i` gets `seed + i`.
    - `vectorization`: `"sync"` steps one environment after the other, `"async"` each in a process
        of its own, `"auto"` uses the environment's vectorised version if it has one, else `"sync"`.
    - `options`: of `gymnasium.make` and of the environment, or keyword arguments of the function.
    """
    if vectorization not in VECTORIZATIONS:
        raise UnknownNameError("vectorization", vectorization, VECTORIZATIONS)
    recipe = (source, {"vectorization": vectorization, **options})
    try:
        spec, create = _resolve(source)
        vector = _vectorised(spec, num_envs, options) if spec and vectorization == "auto" else None
        if spec:
            options = _rendering(spec.entry_point) | options
        one = functools.partial(_one, create, options)
        if vector is None and vectorization == "async":
            one = functools.partial(_ignoring_interrupts, os.getpid(), one)
            # Not forked from here, where JAX has threads.
            vector = AsyncVectorEnv([one] * num_envs, context="forkserver")
        elif vector is None:
            vector = SyncVectorEnv([one] * num_envs)
            spec = vector.envs[0].spec
    except (gymnasium.error.Error, TypeError, ImportError) as error:
        raise UsageError(f"Gymnasium cannot make {source!r}: {error}") from error
    limit = options.get("max_episode_steps", spec.max_episode_steps if spec else None)
    return GymnasiumEnv(Host(vector, seed, recipe), limit)


def _resolve(source: Any) -> tuple[EnvSpec | None, Callable[..., gymnasium.Env]]:
    if not isinstance(source, str):
        return None, source
    package, _, name = source.rpartition(":")
    if package:
        importlib.import_module(package)
    return gymnasium.spec(name), functools.partial(gymnasium.make, name)


def _one(create: Callable[..., gymnasium.Env], options: dict[str, Any]) -> gymnasium.Env:
    env = create(**options)
    if not isinstance(env, gymnasium.Env):
        raise TypeError(f"the function must return a gymnasium.Env, not a {type(env).__name__}")
    is_box = isinstance(env.observation_space, gymnasium.spaces.Box)
    return env if is_box else FlattenObservation(env)


def _ignoring_interrupts(parent: int, create: Callable[[], gymnasium.Env]) -> gymnasium.Env:
    """`create()`; a worker then leaves Ctrl-C, which every process gets, to its parent."""
    if os.getpid() != parent:  # which makes one too, to see its spaces
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return create()


def _vectorised(spec: EnvSpec, num_envs: int, options: dict[str, Any]) -> VectorEnv | None:
    """The environment's own vectorised version, if it has one that serves.

    It must declare the boundary rule. Not if it runs on JAX: that cannot be called back from JAX.
    """
    if spec.vector_entry_point is None:
        return None
    options = _rendering(spec.vector_entry_point) | options
    try:
        vector = gymnasium.make_vec(
            spec, num_envs, vectorization_mode=VectorizeMode.VECTOR_ENTRY_POINT, **options
        )
    except (TypeError, gymnasium.error.Error):  # it lacks an option that the single one may have
        return None
    if (
        vector.metadata.get("autoreset_mode") == AutoresetMode.NEXT_STEP
        and not vector.metadata.get("jax", False)
        and isinstance(vector.single_observation_space, gymnasium.spaces.Box)
    ):
        return vector
    vector.close()
    return None


def _rendering(entry_point: Any) -> dict[str, str]:
    """The option that lets an environment draw, if it can."""
    creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    modes = getattr(creator, "metadata", {}).get("render_modes", ())
    return {"render_mode": "rgb_array"} if "rgb_array" in modes else {}
