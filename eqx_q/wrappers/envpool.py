"""EnvPool: Atari and many others, in C++ threads (envpool.readthedocs.io)."""

import dataclasses
import functools
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import envpool
import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from envpool.registration import registry
from jax.core import Tracer
from jaxtyping import Array, Bool, PRNGKeyArray, Shaped, UInt8

from .. import spaces
from ..errors import UnknownNameError, UsageError
from ..spaces import Box, Leaf, Space
from ..types import AnyArray, Episode, Observation, TimeStep
from .conversion import Senses, complete
from .env import Env, Recording
from .envpool_rules import AtariRules, PlainRules, Rules
from .host import Host, HostEnv, Reported

# Options that the wrapper itself sets.
_FIXED = ("num_envs", "batch_size", "seed", "env_seed", "base_path", "task", "max_num_players")
_FIXED += ("gym_reset_return_info",)

_NO_LIMIT = (0, np.iinfo(np.int32).max)  # values of `max_episode_steps`: the game's own, or none
_OWN_LIMIT = ("envpool.highway", "envpool.jumanji")  # these ignore `max_episode_steps`
_MASKS = ("action_mask", "legal_action_mask")  # entries of `info`


@jax.tree_util.register_pytree_node_class
class Pool:
    """A pool of environments. Hashed by identity, since compiled code is bound to its pool.

    It is a node without leaves rather than a static field, so that `jit` notices when it is closed,
    and compiled code never writes to freed memory.

    **Attributes:**

    - `in_xla`: whether its step is an XLA call. It is not if the pool has 64-bit numbers, which JAX
        does not have: the call would get their layout wrong.
    - `takes`: its own action space.
    - `senses`: converts its environments' observations.
    """

    def __init__(
        self,
        name: str,
        num_envs: int,
        seed: int,
        leave_out: tuple[str, ...],
        options: dict[str, Any],
    ):
        config = _spec(name).config
        known = [option for option in config._fields if option not in _FIXED]
        self.name, self.num_envs, self.options = name, num_envs, options
        self.leave_out = leave_out
        self.rules: Rules = _rules(name)
        for option in options:
            if option not in known:
                raise UnknownNameError("option", option, known)
        keeps_limit = config.max_episode_steps == _NO_LIMIT[1] or _module(name) in _OWN_LIMIT
        if keeps_limit and "max_episode_steps" in options:
            raise UsageError(f"'{name}' has its own time limit: leave out max_episode_steps")
        try:
            self.rules.check(options)
            self.envpool: Any = envpool.make(
                name,
                env_type="gymnasium",
                num_envs=num_envs,
                seed=seed,
                render_mode="rgb_array",
                **options,
            )
        except (TypeError, ValueError, RuntimeError) as error:
            what = " ".join(str(error).split())
            raise UsageError(f"{name} cannot be made with {options}: {what}") from error
        spec = self.envpool.spec
        fields = (*spec._state_spec, *spec._action_spec)
        self.in_xla = all(jax.dtypes.canonicalize_dtype(kind) == kind for kind, *_ in fields)
        with warnings.catch_warnings(action="ignore"):  # about bounds that float32 cannot hold
            self.takes: gymnasium.Space = self.envpool.action_space
            sees = self.envpool.observation_space
        self.senses = Senses.of(_repaired(sees), spaces.of_actions(self.takes), leave_out)
        kind, shape, *_ = spec._action_spec[-1]
        self._action = np.dtype(kind), tuple(size for size in shape if size != -1)
        limit = self.envpool.config["max_episode_steps"]
        self.max_episode_steps = None if limit in _NO_LIMIT else int(limit)
        if self.in_xla:
            self.send: Any
            self.recv: Any
            self.handle, self.recv, self.send, _ = self.envpool.xla()

    def open(self) -> "Pool":
        """Returns itself. Raises `UsageError` after `close`."""
        if self.envpool is None:
            raise UsageError(f"this environment is closed: make 'envpool/{self.name}' again")
        return self

    def close(self) -> None:
        """Frees the environments."""
        jax.effects_barrier()  # no step may be running
        self.envpool = self.send = self.recv = None

    def told(self, action: AnyArray) -> AnyArray:
        """Actions, clipped to their bounds, in EnvPool's type and shape."""
        kind, shape = self._action
        if isinstance(self.takes, gymnasium.spaces.Box) and kind.kind == "f":
            action = action.clip(self.takes.low, self.takes.high)
        return action.astype(kind).reshape(self.num_envs, *shape)

    def see(self, obs: Any) -> Observation:
        """The visible parts of its observations, as arrays of their spaces' shapes."""
        space = self.senses.space
        return spaces.as_rows(space, spaces.select(space, self.senses.seen(obs)), self.num_envs)

    def mask(self, obs: Any, info: dict[str, Any], numpy: ModuleType) -> AnyArray | None:
        """The mask of legal actions, if the pool has one."""
        choices = sum(spaces.factors(self.senses.actions))
        given = next((info[name] for name in _MASKS if name in info), None)
        if self.senses.tells_mask:
            given = obs["action_mask"]
        if given is None or not choices or given.size != self.num_envs * choices:
            return None
        mask = given.reshape(self.num_envs, choices).astype(bool)
        return complete(self.senses.actions, mask, numpy)

    def replicate(self, num_envs: int, seed: int, options: dict[str, Any]) -> "Pool":
        """Makes another pool of the same kind."""
        options = {"leave_out": self.leave_out} | self.options | options
        return Pool(self.name, num_envs, seed, tuple(options.pop("leave_out")), options)

    def render(self, lane: int) -> Any:
        """A picture of one lane, or `None`."""
        if not _can_draw(self.name):
            return None
        try:
            return self.open().envpool.render(env_ids=lane)[0]
        except RuntimeError:  # not all environments can draw
            return None

    def tree_flatten(self) -> tuple[tuple[()], tuple["Pool", bool]]:
        """No leaves. Closing changes the structure, so that code compiled before is not reused."""
        return (), (self, self.envpool is None)

    @classmethod
    def tree_unflatten(cls, pool: tuple["Pool", bool], leaves: tuple[()]) -> "Pool":
        """The pool itself."""
        return pool[0]


class PoolState(eqx.Module):
    """The token that orders calls, the learner's episode (`ended`) and the game's episode."""

    token: UInt8[Array, "8"]
    ended: Bool[Array, " N"]
    episode: Episode


class EnvpoolEnv(Env):
    """Environments in lockstep, stepped in EnvPool's threads by XLA calls.

    Atari observations are stacks of frames, `uint8[stack, height, width]`. With `episodic_life` a
    lost life is `terminated`, and a `first` timestep follows, but `episode` continues until the end
    of the game. Returns of `episode` are those of the game, regardless of `reward_clip`.

    Environments are seeded when they are made; `reset` ignores its key and must be called outside
    `jit`.
    """

    pool: Pool
    observation_space: Space = eqx.field(static=True)
    action_space: Leaf = eqx.field(static=True)
    num_envs: int = eqx.field(static=True)
    num_agents: None = eqx.field(static=True)
    on_host: bool = eqx.field(static=True)
    max_episode_steps: int | None = eqx.field(static=True)

    def __init__(self, pool: Pool):
        self.pool = pool
        self.observation_space = pool.senses.space
        self.action_space = pool.senses.actions
        self.num_envs = pool.num_envs
        self.num_agents = None
        self.on_host = True
        self.max_episode_steps = pool.max_episode_steps

    @property
    def recording(self) -> Recording:
        """The recording of its rules, with `leave_out`."""
        pool = self.pool.open()
        recording = pool.rules.recording(pool.envpool.config)
        left_out = {"leave_out": list(pool.leave_out)} if pool.leave_out else {}
        return recording._replace(preprocessing={**recording.preprocessing, **left_out})

    def reset(self, key: PRNGKeyArray) -> tuple[PoolState, TimeStep]:
        pool = self.pool.open()
        if isinstance(jnp.zeros(()), Tracer):
            raise UsageError(
                "EnvPool resets on the host: call env.reset outside jit, scan and vmap"
            )
        jax.effects_barrier()  # no step may be running
        obs, info = pool.envpool.reset()
        no, zero = jnp.zeros(self.num_envs, bool), jnp.zeros(self.num_envs)
        episode = Episode(no, zero, jnp.zeros(self.num_envs, jnp.int32))
        timestep = TimeStep(self._see(obs), zero, no, no, ~no, episode, pool.mask(obs, info, jnp))
        return PoolState(jnp.asarray(pool.handle), no, episode), timestep

    def step(
        self, state: PoolState, action: Shaped[Array, "N *action"], key: PRNGKeyArray
    ) -> tuple[PoolState, TimeStep]:
        return self.recv(self.send(state, action, key))

    def send(
        self, state: PoolState, action: Shaped[Array, "N *action"], key: PRNGKeyArray
    ) -> PoolState:
        pool = self.pool.open()
        return dataclasses.replace(state, token=pool.send(state.token, pool.told(action)))

    def recv(self, sent: PoolState, after: PoolState | None = None) -> tuple[PoolState, TimeStep]:
        # EnvPool resets in the step after an episode ended.
        pool, state = self.pool.open(), sent
        # EnvPool does not read the token; what it depends on is computed before.
        token = state.token if after is None else state.token ^ after.token
        token, (obs, reward, terminated, truncated, info) = pool.recv(token)
        first, before = state.ended, state.episode
        # If a game ends in the very step of its time limit, EnvPool reports that it is truncated,
        # and often only that.
        game_reward, game_over = pool.rules.game(reward, terminated, info)
        game_over = game_over & ~first
        terminated = (terminated & ~first) | game_over
        truncated = truncated & ~terminated & ~first
        episode = Episode(
            game_over | truncated,
            jnp.where(before.ended, 0.0, before.returns + jnp.where(first, 0.0, game_reward)),
            jnp.where(before.ended, 0, before.length + ~first),
        )
        reward, mask = jnp.where(first, 0.0, reward), pool.mask(obs, info, jnp)
        timestep = TimeStep(self._see(obs), reward, terminated, truncated, first, episode, mask)
        return PoolState(token, terminated | truncated, episode), timestep

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any) -> "EnvpoolEnv":
        return EnvpoolEnv(self.pool.replicate(num_envs, seed, options))

    def render(self, state: PoolState, lane: int = 0) -> UInt8[np.ndarray, "height width 3"] | None:
        return self.pool.open().render(lane)

    def close(self) -> None:
        self.pool.close()

    def _see(self, obs: Any) -> Observation:
        return spaces.cast(self.observation_space, self.pool.see(obs))


class DoubleBuffered(Env):
    """Two pools, each with half of the lanes: while one is stepped, the agent acts in the other.

    Lane by lane it is like one pool, since every lane keeps its seed. Each pool has its own
    threads. Wrapped in another environment (several devices, exact resumes, parts of observations),
    it works, but acting waits for both halves.

    **Attributes:** `halves`: of the lanes.
    """

    halves: tuple[EnvpoolEnv, EnvpoolEnv]
    observation_space: Space = eqx.field(static=True)
    action_space: Leaf = eqx.field(static=True)
    num_envs: int = eqx.field(static=True)
    num_agents: None = eqx.field(static=True)
    on_host: bool = eqx.field(static=True)
    max_episode_steps: int | None = eqx.field(static=True)

    def __init__(self, first: EnvpoolEnv, second: EnvpoolEnv):
        self.halves = first, second
        self.observation_space = first.observation_space
        self.action_space = first.action_space
        self.num_envs = first.num_envs + second.num_envs
        self.num_agents = None
        self.on_host = True
        self.max_episode_steps = first.max_episode_steps

    @property
    def parts(self) -> tuple[Env, ...]:
        return self.halves

    @property
    def recording(self) -> Recording:
        """See `Env`; the same for both."""
        return self.halves[0].recording

    def reset(self, key: PRNGKeyArray) -> tuple[tuple[PoolState, ...], TimeStep]:
        return _joined(half.reset(key) for half in self.halves)

    def step(
        self,
        state: tuple[PoolState, PoolState],
        action: Shaped[Array, "N *action"],
        key: PRNGKeyArray,
    ) -> tuple[tuple[PoolState, ...], TimeStep]:
        actions = jnp.split(action, 2)
        sent = [
            half.send(state, action, key)
            for half, state, action in zip(self.halves, state, actions, strict=True)
        ]
        others = reversed(sent)
        ended = zip(self.halves, sent, others, strict=True)
        return _joined(half.recv(own, after) for half, own, after in ended)

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any) -> Env:
        """See `Env`; the new environment is a single pool if its lanes are odd in number."""
        if not options.pop("double_buffered", True) or num_envs % 2:
            return self.halves[0].replicate(num_envs, seed=seed, **options)
        half = num_envs // 2
        first = self.halves[0].replicate(half, seed=seed, **options)
        return DoubleBuffered(first, first.replicate(half, seed=seed + half))

    def render(
        self, state: tuple[PoolState, PoolState], lane: int = 0
    ) -> UInt8[np.ndarray, "height width 3"] | None:
        which, lane = divmod(lane, self.halves[0].num_envs)
        return self.halves[which].render(state[which], lane)

    def close(self) -> None:
        for half in self.halves:
            half.close()


def _joined(
    halves: Iterable[tuple[PoolState, TimeStep]],
) -> tuple[tuple[PoolState, ...], TimeStep]:
    states, timesteps = zip(*halves, strict=True)
    return states, jax.tree.map(lambda *x: jnp.concatenate(x), *timesteps)


class PoolHost(Host):
    """A pool whose step XLA cannot call directly; it is called back on the host."""

    num_agents = None

    def __init__(self, pool: Pool):
        self.pool = pool
        self.is_open = True
        self.leave_out = pool.leave_out
        self.observation_space, self.action_space = pool.senses.space, pool.senses.actions
        self.num_envs, self.max_episode_steps = pool.num_envs, pool.max_episode_steps
        self._no = np.zeros(self.num_envs, bool)
        self._seen = spaces.shapes(self.observation_space, self.num_envs)
        shapes: Any = {"obs": self._seen}
        for name, kind in {"reward": np.float32, "terminated": bool, "truncated": bool}.items():
            shapes[name] = jax.ShapeDtypeStruct((self.num_envs,), kind)
        self.shapes = shapes

    def reset(self) -> Reported:
        obs, _ = self.pool.envpool.reset()
        return self._report(obs, self._no, self._no, self._no)

    def step(self, action: Shaped[AnyArray, "N *action"]) -> Reported:
        return self._report(*self.pool.envpool.step(self.pool.told(np.asarray(action)))[:4])

    def replicate(self, num_envs: int, seed: int, options: dict[str, Any]) -> "PoolHost":
        return PoolHost(self.pool.replicate(num_envs, seed, options))

    def render(self, lane: int) -> Any:
        return self.pool.render(lane)

    def close(self) -> None:
        self.is_open = False
        self.pool.close()

    def _report(self, obs, reward, terminated, truncated) -> Reported:
        return {
            "obs": jax.tree.map(
                lambda x, seen: np.asarray(x, seen.dtype), self.pool.see(obs), self._seen
            ),
            "reward": np.asarray(reward, np.float32),
            "terminated": np.asarray(terminated, bool),
            "truncated": np.asarray(truncated, bool),
        }


def ids() -> list[str]:
    """All environments registered in EnvPool; some need additional packages or files."""
    return envpool.list_all_envs()


def accepts(source: Any) -> bool:
    """Always false: a pool must be seeded and configured when it is made."""
    return False


def make(
    source: str,
    num_envs: int,
    *,
    seed: int = 0,
    leave_out: Iterable[str] = (),
    double_buffered: bool = False,
    **options: Any,
) -> EnvpoolEnv | DoubleBuffered | HostEnv:
    """Makes a pool.

    **Arguments:**

    - `source`: the environment, such as `"Pong-v5"` or `"MiniGrid-DoorKey-5x5-v0"`.
    - `num_envs`: lanes.
    - `seed`: of the environments.
    - `leave_out`: entries of `Dict` observations, by path, that the agent does not see.
    - `double_buffered`: two pools with half of the lanes each, of which one is stepped while the
        agent acts in the other. An odd number of lanes stays in one pool.
    - `options`: EnvPool's own: `max_episode_steps`, `num_threads`, `frame_skip` and more; for Atari
        `episodic_life`, `reward_clip`, `repeat_action_probability`, `noop_max`, `stack_num`.
    """
    if not double_buffered or num_envs % 2:
        pool = Pool(source, num_envs, seed, tuple(leave_out), options)
        return EnvpoolEnv(pool) if pool.in_xla else HostEnv(PoolHost(pool))
    half = num_envs // 2
    pool = Pool(source, half, seed, tuple(leave_out), options)
    if not pool.in_xla:
        raise UsageError(
            f"'{source}' has 64-bit numbers, so Python steps it, which cannot overlap with acting: "
            "leave out double_buffered"
        )
    first = EnvpoolEnv(pool)
    return DoubleBuffered(first, first.replicate(half, seed=seed + half))


def _spec(name: str) -> Any:
    """EnvPool's specification of an environment for one player."""
    if name not in registry.specs:
        raise UnknownNameError("environment of EnvPool", name, ids())
    try:
        spec = envpool.make_spec(name)
    except (ImportError, RuntimeError) as error:
        what = " ".join(str(error).split())
        raise UsageError(f"EnvPool cannot make '{name}': {what}") from error
    players = spec.config.max_num_players
    if players > 1:
        raise UsageError(
            f"'{name}' has {players} players, which EnvPool does not put in one lane: for teams "
            "use pettingzoo/... or jaxmarl/..."
        )
    return spec


def _module(name: str) -> str:
    return registry.specs[name][0]


def _rules(name: str) -> Rules:
    return AtariRules() if _module(name) == "envpool.atari" else PlainRules()


def _repaired(space: gymnasium.Space) -> Space:
    """`space` without the bounds that C++ left unset: the least positive and largest numbers."""

    def repaired(path: str, leaf: Leaf) -> Leaf:
        if not isinstance(leaf, Box) or leaf.dtype.kind != "f":
            return leaf
        limits = np.finfo(str(leaf.dtype))
        low = np.where(leaf.low == limits.tiny, -np.inf, leaf.low)
        high = np.where(leaf.high == limits.max, np.inf, leaf.high)
        return Box(gymnasium.spaces.Box(low, high, leaf.shape, leaf.dtype.type))

    return spaces.map_leaves(repaired, spaces.hashable(space))


@functools.cache
def _can_draw(name: str) -> bool:
    """Whether it is safe to ask for a picture.

    MuJoCo ends the process if there is no OpenGL, so this tries it in another process.
    """
    if not _module(name).startswith("envpool.mujoco"):
        return True
    code = (
        f"import envpool; pool = envpool.make({name!r}, env_type='gymnasium', num_envs=1, "
        "render_mode='rgb_array'); pool.reset(); pool.render(env_ids=0)"
    )
    with tempfile.TemporaryDirectory() as directory:  # for MuJoCo's log
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, cwd=directory).returncode == 0
