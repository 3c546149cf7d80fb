"""gymnax: classic control, MinAtar, bsuite and more, in JAX (github.com/RobertTLange/gymnax)."""

import dataclasses
import functools
import inspect
import pickle
from typing import Any

import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces as gymnax_spaces
from gymnax.environments.environment import Environment
from gymnax.environments.misc import frozen_lake
from gymnax.registration import registered_envs
from gymnax.visualize import vis_gym
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Shaped, UInt8

from .. import spaces
from ..errors import UnknownNameError, UsageError
from ..spaces import Leaf, Space
from .autoreset import Report
from .drawing import draw_grid, quiet_pygame
from .lanes import Lanes


@dataclasses.dataclass(frozen=True, eq=False)
class Game:
    """A gymnax environment with its parameters.

    Hashed by identity, and shared by equal calls of `make`, so that they share compiled code.
    Parameters are constants of the compiled code.

    **Attributes:**

    - `source`, `options`: the arguments that it was made with.
    - `observation_space`: derived from actual observations, without bounds, since the bounds,
        shapes and types that gymnax declares are wrong in several environments.
    """

    source: Any
    options: dict[str, Any]
    env: Environment
    params: Any
    observation_space: Space
    action_space: Leaf
    num_agents: None = None
    state_size: None = None
    agent_kinds: None = None
    lanes_per_reset: None = None

    @property
    def max_episode_steps(self) -> int:
        return int(self.params.max_steps_in_episode)

    def reset(self, key: PRNGKeyArray) -> tuple[PyTree, Report]:
        """Starts an episode in one lane."""
        obs, state = self.env.reset_env(key, self.params)
        no = jnp.array(False)
        return state, Report(_observe(self.env, self.params, obs), jnp.array(0.0), no, no)

    def step(
        self, state: PyTree, action: Shaped[Array, "*action"], key: PRNGKeyArray
    ) -> tuple[PyTree, Report]:
        """Acts in one lane. Avoids gymnax's `step`, which resets in the same step."""
        obs, state, reward, terminated, _ = self.env.step_env(key, state, action, self.params)
        truncated = self.env.is_truncated(state, self.params)
        reward = jnp.asarray(reward, jnp.float32)
        return state, Report(_observe(self.env, self.params, obs), reward, terminated, truncated)

    def render(self, state: PyTree) -> UInt8[np.ndarray, "height width 3"] | None:
        """Draws one lane: classic control with Gymnasium's renderers, grids (MinAtar etc.) here.

        Returns `None` for bandits and chains, which have no picture.
        """
        name, state = self.env.name, jax.tree.map(np.asarray, state)
        if name in vis_gym.SUPPORTED_GYM_ENVS:
            renderer = _classic_renderer(name)
            vis_gym.set_gym_params(renderer, name, self.params)
            renderer.state = vis_gym.get_gym_state(state, name)
            return renderer.render()
        if len(self.observation_space.shape or ()) in (2, 3):
            return draw_grid(np.asarray(_look(self, state)))
        plan = _plan(self.env, state)
        return None if plan is None else draw_grid(plan)

    def replace(self, options: dict[str, Any]) -> "Game":
        """The same game with some options replaced."""
        return _game(self.source, self.options | options)


def _actions(env: Environment, params: Any) -> Leaf:
    """Its action space; a `Box` has bounds for every dimension."""
    space = env.action_space(params)
    if isinstance(space, gymnax_spaces.Discrete):
        return spaces.of_actions(gymnasium.spaces.Discrete(int(space.n)))
    if isinstance(space, gymnax_spaces.Box):
        low, high = (np.broadcast_to(x, space.shape) for x in (space.low, space.high))
        dtype = np.dtype(space.dtype).type
        return spaces.of_actions(
            gymnasium.spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype)
        )
    raise UsageError(f"actions of {env.name} must be Discrete or a Box, not {space}")


def _space(obs: Any) -> gymnasium.Space:
    """The space of observations that are dicts, tuples and arrays."""
    if isinstance(obs, dict):
        return gymnasium.spaces.Dict({name: _space(child) for name, child in obs.items()})
    if isinstance(obs, tuple):
        return gymnasium.spaces.Tuple([_space(child) for child in obs])
    return gymnasium.spaces.Box(-np.inf, np.inf, obs.shape, np.float32)


def _shapes(obs: Any) -> Any:
    return jax.tree.map(lambda x: x.shape, obs)


def _plan(env: Any, state: PyTree) -> Float[np.ndarray, "height width 3"] | None:
    """A map of obstacles, goal and agent, for mazes with first-person observations."""
    if hasattr(env, "occupied_map"):
        blocked, goal, place = env.occupied_map, state.goal, state.pos
    elif hasattr(env, "desc"):  # a frozen lake: its holes
        blocked, place = env.desc == frozen_lake.HOLE, divmod(int(state.position), env.ncol)
        goal = np.argwhere(np.asarray(env.desc) == frozen_lake.GOAL)[0]
    else:
        return None
    plan = np.zeros((*blocked.shape, 3), np.float32)
    plan[..., 0] = blocked
    plan[*goal, 1] = plan[*place, 2] = 1
    return plan


def ids() -> list[str]:
    """All gymnax environments except MNISTBandit, which needs a download."""
    return [name for name in registered_envs if name != "MNISTBandit-bsuite"]


def accepts(source: Any) -> bool:
    """Whether `source` is a gymnax environment, or a pair of one and its parameters."""
    if isinstance(source, tuple) and len(source) == 2:
        source = source[0]
    return isinstance(source, Environment)


def make(source: Any, num_envs: int, *, seed: int = 0, **options: Any) -> Lanes:
    """Makes lanes of a gymnax environment.

    **Arguments:**

    - `source`: a name, a gymnax environment, or a pair of one and its parameters.
    - `num_envs`: lanes.
    - `seed`: unused: all randomness comes from the keys.
    - `options`: arguments of the environment's constructor, and fields of its parameters
        (nearly all have `max_steps_in_episode`).
    """
    del seed
    return Lanes(_game(source, options), num_envs)


def _game(source: Any, options: dict[str, Any]) -> Game:
    if isinstance(source, str):
        if source not in registered_envs:
            raise UnknownNameError("gymnax environment", source, ids())
        try:
            # Pickled, since options may be lists or arrays, which cannot be keys of a cache.
            return _named_game(source, pickle.dumps(sorted(options.items())))
        except OSError as error:  # `MNISTBandit` downloads its images
            raise UsageError(
                f"'{source}' needs data that is not available ({error}): choose another environment"
            ) from error
    env, params = source if isinstance(source, tuple) else (source, source.default_params)
    return _configured(source, options, env, _replace(params, options))


@functools.cache
def _named_game(name: str, pickled_options: bytes) -> Game:
    options = dict(pickle.loads(pickled_options))
    arguments = inspect.signature(type(_default(name)[0])).parameters
    constructor = {key: options[key] for key in options if key in arguments}
    rest = {key: options[key] for key in options if key not in arguments}
    env, params = gymnax.make(name, **constructor) if constructor else _default(name)
    return _configured(name, options, env, _replace(params, rest, tuple(arguments)))


def _configured(source: Any, options: dict[str, Any], env: Environment, params: Any) -> Game:
    """Makes the game, with spaces that match its observations and actions."""
    actions = _actions(env, params)

    def seen(key: PRNGKeyArray, action: Array) -> tuple[PyTree, PyTree]:
        first, state = env.reset_env(key, params)
        later = env.step_env(key, state, action, params)[0]
        return _observe(env, params, first), _observe(env, params, later)

    first, later = jax.eval_shape(seen, jax.random.key(0), spaces.shapes(actions))
    if first != later:
        raise UsageError(
            f"{env.name} returns observations of shape {_shapes(first)} after reset, "
            f"but {_shapes(later)} after step: make them the same"
        )
    observations = spaces.of_observations(_space(first))
    return Game(source, options, env, params, observations, actions)


def _observe(env: Environment, params: Any, obs: Any) -> PyTree[Float[Array, "..."]]:
    """Converts observations to `float32`, and an index to one-hot."""
    space = env.observation_space(params)
    if isinstance(space, gymnax_spaces.Discrete):
        return jax.nn.one_hot(obs, space.n, dtype=jnp.float32)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), obs)


@functools.partial(jax.jit, static_argnums=0)
def _look(game: Game, state: PyTree) -> Array:
    # The picture does not depend on the key.
    return game.env.observe(jax.random.key(0), state, None, game.params)


@functools.cache
def _classic_renderer(name: str) -> Any:
    quiet_pygame()
    renderer = gymnasium.make(name, render_mode="rgb_array").unwrapped
    renderer.reset()
    return renderer


@functools.cache
def _default(name: str) -> tuple[Environment, Any]:
    return gymnax.make(name)


def _replace(params: Any, options: dict[str, Any], also_known: tuple[str, ...] = ()) -> Any:
    fields = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    for name, value in options.items():
        if name not in fields:
            raise UnknownNameError("option", name, [*fields, *also_known])
        if isinstance(fields[name], float) and isinstance(value, int):
            options = options | {name: float(value)}  # another type would recompile
    return params.replace(**options)
