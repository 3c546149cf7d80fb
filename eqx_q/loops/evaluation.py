"""Evaluation: plays whole episodes, and returns their returns, lengths and metrics."""

import math
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..agents import Agent, decide
from ..errors import UsageError
from ..types import AnyArray, Memory, Scalar, TimeStep
from ..wrappers import Env


class Episodes(eqx.Module):
    """Episodes played: returns (unclipped), lengths in steps, and the suite's metrics by name."""

    returns: Float[AnyArray, "*S episodes"]
    lengths: Int[AnyArray, "*S episodes"]
    metrics: dict[str, Float[AnyArray, "*S episodes"]]


class _State(eqx.Module):
    """The state of an evaluation; each lane fills its own row of `played`.

    `cut_length` and `cut_return`: those of the game's episode at its last cut, or 0.
    """

    env_state: object
    timestep: TimeStep
    memory: Memory
    key: PRNGKeyArray
    played: Episodes
    finished: Int[Array, " lanes"]
    capped: Bool[Array, "lanes episodes"]
    cut_length: Int[Array, " lanes"]
    cut_return: Float[Array, " lanes"]


def evaluate(
    agent: Agent,
    env: Env,
    *,
    num_episodes: int = 128,
    key: PRNGKeyArray,
    epsilon: Scalar = 0.0,
    max_episode_steps: int | None = None,
    min_steps: int = 0,
) -> Float[np.ndarray, "*S episodes"]:
    """Returns of `num_episodes` episodes (per member of a population), unclipped.

    The `returns` of `play_episodes`, which takes the same arguments.
    """
    played = play_episodes(
        agent,
        env,
        num_episodes=num_episodes,
        key=key,
        epsilon=epsilon,
        max_episode_steps=max_episode_steps,
        min_steps=min_steps,
    )
    return np.asarray(played.returns)


def play_episodes(
    agent: Agent,
    env: Env,
    *,
    num_episodes: int = 128,
    key: PRNGKeyArray,
    epsilon: Scalar = 0.0,
    max_episode_steps: int | None = None,
    min_steps: int = 0,
) -> Episodes:
    """Plays `num_episodes` episodes (per member of a population).

    Every lane plays the same number, so that short episodes are not overrepresented.

    **Arguments:**

    - `env`: an environment for this alone, since it is reset and stepped.
    - `num_episodes`: rounded up to a multiple of the lanes (of a member).
    - `key`: randomness of the environment, and of actions if `epsilon` is above 0.
    - `epsilon`: probability of a random action; 0 is greedy.
    - `max_episode_steps`: an episode still running after this many steps counts with its return so
        far, and its remainder counts as another episode; a warning says so.
    - `min_steps`: rounds of `num_episodes` are repeated until this many steps were played (by each
        member), for protocols that count steps.

    **Raises:** `UsageError` if the lanes do not divide over the members.
    """
    limits = _limits(epsilon, max_episode_steps)
    played = _play_round(agent, env, num_episodes, key, limits)
    while np.min(np.sum(played.lengths, axis=-1)) < min_steps:
        key = jax.random.fold_in(key, played.lengths.shape[-1])
        more = _play_round(agent, env, num_episodes, key, limits)
        played = jax.tree.map(lambda *x: np.concatenate(x, axis=-1), played, more)
    return played


def _play_round(
    agent: Agent, env: Env, num_episodes: int, key: PRNGKeyArray, limits: tuple[Array, Array]
) -> Episodes:
    """Plays `num_episodes` episodes, with a warning if some are cut."""
    state = _play(env, _initial(agent, env, num_episodes, key), agent, *limits)
    num_capped = int(jnp.sum(state.capped))
    if num_capped:
        warnings.warn(
            f"{num_capped} of {state.capped.size} episodes were cut at {limits[1]} steps; "
            "they count with their return so far",
            stacklevel=3,
        )
    members = () if agent.num_members is None else (agent.num_members,)
    return jax.tree.map(lambda x: np.asarray(x).reshape(*members, -1), state.played)


def compile_evaluation(
    agent: Agent,
    env: Env,
    *,
    num_episodes: int = 128,
    epsilon: Scalar = 0.0,
    max_episode_steps: int | None = None,
) -> None:
    """Compiles the program of `evaluate` for the same arguments, without playing."""
    state = _initial(agent, env, num_episodes, jax.random.key(0))
    finished = jnp.full_like(state.finished, state.capped.shape[1])
    state = eqx.tree_at(lambda state: state.finished, state, finished)
    jax.block_until_ready(_play(env, state, agent, *_limits(epsilon, max_episode_steps)).finished)


def _limits(epsilon: Scalar, max_episode_steps: int | None) -> tuple[Array, Array]:
    cap = np.iinfo(np.int32).max if max_episode_steps is None else max_episode_steps
    return jnp.asarray(epsilon, jnp.float32), jnp.asarray(cap)


def _initial(agent: Agent, env: Env, num_episodes: int, key: PRNGKeyArray) -> _State:
    """Every lane at the start of its first episode."""
    members = agent.num_members or 1
    if env.num_envs % members or num_episodes < 1:
        raise UsageError(
            f"cannot evaluate {num_episodes} episodes with {env.num_envs} lanes and {members} "
            "members: give at least one episode, and lanes that divide over the members"
        )
    per_lane = math.ceil(num_episodes / (env.num_envs // members))
    reset_key, key = jax.random.split(key)
    env_state, timestep = env.reset(reset_key)
    lanes = env.num_envs
    rows = jnp.zeros((lanes, per_lane))
    metrics: dict[str, AnyArray] = dict.fromkeys(timestep.episode.metrics, rows)
    return _State(
        env_state=env_state,
        timestep=timestep,
        memory=agent.initial_memory(lanes),
        key=key,
        played=Episodes(rows, rows.astype(jnp.int32), metrics),
        finished=jnp.zeros(lanes, jnp.int32),
        capped=jnp.zeros((lanes, per_lane), bool),
        cut_length=jnp.zeros(lanes, jnp.int32),
        cut_return=jnp.zeros(lanes),
    )


@eqx.filter_jit
def _play(env: Env, state: _State, agent: Agent, epsilon, cap) -> _State:
    """Plays until every lane has filled its row."""
    num_lanes, per_lane = state.capped.shape
    lanes = jnp.arange(num_lanes)

    def running(state):
        return jnp.any(state.finished < per_lane)

    def step(state):
        key, act_key, env_key = jax.random.split(state.key, 3)
        decision = decide(agent, state.timestep, state.memory, epsilon=epsilon, key=act_key)
        env_state, timestep = env.step(state.env_state, decision.action, env_key)
        # `first` after a lost life starts no new game episode; after a failed lane it does.
        broken = timestep.first & ~state.timestep.ended
        episode, anew = timestep.episode, state.timestep.episode.ended | broken
        cut_length = jnp.where(anew, 0, state.cut_length)
        cut_return = jnp.where(anew, 0.0, state.cut_return)
        length = episode.length - cut_length
        cut = (length == cap) & ~episode.ended
        counts = episode.ended | cut
        slot = jnp.where(counts, state.finished, per_lane)
        ended = Episodes(episode.returns - cut_return, length, episode.metrics)
        return _State(
            env_state=env_state,
            timestep=timestep,
            memory=decision.memory,
            key=key,
            played=jax.tree.map(
                lambda row, x: row.at[lanes, slot].set(x.astype(row.dtype), mode="drop"),
                state.played,
                ended,
            ),
            capped=state.capped.at[lanes, slot].set(cut, mode="drop"),
            finished=state.finished + counts,
            cut_length=jnp.where(cut, episode.length, cut_length),
            cut_return=jnp.where(cut, episode.returns, cut_return),
        )

    return jax.lax.while_loop(running, step, state)
