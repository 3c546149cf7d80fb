"""Recording: what an agent does in an environment, as rows of a data set."""

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

_CHUNK_SECONDS = 0.5  # between looks at the progress and at Ctrl-C
_CHUNK_BYTES = 16 << 20
_CHUNK_STEPS = 1024


class Recorded(NamedTuple):
    """What was recorded so far.

    - `transitions`: what really happened; a data set has a row more for each episode.
    - `episodes`: that came to their own end, with the mean of their returns (`None` without any).
    - `cut`: episodes that were still running when the recording ended.
    """

    transitions: int = 0
    episodes: int = 0
    return_mean: float | None = None
    cut: int = 0


class _Rows(eqx.Module):
    """Rows of all lanes, `T` steps of them: those of a data set, `R`, before they are in order.

    `final`: which of them are final observations.
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
        """Some rows of one lane: a copy, which does not keep those of the others alive."""
        columns = Rows(*(getattr(self, name) for name in Rows._fields))
        return jax.tree.map(lambda x: np.array(x[begin:end, lane]), columns)


class _State(eqx.Module):
    """Where a recording stands. `sound`: whether frames so far were stacked as they should be."""

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
    """What a data set recorded from an environment is of.

    **Arguments:** `name`: the environment's id, `"<suite>/<name>"`. `preprocessing`: what was done
    beside what the environment says of itself. `source`: where the data come from.
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
    """Plays, and writes what happened as one shard of a data set.

    All lanes play until they have made exactly `num_steps` transitions together (steps into a
    reset are none). Episodes are written whole, in the order in which they began, so that the first
    rows of a shard favour neither short ones nor long ones; what was seen since the oldest of those
    running began is in memory until then. Those running at last are cut: their last transition is
    `truncated`, and what it led to is their final observation. The same arguments give the same
    rows (an emulator goes on where it stands).

    **Arguments:**

    - `env`: an environment of its own, since it is reset and stepped; made with the `options` of
        its `recording`, so that it plays the game's own episodes for the game's own rewards.
    - `num_steps`: transitions of all lanes together.
    - `epsilon`: probability of a random action; 0 is greedy, and 1 needs no training.
    - `shard`, `run`, `source`: as in `eqx_q.data.Shard`; what was recorded is added to `source`.
    - `on_chunk`: called about twice a second with what was recorded so far. What it raises ends
        the recording, and the shard is not committed.

    **Raises:** `UsageError` where the agent does not fit, or what would be written is not what it
    has seen.
    """
    _check_fits(agent, env)
    if num_steps < 1:
        raise UsageError(f"num_steps is {num_steps}: record at least one transition")
    state = _start(agent, env, key)
    epsilon = jnp.asarray(epsilon, jnp.float32)
    capacity = _capacity(env)
    lanes = _Lanes(env.num_envs)
    recorded = Recorded()
    length = 1  # the first chunk is compiled, so its time says nothing
    while recorded.transitions < num_steps:
        missing = num_steps - recorded.transitions
        length = min(length, capacity, -(-missing // env.num_envs))
        started = time.perf_counter()
        state, rows = _play(env, agent, state, epsilon, jnp.asarray(length), capacity)
        rows = jax.tree.map(np.asarray, rows)
        if not state.sound:
            raise UsageError(
                "observations are not stacks of frames as the environment says (its `recording`): "
                "what would be stored is not what the agent sees"
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
    """A timestep, of which only shapes count. `env` stays where it stands."""
    key = jax.random.key(0)
    if not env.on_host:
        return eqx.filter_eval_shape(env.reset, key)[1]
    with closing(env.replicate(1)) as one:
        return one.reset(key)[1]


def _stack(env: Env) -> int | None:
    """Of how many frames observations are stacks, if each frame is to be stored once.

    It is where they are nothing but a stack.
    """
    alone = isinstance(env.observation_space, Box) and env.num_agents is None
    return env.recording.stack if alone else None


def _check_fits(agent: Agent, env: Env) -> None:
    if agent.num_members is not None:
        raise UsageError("record the members of a population one by one: population.member(i)")
    check_fits(agent, env, "record in the environment that it was trained in")


def _capacity(env: Env) -> int:
    """The most steps of a chunk."""
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
    """Whether stacks of frames are those of an episode's start."""
    return jnp.all(_is_start(env, jnp.asarray(obs))) if _stack(env) else jnp.array(True)


def _is_start(env: Env, obs: Shaped[AnyArray, "N S *frame"]) -> Bool[Array, " N"]:
    newest = obs[:, -1:]
    before = newest if env.recording.stack_start == "repeat" else jnp.zeros_like(newest)
    return jnp.all(obs[:, :-1] == before, axis=tuple(range(1, obs.ndim)))


def _follows(env: Env, before: TimeStep, after: TimeStep) -> Bool[Array, ""]:
    """Whether the frames before an observation's newest are those that a reader will put there."""
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

    **Returns:** where it stands then, and `capacity + 1` rows. Those up to `length` are rows of a
    data set, and the one at `length` has no action yet, unless its episode has ended.
    """

    def row(now: TimeStep, action, then: TimeStep) -> _Rows:
        """What was seen and done, and what that brought."""
        # What follows an end is a reset, not a consequence: that row holds the final observation.
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
    """Where each lane stops, so that no more than the missing transitions are made.

    Of the last step the first lanes count, as many as are missing.

    **Returns:** how many transitions there are up to there, and how many rows of each lane.
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
    """What is known of an episode so far: its rows, in parts, and whether it has ended."""

    def __init__(self, *, ended: bool):
        self.parts: list[Rows] = []
        self.ended = ended

    def end(self) -> bool:
        """Ends it; tells whether it did so by itself.

        One whose environment broke is truncated where that was last sound; where it broke in its
        first step, nothing is left of it.
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
    """Episodes, until those that began before them have ended."""

    def __init__(self, num_lanes: int):
        self._newest = [_Episode(ended=True) for _ in range(num_lanes)]  # of each lane
        self._begun: collections.deque[_Episode] = collections.deque()  # in that order

    def add(self, rows: _Rows, stops: Int[np.ndarray, " N"]) -> list[float]:
        """Takes so many rows of each lane. Gives back the returns of the episodes that ended."""
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
        """Ends the episodes that are running, and tells how many they were.

        **Arguments:** `rows`, `stops`: what was last added; where a lane stops is its final row.
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
        """Takes out the episodes that have ended, up to the first that has not."""
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
    """With what was added."""
    recorded = recorded._replace(transitions=recorded.transitions + made)
    if not returns:
        return recorded
    total = (recorded.return_mean or 0.0) * recorded.episodes + sum(returns)
    episodes = recorded.episodes + len(returns)
    return recorded._replace(episodes=episodes, return_mean=total / episodes)
