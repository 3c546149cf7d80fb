"""Craftax and Craftax Classic, symbolic and pixels (github.com/MichaelTMatthews/Craftax)."""

import dataclasses
import functools
import importlib
import numbers
import pickle
from collections.abc import Callable
from typing import Any, get_args

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from craftax.craftax_env import make_craftax_env_from_name
from craftax.environment_base.environment_bases import (
    EnvironmentAutoReset,
    EnvironmentNoAutoReset,
)
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped, UInt8

from ..errors import UnknownNameError, UsageError
from ..spaces import Box, Discrete
from ..types import AnyArray
from .autoreset import Report
from .lanes import Lanes
from .options import TimeLimit, require_choice, require_count
from .textures import load_constants

_IDS = [
    "Craftax-Symbolic-v1",
    "Craftax-Pixels-v1",
    "Craftax-Classic-Symbolic-v1",
    "Craftax-Classic-Pixels-v1",
]
# The return for all achievements, by the subpackage of the game.
_MAXIMUM = {"craftax.craftax": 226, "craftax.craftax_classic": 22}
_NEVER = np.iinfo(np.int32).max


class Play(eqx.Module):
    """The state of one lane: the game's state, and the episode's return so far."""

    world: PyTree
    returns: Float[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False)
class Game:
    """A Craftax environment with its parameters; see `make`.

    Parameters are constants of the compiled code.

    **Attributes:**

    - `source`, `options`: the arguments that it was made with.
    - `params`: as in the package, but with a time limit that is never reached. The real limit is
        `max_episode_steps`, since Craftax does not report whether its limit ended an episode.
    - `observation_space`: pixels in 0..255; symbols without bounds.
    """

    source: Any
    options: dict[str, Any]
    env: Any
    params: Any
    max_episode_steps: int
    time_limit: TimeLimit
    lanes_per_reset: int | None
    observation_space: Box
    action_space: Discrete
    num_agents: None = None
    state_size: None = None
    agent_kinds: None = None

    def reset(self, key: PRNGKeyArray) -> tuple[Play, Report]:
        """Generates a world."""
        obs, world = self.env.reset_env(key, self.params)
        state, no = Play(world, jnp.array(0.0)), jnp.array(False)
        return state, Report(self._observe(obs), jnp.array(0.0), no, no, self._metrics(state))

    def step(self, state: Play, action: Int[Array, ""], key: PRNGKeyArray) -> tuple[Play, Report]:
        """Acts in one lane. Avoids Craftax's `step`, which may reset in the same step."""
        obs, world, reward, done, _ = self.env.step_env(key, state.world, action, self.params)
        at_limit = world.timestep >= self.max_episode_steps
        terminated = done | at_limit if self.time_limit == "terminate" else done
        reward = jnp.asarray(reward, jnp.float32)
        state = Play(world, state.returns + reward)
        metrics = self._metrics(state)
        return state, Report(self._observe(obs), reward, terminated, at_limit, metrics)

    def render(self, state: Play) -> UInt8[np.ndarray, "height width 3"]:
        """Draws with the package's own renderer, which loads its textures on first use."""
        return np.asarray(_as_bytes(_renderer(_package(self.params))(state.world)))

    def replace(self, options: dict[str, Any]) -> "Game":
        """The same game with some options replaced."""
        return _game(self.source, self.options | options)

    def _observe(self, obs: Float[Array, "*obs"]) -> Shaped[Array, "*obs"]:
        """Converts pixels, which Craftax divides by 255, back to bytes."""
        if obs.ndim == 3:
            return _as_bytes(255 * obs)
        return obs.astype(jnp.float32)

    def _metrics(self, state: Play) -> dict[str, AnyArray]:
        package = _package(self.params)
        achieved = {
            f"achievements/{one.name.lower()}": state.world.achievements[one.value]
            for one in load_constants(package).Achievement
        }
        return {"percent_of_maximum": 100 / _MAXIMUM[package] * state.returns, **achieved}


def ids() -> list[str]:
    """Craftax and Craftax Classic, each with symbols and with pixels."""
    return list(_IDS)


def accepts(source: Any) -> bool:
    """Whether `source` is a Craftax environment, or a pair of one and its parameters."""
    if isinstance(source, tuple) and len(source) == 2:
        source = source[0]
    return isinstance(source, EnvironmentAutoReset | EnvironmentNoAutoReset)


def make(source: Any, num_envs: int, *, seed: int = 0, **options: Any) -> Lanes:
    """Makes lanes of a Craftax environment.

    `episode.metrics` has one entry per achievement, such as `achievements/collect_wood`: whether it
    was unlocked in this episode, so that the mean over episodes is the success rate. It also has
    `percent_of_maximum`: the return in percent of that for all achievements (226; Classic: 22).

    **Arguments:**

    - `source`: a name, a Craftax environment, or a pair of one and its parameters.
    - `num_envs`: lanes.
    - `seed`: unused: all randomness comes from the keys.
    - `max_episode_steps`: the time limit (the package's `max_timesteps`).
    - `time_limit`: `"truncate"` or `"terminate"`: how the limit ends an episode. Most other
        implementations terminate.
    - `optimistic_resets`: worlds are generated in batches of `num_envs / optimistic_resets` lanes,
        only where episodes have ended; 1: in every lane and step. It affects only speed: if more
        episodes have ended, more batches are generated. (In other implementations of this option,
        lanes share worlds then.)
    - `options`: other fields of the environment's parameters, including static ones.
    """
    del seed
    return Lanes(_game(source, options), num_envs)


def _game(source: Any, options: dict[str, Any]) -> Game:
    if isinstance(source, str):
        if source not in _IDS:
            raise UnknownNameError("Craftax environment", source, _IDS)
        # Pickled, since options may be lists, which cannot be keys of a cache.
        return _named_game(source, pickle.dumps(sorted(options.items())))
    env, params = source if isinstance(source, tuple) else (source, source.default_params)
    return _configured(source, options, env, params)


@functools.cache
def _named_game(name: str, pickled_options: bytes) -> Game:
    load_constants("craftax.craftax_classic" if "Classic" in name else "craftax.craftax")
    env = make_craftax_env_from_name(name, auto_reset=False)
    return _configured(name, dict(pickle.loads(pickled_options)), env, env.default_params)


def _configured(source: Any, options: dict[str, Any], env: Any, params: Any) -> Game:
    ours = {
        "max_episode_steps": params.max_timesteps,
        "time_limit": "truncate",
        "optimistic_resets": 128,
    }
    of_params = _fields(params) - {"max_timesteps"}
    of_static = _fields(env.static_env_params)
    for name in options:
        if name not in {*ours, *of_params, *of_static}:
            raise UnknownNameError("option", name, {*ours, *of_params, *of_static})
    ours |= {name: options[name] for name in options if name in ours}
    for name in ("max_episode_steps", "optimistic_resets"):
        require_count(name, ours[name])
    require_choice("time_limit", ours["time_limit"], get_args(TimeLimit))
    for fields, known in ((params, of_params), (env.static_env_params, of_static)):
        for name in known.intersection(options):
            default = getattr(fields, name)
            if not _alike(options[name], default):
                raise UsageError(f"{name}={options[name]!r}: give a value like {default!r}")
    static = {name: options[name] for name in options if name in of_static}
    if static:  # sequences must be tuples there, to be hashable
        static = {name: tuple(x) if isinstance(x, list) else x for name, x in static.items()}
        env = type(env)(env.static_env_params.replace(**static))
    params = params.replace(
        max_timesteps=_NEVER, **{name: options[name] for name in options if name in of_params}
    )
    return Game(
        source,
        options,
        env,
        params,
        ours["max_episode_steps"],
        ours["time_limit"],
        None if ours["optimistic_resets"] == 1 else ours["optimistic_resets"],
        _observations(env, params),
        Discrete(gymnasium.spaces.Discrete(int(env.num_actions))),
    )


def _observations(env: Any, params: Any) -> Box:
    obs, _ = jax.eval_shape(env.reset_env, jax.random.key(0), params)
    if len(obs.shape) == 3:
        return Box(gymnasium.spaces.Box(0, 255, obs.shape, np.uint8))
    return Box(gymnasium.spaces.Box(-np.inf, np.inf, obs.shape, np.float32))


def _fields(params: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(params)}


def _alike(value: Any, default: Any) -> bool:
    """Whether an option is like its default: a switch, a number, or as many of them."""
    if isinstance(default, tuple):
        sized = isinstance(value, list | tuple) and len(value) == len(default)
        return sized and all(map(_alike, value, default))
    if isinstance(value, bool) or isinstance(default, bool):
        return type(value) is type(default)
    if default is None:
        return value is None or isinstance(value, numbers.Real)
    kind = numbers.Integral if isinstance(default, int) else numbers.Real
    return isinstance(value, kind)


def _as_bytes(pixels: Float[Array, "height width 3"]) -> UInt8[Array, "height width 3"]:
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def _package(params: Any) -> str:
    """The subpackage of the game: "craftax.craftax", or "craftax.craftax_classic"."""
    return ".".join(type(params).__module__.split(".")[:2])


@functools.cache
def _renderer(package: str) -> Callable[[PyTree], Float[Array, "height width 3"]]:
    renderer = importlib.import_module(f"{package}.renderer")
    pixels = load_constants(package).BLOCK_PIXEL_SIZE_IMG
    return jax.jit(renderer.make_craftax_pixel_renderer(pixels))
