"""Atari: real ROMs in EnvPool's C++ threads, stepped inside XLA (envpool.readthedocs.io)."""

from typing import Any

import envpool
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from envpool.atari.registration import atari_game_list
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt8

from ..errors import UnknownNameError, UsageError
from ..spaces import Box, Discrete
from ..types import Episode, TimeStep
from .env import Env, Recording

# What the wrapper itself decides.
_FIXED = ("num_envs", "batch_size", "seed", "base_path", "task", "max_num_players")
_FIXED += ("gym_reset_return_info",)

# What is done to observations and actions.
_PREPROCESSING = ("frame_skip", "gray_scale", "img_height", "img_width", "use_inter_area_resize")
_PREPROCESSING += ("full_action_space", "repeat_action_probability", "mode", "difficulty")


@jax.tree_util.register_pytree_node_class
class Pool:
    """The emulators. Hashed by identity, since compiled code is bound to the pool it came from.

    A node without leaves rather than a static field, so that `jit` sees when it is closed, and
    compiled code never writes to memory that has been freed.
    """

    def __init__(self, name: str, num_envs: int, seed: int, options: dict[str, Any]):
        known = [
            option for option in envpool.make_spec(name).config._fields if option not in _FIXED
        ]
        for option in options:
            if option not in known:
                raise UnknownNameError("option", option, known)
        self.name, self.options = name, options
        try:
            _check(options)
            self.envpool: Any = envpool.make(
                name,
                env_type="gymnasium",
                num_envs=num_envs,
                seed=seed,
                render_mode="rgb_array",
                **options,
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{name} cannot be made with {options}: {error}") from error
        self.step: Any
        self.handle, _, _, self.step = self.envpool.xla()

    def open(self) -> "Pool":
        """Itself. Raises `UsageError` after `close`."""
        if self.envpool is None:
            raise UsageError(f"this environment is closed: make 'envpool/{self.name}' anew")
        return self

    def close(self) -> None:
        """Frees the emulators."""
        jax.effects_barrier()  # no step may be under way
        self.envpool = self.step = None

    def tree_flatten(self) -> tuple[tuple[()], tuple["Pool", bool]]:
        """No leaves. Once it is closed nothing compiled before matches, and `open` is asked."""
        return (), (self, self.envpool is None)

    @classmethod
    def tree_unflatten(cls, pool: tuple["Pool", bool], leaves: tuple[()]) -> "Pool":
        """Itself."""
        return pool[0]


def _check(options: dict[str, Any]) -> None:
    """Refuses what EnvPool lets pass, to do something senseless later."""
    at_least_one = ("frame_skip", "stack_num", "img_height", "img_width", "max_episode_steps")
    for option in (*at_least_one, "noop_max"):  # 1: the one frame that it always plays
        if options.get(option, 1) < 1:
            raise ValueError(f"{option} is {options[option]}: give 1 or more")
    if not 0 <= options.get("repeat_action_probability", 0) <= 1:
        raise ValueError("repeat_action_probability must lie between 0 and 1")


class PoolState(eqx.Module):
    """The token that orders calls, and the episodes: the learner's (`ended`) and the game's."""

    token: UInt8[Array, "8"]
    ended: Bool[Array, " N"]
    episode: Episode


class EnvpoolEnv(Env):
    """Atari games in lockstep, in EnvPool's threads.

    Observations are stacks of frames, `uint8[stack, height, width]`. With `episodic_life` a lost
    life is `terminated`, and a `first` timestep follows; `episode` goes on to the end of the game.
    Rewards of `episode` are those of the game, whatever `reward_clip`.

    The emulators are seeded when they are made, and `reset` ignores its key. It must be called
    outside `jit`.
    """

    pool: Pool
    observation_space: Box = eqx.field(static=True)
    action_space: Discrete = eqx.field(static=True)
    num_envs: int = eqx.field(static=True)
    num_agents: None = eqx.field(static=True)
    on_host: bool = eqx.field(static=True)
    max_episode_steps: int = eqx.field(static=True)

    def __init__(self, pool: Pool):
        self.pool = pool
        self.observation_space = Box(pool.envpool.observation_space)
        self.action_space = Discrete(pool.envpool.action_space)
        self.num_envs = len(pool.envpool)
        self.num_agents = None
        self.on_host = True
        self.max_episode_steps = pool.envpool.config["max_episode_steps"]

    @property
    def recording(self) -> Recording:
        """Whole games, unclipped. Frames of three colours are three channels: none is apart."""
        config = self.pool.open().envpool.config
        return Recording(
            options={"episodic_life": False, "reward_clip": False},
            stack=config["stack_num"] if config["gray_scale"] else None,
            stack_start="repeat",
            preprocessing={name: config[name] for name in _PREPROCESSING},
        )

    def reset(self, key: PRNGKeyArray) -> tuple[PoolState, TimeStep]:
        pool = self.pool.open()
        if isinstance(jnp.zeros(()), Tracer):
            raise UsageError(
                "EnvPool resets on the host: call env.reset outside jit, scan and vmap"
            )
        jax.effects_barrier()  # no step may be under way
        obs, _ = pool.envpool.reset()
        no, zero = jnp.zeros(self.num_envs, bool), jnp.zeros(self.num_envs)
        episode = Episode(no, zero, jnp.zeros(self.num_envs, jnp.int32))
        timestep = TimeStep(jnp.asarray(obs), zero, no, no, ~no, episode)
        return PoolState(jnp.asarray(pool.handle), no, episode), timestep

    def step(
        self, state: PoolState, action: Int[Array, " N"], key: PRNGKeyArray
    ) -> tuple[PoolState, TimeStep]:
        # EnvPool resets in the step after an episode ended. With `episodic_life`, after a lost
        # life, that step changes nothing in the game.
        token, (obs, reward, terminated, truncated, info) = self.pool.open().step(
            state.token, action.astype(jnp.int32)
        )
        first, before = state.ended, state.episode
        # Of a game that ends in the very step of its time limit EnvPool says that it is truncated.
        game_over = info["terminated"].astype(bool) & ~first
        terminated = (terminated & ~first) | game_over
        truncated = truncated & ~terminated & ~first
        episode = Episode(
            game_over | truncated,
            jnp.where(before.ended, 0.0, before.returns + jnp.where(first, 0.0, info["reward"])),
            jnp.where(before.ended, 0, before.length + ~first),
        )
        reward = jnp.where(first, 0.0, reward)
        timestep = TimeStep(obs, reward, terminated, truncated, first, episode)
        return PoolState(token, terminated | truncated, episode), timestep

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any) -> "EnvpoolEnv":
        return make(self.pool.name, num_envs, seed=seed, **(self.pool.options | options))

    def render(self, state: PoolState, lane: int = 0) -> UInt8[np.ndarray, "height width 3"]:
        return self.pool.open().envpool.render(env_ids=lane)[0]

    def close(self) -> None:
        self.pool.close()


def ids() -> list[str]:
    """All Atari games whose ROMs come with EnvPool."""
    names = ("".join(word.capitalize() for word in game.split("_")) for game in atari_game_list)
    return [f"{name}-v5" for name in names]


def accepts(source: Any, options: dict[str, Any]) -> bool:
    """Pools of the caller's own are not taken: a pool must be seeded and wired when it is made."""
    return False


def make(source: str, num_envs: int, *, seed: int = 0, **options: Any) -> EnvpoolEnv:
    """Makes a pool of Atari games.

    **Arguments:**

    - `source`: the game, such as `"Pong-v5"`.
    - `num_envs`: lanes.
    - `seed`: of the emulators.
    - `options`: EnvPool's own: `episodic_life`, `reward_clip`, `repeat_action_probability`,
        `noop_max`, `frame_skip`, `stack_num`, `max_episode_steps`, `num_threads` and more.
    """
    if source not in ids():
        raise UnknownNameError("Atari game", source, ids())
    return EnvpoolEnv(Pool(source, num_envs, seed, options))
