"""Gymnasium: any environment of any installed package, stepped in Python (gymnasium.farama.org)."""

import functools
import importlib
import multiprocessing.connection
import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium
import jax
import numpy as np
from gymnasium.envs.registration import EnvSpec, VectorizeMode, load_env_creator
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from jaxtyping import Bool, Shaped

from .. import spaces
from ..errors import LaneError, UnknownNameError, UsageError
from ..types import AnyArray
from .conversion import Senses, as_taken, read_mask
from .guard import BROKEN, Guard, GuardedEnv, report_restart
from .host import Host, HostEnv, Reported, shapes_of

VECTORIZATIONS = ("auto", "sync", "async")


class GymnasiumHost(Host):
    """A Gymnasium vector environment.

    Arrays of observations are `uint8` if they are so in the environment, else `int32` or `float32`.
    An `info["action_mask"]`, or such an entry of the observations (see `conversion.Senses`),
    becomes the action mask. If the first reset has none, later steps must not have one.
    """

    num_agents = None

    def __init__(
        self,
        vector: VectorEnv,
        seed: int,
        max_episode_steps: int | None,
        recipe: tuple[Any, dict[str, Any]],
        leave_out: tuple[str, ...],
    ):
        self.vector = vector
        self.is_open = True
        self.max_episode_steps = max_episode_steps
        self.num_envs = vector.num_envs
        self.leave_out = leave_out
        self.action_space = spaces.of_actions(vector.single_action_space)
        self._senses = Senses.of(vector.single_observation_space, self.action_space, leave_out)
        self.observation_space = self._senses.space
        self._recipe = recipe
        self._seed: int | None = seed
        obs, info = self._told(vector.reset, seed=seed)
        gives_mask = self._senses.tells_mask or "action_mask" in info
        self._has_mask = gives_mask and bool(spaces.factors(self.action_space))
        self.shapes = shapes_of(self._fresh(obs, info))

    def reset(self) -> Reported:
        obs, info = self._told(self.vector.reset, seed=self._seed)
        self._seed = None
        return self._fresh(obs, info)

    def step(self, action: Shaped[AnyArray, "N *action"]) -> Reported:
        actions = as_taken(self.vector.single_action_space, action)
        return self._report(*self._told(self.vector.step, actions))

    def replicate(self, num_envs: int, seed: int, options: dict[str, Any]) -> "GymnasiumHost":
        source, made_with = self._recipe
        return _host(source, num_envs, seed=seed, **(made_with | options))

    def render(self, lane: int) -> Any:
        if self.vector.render_mode != "rgb_array":
            return None
        if isinstance(self.vector, SyncVectorEnv):
            return self.vector.envs[lane].render()
        frames = self.vector.render()
        return None if frames is None else frames[lane]

    def close(self) -> None:
        self.is_open = False
        self.vector.close()

    def _told(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Calls the vector environment. Raises `LaneError` if a lane's process died."""
        try:
            return function(*arguments, **options)
        except (EOFError, OSError) as error:
            processes = getattr(self.vector, "processes", [])
            if processes:
                multiprocessing.connection.wait([one.sentinel for one in processes], timeout=5)
            dead = [str(lane) for lane, one in enumerate(processes) if not one.is_alive()]
            if not dead:
                raise
            for one in processes:  # the vector's own close would wait for dead processes
                one.kill()
            self.vector.closed = True
            raise LaneError(f"the process of lane {', '.join(dead)} died") from error

    def _fresh(self, obs: Any, info: dict[str, Any]) -> Reported:
        no = np.zeros(self.num_envs, bool)
        return self._report(obs, no, no, no, info)

    def _report(self, obs, reward, terminated, truncated, info: dict[str, Any]) -> Reported:
        report = {
            "obs": self._senses.see(obs, self.num_envs),
            "reward": np.asarray(reward, np.float32),
            "terminated": np.asarray(terminated, bool),
            "truncated": np.asarray(truncated, bool),
            "broken": np.asarray(info.get(f"_{BROKEN}", np.zeros(self.num_envs)), bool),
        }
        for lane in np.flatnonzero(report["broken"]):
            report_restart(int(lane), info[BROKEN][lane])
        if self._has_mask:
            return report | {"action_mask": self._masks(obs, info)}
        self._senses.expect_no_mask(info)
        return report

    def _masks(self, obs: Any, info: dict[str, Any]) -> Bool[np.ndarray, "N A"]:
        """Masks of all lanes; in lanes without a mask, every action is legal."""
        masks = np.ones((self.num_envs, sum(spaces.factors(self.action_space))), bool)
        given = info.get("_action_mask", np.full(self.num_envs, "action_mask" in info))
        for lane in range(self.num_envs):
            if self._senses.tells_mask or given[lane]:
                parts = obs if self._senses.tells_mask else info
                own = jax.tree.map(lambda x: x[lane], parts["action_mask"])  # noqa: B023
                masks[lane] = read_mask(self.action_space, own)
        return masks


def ids() -> list[str]:
    """All registered environments. Importing a package may register more."""
    return list(gymnasium.registry)


def accepts(source: Any) -> bool:
    """Whether `source` is a Gymnasium environment, or a class of one."""
    kind = source if isinstance(source, type) else type(source)
    return issubclass(kind, gymnasium.Env)


def make(
    source: str | Callable[[], gymnasium.Env],
    num_envs: int,
    *,
    seed: int = 0,
    vectorization: str = "auto",
    leave_out: Iterable[str] = (),
    guard: Guard = Guard(),  # noqa: B008
    **options: Any,
) -> HostEnv:
    """Makes a vector of Python environments.

    **Arguments:**

    - `source`: a registered id (`"package:Id-v0"` imports the package first), or a function that
        returns a `gymnasium.Env`.
    - `num_envs`: lanes.
    - `seed`: of the environments: lane `i` gets `seed + i`.
    - `vectorization`: `"sync"` steps one environment after the other, `"async"` each in its own
        process, `"auto"` uses the environment's vectorised version if it has one, else `"sync"`.
    - `leave_out`: entries of `Dict` observations, by path, that the agent does not see.
    - `guard`: what to do when a lane fails. A guard that restarts or times lanes rules out the
        environment's vectorised version, whose lanes cannot be restarted one by one.
    - `options`: of `gymnasium.make` and of the environment, or keyword arguments of the function.
    """
    own = {"vectorization": vectorization, "leave_out": tuple(leave_out), "guard": guard}
    return HostEnv(_host(source, num_envs, seed=seed, **own, **options))


def _host(
    source: Any,
    num_envs: int,
    *,
    seed: int,
    vectorization: str,
    leave_out: tuple[str, ...],
    guard: Guard,
    **options: Any,
) -> GymnasiumHost:
    if isinstance(source, gymnasium.Env):
        raise UsageError("each lane needs an environment of its own: give a function that makes it")
    if vectorization not in VECTORIZATIONS:
        raise UnknownNameError("vectorization", vectorization, VECTORIZATIONS)
    own = {"vectorization": vectorization, "leave_out": leave_out, "guard": guard}
    recipe = (source, own | options)
    try:
        spec, create = _resolve(source)
        vector = None
        if spec and vectorization == "auto" and guard.leaves_lanes_alone:
            vector = _vectorised(spec, num_envs, options)
        if spec:
            options = _rendering(spec.entry_point) | options
        one = functools.partial(_one, create, options)
        lanes = [
            functools.partial(GuardedEnv, one, lane, guard, leave_out) for lane in range(num_envs)
        ]
        if vector is None and vectorization == "async":
            lanes = [functools.partial(_ignoring_interrupts, os.getpid(), lane) for lane in lanes]
            # A plain fork is unsafe, since JAX has threads.
            shares = not leave_out  # entries left out may be of a kind that cannot be shared
            vector = AsyncVectorEnv(lanes, context="forkserver", shared_memory=shares)
        elif vector is None:
            vector = SyncVectorEnv(lanes)
            spec = vector.envs[0].spec
    except UsageError:
        raise
    except Exception as error:  # an environment's constructor may raise anything
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"Gymnasium cannot make {source!r}: {what}") from error
    limit = options.get("max_episode_steps", spec.max_episode_steps if spec else None)
    try:
        return GymnasiumHost(vector, seed, limit, recipe, leave_out)
    except BaseException:
        vector.close()
        raise


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
    return env


def _ignoring_interrupts(parent: int, create: Callable[[], gymnasium.Env]) -> gymnasium.Env:
    """`create()`; a worker process ignores signals, which its parent handles."""
    if os.getpid() != parent:  # the parent also calls this, to get the spaces
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    return create()


def _vectorised(spec: EnvSpec, num_envs: int, options: dict[str, Any]) -> VectorEnv | None:
    """The environment's own vectorised version, if it has a usable one.

    It must declare the boundary rule, and must not run on JAX, which cannot call back into itself.
    """
    if spec.vector_entry_point is None:
        return None
    options = _rendering(spec.vector_entry_point) | options
    try:
        vector = gymnasium.make_vec(
            spec, num_envs, vectorization_mode=VectorizeMode.VECTOR_ENTRY_POINT, **options
        )
    except (TypeError, gymnasium.error.Error):  # it may lack an option of the single environment
        return None
    if vector.metadata.get("autoreset_mode") == AutoresetMode.NEXT_STEP and not vector.metadata.get(
        "jax", False
    ):
        return vector
    vector.close()
    return None


def _rendering(entry_point: Any) -> dict[str, str]:
    """The option that lets an environment draw, if it can."""
    creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    modes = getattr(creator, "metadata", {}).get("render_modes", ())
    return {"render_mode": "rgb_array"} if "rgb_array" in modes else {}
