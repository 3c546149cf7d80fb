"""Recording: plays an agent in an environment and writes a data set."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from ..agents import Agent, decide
from ..data import Description, Rows, Writer
from ..data.dataset import EXTRAS, no_action
from ..errors import UsageError
from ..spaces import Box, shapes
from ..types import AnyArray, Memory, Observation, Scalar, TimeStep
from ..wrappers import Env
from ..wrappers.host import closing
from .source import check_fits

_CHUNK_SECONDS = 0.5  # between updates of the progress and checks for Ctrl-C
_CHUNK_BYTES = 16 << 20
_CHUNK_STEPS = 1024


class Recorded(NamedTuple):
    """The amount recorded so far.

    - `transitions`: real ones; a data set has one more row per episode.
    - `episodes`: complete episodes; `return_mean`: their mean return (`None` without any).
    - `cut`: episodes that were still running when the recording ended.
    """

    transitions: int = 0
    episodes: int = 0
    return_mean: float | None = None
    cut: int = 0


class _Rows(eqx.Module):
    """`T` steps of rows of all lanes, not yet in the order of a data set.

    `final`: mask of final observations.
    """

    obs: Observation
    action: Shaped[AnyArray, "*lanes_and_action"]
    reward: Float[AnyArray, "*lanes"]
    terminated: Bool[AnyArray, "*lanes"]
    truncated: Bool[AnyArray, "*lanes"]
    first: Bool[AnyArray, "*lanes"]
    action_mask: Bool[AnyArray, "*lanes_and_actions"] | None
    agent_mask: Bool[AnyArray, "*lanes M"] | None
    agent_reward: Float[AnyArray, "*lanes M"] | None
    global_state: Float[AnyArray, "*lanes S"] | None
    final: Bool[AnyArray, "*lanes"]

    def of_lane(self, lane: int, begin: int, end: int) -> Rows:
        """Rows of one lane, copied so that those of the other lanes can be freed."""
        columns = Rows(*(getattr(self, name) for name in Rows._fields))
        return jax.tree.map(lambda x: np.array(x[begin:end, lane]), columns)


class _State(eqx.Module):
    """The state of a recording. `sound`: whether all frames so far were stacked as declared."""

    env_state: PyTree
    timestep: TimeStep
    memory: Memory
    key: PRNGKeyArray
    sound: Bool[Array, ""]


def describe(
    env: Env,
    name: str,
    *,
    preprocessing: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
) -> Description:
    """The description of a data set that is recorded from an environment.

    **Arguments:** `name`: the environment's id, `"<suite>/<name>"`. `preprocessing`: additional to
    the environment's own `recording.preprocessing`. `source`: where the data come from.
    """
    recording = env.recording
    timestep = _seen(env)
    extras = {name: getattr(timestep, name) for name in EXTRAS}
    return Description(
        env=name,
        observation_space=env.observation_space,
        action_space=env.action_space,
        stack=_stack(env),
        stack_start=recording.stack_start,
        preprocessing={**recording.preprocessing, **(preprocessing or {})},
        source=source or {},
        num_agents=env.num_agents,
        extras={name: x.shape[1:] for name, x in extras.items() if x is not None},
    )


def record(
    agent: Agent,
    env: Env,
    writer: Writer,
    *,
    num_steps: int,
    key: PRNGKeyArray,
    shard: str,
    epsilon: Scalar = 0.0,
    run: int | None = None,
    source: Mapping[str, Any] | None = None,
    on_chunk: Callable[[Recorded], None] | None = None,
) -> Recorded:
    """Plays episodes and writes them as one shard of a data set.

    All lanes play until they have made exactly `num_steps` transitions together (steps into a
    reset do not count). Episodes are written whole, in the order in which they began, so that the
    first rows of a shard favour neither short nor long ones; later episodes wait in memory until
    the oldest running one ends. Episodes that run at the end are cut: their last transition is
    `truncated`, and its result is their final observation. The same arguments yield the same rows
    (except from an emulator, which continues from its current state).

    **Arguments:**

    - `env`: an environment for this alone, since it is reset and stepped; made with the `options`
        of its `recording`, so that it plays the game's own episodes with the game's own rewards.
    - `num_steps`: transitions of all lanes together.
    - `epsilon`: probability of a random action; 0 is greedy, and 1 needs no training.
    - `shard`, `run`, `source`: as in `eqx_q.data.Shard`; the final `Recorded` is added to `source`.
    - `on_chunk`: called about twice a second with the amount recorded so far. An exception in it
        ends the recording, and the shard is not committed.

    **Raises:** `UsageError` if the agent does not fit, or if observations are not stacked as the
    environment declares.
    """
    _check_fits(agent, env)
    if num_steps < 1:
        raise UsageError(f"num_steps={num_steps}: record at least one transition")
    state = _start(agent, env, key)
    epsilon = jnp.asarray(epsilon, jnp.float32)
    capacity = _capacity(env)
    lanes = _Lanes(env.num_envs)
    recorded = Recorded()
    length = 1  # the first chunk includes compilation, so its time is not representative
    while recorded.transitions < num_steps:
        missing = num_steps - recorded.transitions
        length = min(length, capacity, -(-missing // env.num_envs))
        started = time.perf_counter()
        state, rows = _play(env, agent, state, epsilon, jnp.asarray(length), capacity)
        rows = jax.tree.map(np.asarray, rows)
        if not state.sound:
            raise UsageError(
                "observations are not stacks of frames as the environment's `recording` declares, "
                "so the data would differ from what the agent sees: correct its `recording`"
            )
        seconds = time.perf_counter() - started
        made, stops = _cut(rows, length, missing)
        recorded = _count(recorded, made, lanes.add(rows, stops))
        if recorded.transitions == num_steps:
            recorded = recorded._replace(cut=lanes.cut(rows, stops))
        for episodes in lanes.written():
            writer.append(episodes)
        if on_chunk is not None:
            on_chunk(recorded)
        length = 16 if length == 1 else max(1, int(length * min(4, _CHUNK_SECONDS / seconds)))
    writer.commit(shard, run, {**(source or {}), **recorded._asdict()})
    return recorded


def _seen(env: Env) -> TimeStep:
    """A timestep, for its shapes only. Does not touch the state of `env`."""
    key = jax.random.key(0)
    if not env.on_host:
        return eqx.filter_eval_shape(env.reset, key)[1]
    with closing(env.replicate(1)) as one:
        return one.reset(key)[1]


def _stack(env: Env) -> int | None:
    """The number of stacked frames, if observations are nothing but a stack; else `None`.

    Then each frame is stored once.
    """
    alone = isinstance(env.observation_space, Box) and env.num_agents is None
    return env.recording.stack if alone else None


def _check_fits(agent: Agent, env: Env) -> None:
    if agent.num_members is not None:
        raise UsageError("record the members of a population one by one: population.member(i)")
    check_fits(agent, env, "record in the environment that it was trained in")


def _capacity(env: Env) -> int:
    """The largest number of steps in a chunk."""
    arrays = jax.tree.leaves(shapes(env.observation_space, env.num_envs, env.num_agents or 1))
    row = sum(x.size * x.dtype.itemsize for x in arrays) // (_stack(env) or 1)
    return int(np.clip(_CHUNK_BYTES // max(1, row), 1, _CHUNK_STEPS))


def _start(agent: Agent, env: Env, key: PRNGKeyArray) -> _State:
    """Every lane at the start of its first episode."""
    reset_key, key = jax.random.split(key)
    env_state, timestep = env.reset(reset_key)
    memory = agent.initial_memory(env.num_envs)
    return _State(env_state, timestep, memory, key, _starts_well(env, timestep.obs))


def _starts_well(env: Env, obs: Observation) -> Bool[Array, ""]:
    """Whether all stacks of frames are those of an episode's start."""
    return jnp.all(_is_start(env, jnp.asarray(obs))) if _stack(env) else jnp.array(True)


def _is_start(env: Env, obs: Shaped[AnyArray, "N S *frame"]) -> Bool[Array, " N"]:
    newest = obs[:, -1:]
    before = newest if env.recording.stack_start == "repeat" else jnp.zeros_like(newest)
    return jnp.all(obs[:, :-1] == before, axis=tuple(range(1, obs.ndim)))


def _follows(env: Env, before: TimeStep, after: TimeStep) -> Bool[Array, ""]:
    """Whether all but the newest frames are those that a reader will reconstruct."""
    if not _stack(env):
        return jnp.array(True)
    shifted = after.obs[:, :-1] == before.obs[:, 1:]
    shifted = jnp.all(shifted, axis=tuple(range(1, after.obs.ndim)))
    return jnp.all(jnp.where(after.first, _is_start(env, after.obs), shifted))


@eqx.filter_jit
def _play(
    env: Env, agent: Agent, state: _State, epsilon: Array, length: Int[Array, ""], capacity: int
) -> tuple[_State, _Rows]:
    """Plays `length` steps.

    **Returns:** the new state, and `capacity + 1` rows. The first `length` are rows of a data set;
    the row at `length` has no action yet, unless its episode has ended.
    """

    def row(now: TimeStep, action, then: TimeStep) -> _Rows:
        """The row of a step: the observation, the action and its outcome."""
        # The step after an end is a reset, so its row only holds the final observation.
        final = then.first.reshape(-1, *[1] * (action.ndim - 1))
        return _Rows(
            obs=now.obs[:, -1] if _stack(env) else now.obs,
            action=jnp.where(final, no_action(action.dtype), action),
            reward=then.reward,
            terminated=then.terminated,
            truncated=then.truncated,
            first=now.first,
            action_mask=now.action_mask,
            agent_mask=now.agent_mask,
            agent_reward=then.agent_reward,
            global_state=now.global_state,
            final=then.first,
        )

    def step(index, carry):
        state, rows = carry
        now = state.timestep
        key, act_key, env_key = jax.random.split(state.key, 3)
        decision = decide(agent, now, state.memory, epsilon=epsilon, key=act_key)
        env_state, then = env.step(state.env_state, decision.action, env_key)
        rows = _put(rows, row(now, decision.action, then), index)
        sound = state.sound & _follows(env, now, then)
        return _State(env_state, then, decision.memory, key, sound), rows

    def last(state):
        now = state.timestep
        team = () if env.num_agents is None else (env.num_agents,)
        shape = (env.num_envs, *team, *(env.action_space.shape or ()))
        dtype = jnp.float32 if isinstance(env.action_space, Box) else jnp.int32
        nothing = jax.tree.map(jnp.zeros_like, now)
        then = dataclasses.replace(nothing, first=now.ended)
        return row(now, jnp.zeros(shape, dtype), then)

    rows = jax.tree.map(lambda x: jnp.zeros((capacity + 1, *x.shape), x.dtype), last(state))
    state, rows = jax.lax.fori_loop(0, length, step, (state, rows))
    return state, _put(rows, last(state), length)


def _put(rows: _Rows, row: _Rows, index) -> _Rows:
    return jax.tree.map(
        lambda rows, x: jax.lax.dynamic_update_index_in_dim(rows, x.astype(rows.dtype), index, 0),
        rows,
        row,
    )


def _cut(rows: _Rows, length: int, missing: int) -> tuple[int, Int[np.ndarray, " N"]]:
    """Stops each lane so that all together make no more than the missing transitions.

    Of the last step, only the first lanes count.

    **Returns:** the number of transitions, and the number of rows of each lane.
    """
    real = ~rows.final[:length]
    num_lanes = real.shape[1]
    made = int(real.sum())
    if made < missing:
        return made, np.full(num_lanes, length)
    step, lane = divmod(int(np.flatnonzero(real)[missing - 1]), num_lanes)
    stops = step + (np.arange(num_lanes) <= lane)
    return missing, stops + rows.final[stops, np.arange(num_lanes)]  # a final row stays


class _Episode:
    """An episode so far: its rows, in parts, and whether it has ended."""

    def __init__(self, *, ended: bool):
        self.parts: list[Rows] = []
        self.ended = ended

    def end(self) -> bool:
        """Ends the episode; returns whether it was complete.

        If its environment failed, it is truncated at the last good observation; if that happened in
        its first step, it is dropped.
        """
        self.ended = True
        rows = _joined(self.parts)
        if len(rows.first) == 1:
            self.parts = []
            return False
        own_end = bool(rows.terminated[-2] | rows.truncated[-2])
        rows.truncated[-2] |= not own_end
        self.parts = [rows]
        return own_end

    @property
    def returns(self) -> float:
        """The sum of its rewards."""
        return float(sum(part.reward.sum(dtype=np.float64) for part in self.parts))


class _Lanes:
    """Holds episodes until all that began before them have ended."""

    def __init__(self, num_lanes: int):
        self._newest = [_Episode(ended=True) for _ in range(num_lanes)]  # one per lane
        self._begun: collections.deque[_Episode] = collections.deque()  # in order of their start

    def add(self, rows: _Rows, stops: Int[np.ndarray, " N"]) -> list[float]:
        """Adds the first `stops` rows of each lane; returns the returns of complete episodes."""
        returns, begins = [], [0] * len(stops)
        inside = np.arange(len(rows.final))[:, None] < stops
        for step, lane in np.argwhere((rows.first | rows.final) & inside).tolist():  # by time
            if rows.first[step, lane]:
                self._newest[lane], begins[lane] = _Episode(ended=False), step
                self._begun.append(self._newest[lane])
            if rows.final[step, lane]:
                episode = self._newest[lane]
                episode.parts.append(rows.of_lane(lane, begins[lane], step + 1))
                if episode.end():
                    returns.append(episode.returns)
        for lane, stop in enumerate(stops.tolist()):
            if not self._newest[lane].ended and begins[lane] < stop:
                self._newest[lane].parts.append(rows.of_lane(lane, begins[lane], stop))
        return returns

    def cut(self, rows: _Rows, stops: Int[np.ndarray, " N"]) -> int:
        """Ends the running episodes, and returns their number.

        **Arguments:** `rows`, `stops`: those of the last `add`; a lane's row at its stop becomes
        its final row.
        """
        running = [lane for lane, episode in enumerate(self._newest) if not episode.ended]
        for lane in running:
            episode, stop = self._newest[lane], int(stops[lane])
            known = _joined(episode.parts)
            seen = _joined([known, rows.of_lane(lane, stop, stop + 1)])
            whole = Rows.of_episode(
                seen.obs,
                known.action,
                known.reward,
                terminated=False,
                action_mask=seen.action_mask,
                agent_mask=seen.agent_mask,
                agent_reward=known.agent_reward,
                global_state=seen.global_state,
            )
            episode.parts, episode.ended = [whole], True
        return len(running)

    def written(self) -> Iterator[Rows]:
        """Removes and yields ended episodes, up to the first that is still running."""
        parts: list[Rows] = []
        size = 0
        while self._begun and self._begun[0].ended:
            parts += (of_episode := self._begun.popleft().parts)
            size += sum(x.nbytes for x in jax.tree.leaves(of_episode))
            if size > _CHUNK_BYTES:
                yield _joined(parts)
                parts, size = [], 0
        if parts:
            yield _joined(parts)


def _joined(parts: list[Rows]) -> Rows:
    return jax.tree.map(lambda *columns: np.concatenate(columns), *parts)


def _count(recorded: Recorded, made: int, returns: list[float]) -> Recorded:
    """Adds transitions and returns to the count."""
    recorded = recorded._replace(transitions=recorded.transitions + made)
    if not returns:
        return recorded
    total = (recorded.return_mean or 0.0) * recorded.episodes + sum(returns)
    episodes = recorded.episodes + len(returns)
    return recorded._replace(episodes=episodes, return_mean=total / episodes)
