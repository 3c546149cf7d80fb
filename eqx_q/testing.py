"""Checks environments against the contract: `check_env`."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from . import spaces
from .agents.actions import Actions
from .errors import UsageError
from .types import Episode, TimeStep
from .wrappers import Env

_BINS = 5  # random actions of a `Box` are on a grid with its bounds
_NEVER = "no episode ended in {} steps, so that ends of episodes are not checked: raise num_steps"


def check_env(env: Any, *, num_steps: int = 200, key: PRNGKeyArray | None = None) -> None:
    """Plays random legal actions, and checks the rules that every `eqx_q.Env` keeps.

    It checks types, shapes and bounds, the boundary rule of `eqx_q.TimeStep`, the statistics of
    episodes, and that `reset` and `step` are pure and can be compiled. Rules that nobody can see
    from outside remain: that a final observation is the true one is only checked against the
    observation that follows.

        eqx_q.testing.check_env(Maze(num_envs=4))

    **Arguments:** `env`: an `eqx_q.Env`. `num_steps` to play in every lane: several episodes should
    end in them. `key`: of all randomness; default: always the same.

    **Raises:** `UsageError`, which says of each rule that is broken where that was seen.
    """
    reset_key, play_key = jax.random.split(jax.random.key(0) if key is None else key)
    _raise(_attributes(env))
    try:
        state, timestep = env.reset(reset_key)
    except Exception as error:
        raise _failed("reset", error) from error
    _raise(_kinds(env, state, timestep))
    _raise(_start(timestep))
    step = eqx.filter_jit(type(env).step)
    action = _random_action(env, timestep, play_key)
    try:
        after = eqx.filter_eval_shape(env.step, state, action, play_key)
    except Exception as error:
        raise _failed("step (traced, as in jax.jit)", error) from error
    _raise(_alike("after a step, state", after[0], "after reset", state))
    _raise(_alike("after a step, timestep", after[1], "after reset", timestep))
    played, end = _play(env, step, state, timestep, num_steps, play_key)
    broken = [*_values(env, played), *_boundaries(played), *_episodes(env, played)]
    if not env.on_host:
        broken += _purity(env, step, state, timestep, end, play_key)
    broken += _replica(env)
    _raise(iter(broken))
    if not played.timesteps.ended.any():
        warnings.warn(_NEVER.format(num_steps), stacklevel=2)


class _Played(NamedTuple):
    """Actions `[T, N, ...]` and timesteps `[T + 1, N, ...]`, as NumPy."""

    actions: np.ndarray
    timesteps: Any


class _End(NamedTuple):
    """A state in which an episode has ended in some `lanes`."""

    state: PyTree
    timestep: TimeStep
    lanes: np.ndarray


def _raise(broken: Iterator[str]) -> None:
    rules = list(broken)
    if rules:
        number = "a rule" if len(rules) == 1 else f"{len(rules)} rules"
        raise UsageError(f"the environment breaks {number} of the contract: {'; '.join(rules)}")


def _failed(what: str, error: Exception) -> UsageError:
    told = " ".join(f"{type(error).__name__}: {error}".split())
    return UsageError(f"{what} fails: {told[:500]}")


def _attributes(env: Any) -> Iterator[str]:
    if not isinstance(env, Env):
        yield f"it is a {type(env).__name__}, no eqx_q.Env: subclass that, or give it to eqx_q.make"
        return
    for name, of in (
        ("observation_space", spaces.of_observations),
        ("action_space", spaces.of_actions),
    ):
        space = getattr(env, name)
        try:
            is_ours = type(space) is type(of(space)) and hash(space) == hash(of(space))
        except (TypeError, ValueError):
            is_ours = False
        if not is_ours:
            made_by = f"eqx_q.spaces.{of.__name__}"
            yield f"{name} is {space!r}, which is not hashable: make it by {made_by}"
    if not isinstance(env.num_envs, int) or env.num_envs < 1:
        yield f"num_envs is {env.num_envs!r}, not a number of lanes"
    if not isinstance(env.on_host, bool):
        yield f"on_host is {env.on_host!r}, not whether the environment lives outside JAX"


def _kinds(env: Env, state: PyTree, timestep: Any) -> Iterator[str]:
    """What `reset` returns has the types and shapes of the contract."""
    if not isinstance(timestep, TimeStep):
        yield f"reset returns a {type(timestep).__name__} beside the state, not a TimeStep"
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not eqx.is_array(leaf):
            name = jax.tree_util.keystr(path)
            yield (
                f"the state is no PyTree of arrays: state{name} is a {type(leaf).__name__}; keep "
                "what does not change in fields of the environment"
            )
    lanes = (env.num_envs,)
    team = () if env.num_agents is None else (env.num_agents,)
    choices = sum(spaces.factors(env.action_space))
    expected: Any = spaces.shapes(env.observation_space, *lanes, *team)
    yield from _alike("obs", timestep.obs, "its space is for", expected)
    fields = {
        "reward": (lanes, np.float32),
        "terminated": (lanes, np.bool_),
        "truncated": (lanes, np.bool_),
        "first": (lanes, np.bool_),
        "episode.ended": (lanes, np.bool_),
        "episode.returns": (lanes, np.float32),
        "episode.length": (lanes, np.int32),
        "action_mask": ((*lanes, *team, choices), np.bool_),
        "agent_mask": ((*lanes, *team), np.bool_),
        "agent_reward": ((*lanes, *team), np.float32),
        "global_state": ((*lanes, env.state_size), np.float32),
    }
    for name, (shape, dtype) in fields.items():
        value: Any = timestep
        for part in name.split("."):
            value = getattr(value, part)
        if value is not None and (np.shape(value), value.dtype) != (shape, dtype):
            yield f"{name} is {_kind(value)}, not {np.dtype(dtype).name}{list(shape)}"
    if not isinstance(timestep.episode, Episode):
        yield "episode is not an eqx_q.Episode"


def _kind(x: Any) -> str:
    return f"{x.dtype}{list(np.shape(x))}"


def _alike(what: str, found: PyTree, where: str, expected: PyTree) -> Iterator[str]:
    """Two trees have the same arrays: compiled loops need that."""
    one, other = (
        {jax.tree_util.keystr(path): _kind(x) for path, x in jax.tree_util.tree_leaves_with_path(t)}
        for t in (found, expected)
    )
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            is_now, was = one.get(name, "missing"), other.get(name, "none")
            yield f"{what}{name} is {is_now}, but {where} {was}"


def _start(timestep: TimeStep) -> Iterator[str]:
    """Every lane begins an episode."""
    if not np.all(timestep.first):
        yield "first must be true in every lane after reset"
    if np.any(timestep.reward):
        yield "reward must be 0 after reset: nothing was done yet"
    if np.any(timestep.terminated | timestep.truncated | timestep.episode.ended):
        yield "no episode may have ended after reset: clear terminated, truncated and episode.ended"


def _random_action(env: Env, timestep: TimeStep, key: PRNGKeyArray) -> Array:
    actions = Actions(env.action_space, _BINS)
    team = () if env.num_agents is None else (env.num_agents,)
    mask = timestep.action_mask
    if mask is None:
        mask = np.ones((env.num_envs, *team, actions.num_choices), bool)
    legal = actions.legal(mask)
    assert legal is not None  # since the mask is given
    return actions.decode(jax.random.categorical(key, jnp.where(legal, 0.0, -jnp.inf)))


def _play(
    env: Env, step: Any, state: PyTree, timestep: TimeStep, num_steps: int, key: PRNGKeyArray
) -> tuple[_Played, _End | None]:
    """Plays at random; also the first state with ended lanes."""
    choose = jax.jit(lambda timestep, key: _random_action(env, timestep, key))
    actions, timesteps, end = [], [jax.tree.map(np.asarray, timestep)], None
    for each in jax.random.split(key, num_steps):
        act_key, step_key = jax.random.split(each)
        action = choose(timestep, act_key)
        try:
            state, timestep = step(env, state, action, step_key)
        except Exception as error:
            raise _failed("step", error) from error
        actions.append(np.asarray(action))
        timesteps.append(jax.tree.map(np.asarray, timestep))
        if end is None and np.any(timestep.ended):
            end = _End(state, timestep, np.flatnonzero(timestep.ended))
    stacked = jax.tree.map(lambda *x: np.stack(x), *timesteps)
    return _Played(np.stack(actions), stacked), end


def _values(env: Env, played: _Played) -> Iterator[str]:
    """Observations are in their space, and numbers are finite."""
    timesteps = played.timesteps
    for name in ("reward", "agent_reward", "global_state"):
        value = getattr(timesteps, name)
        if value is not None and not np.isfinite(value).all():
            yield f"{name} is not finite {_where(~np.isfinite(value))}"
    team = () if env.num_agents is None else (env.num_agents,)
    for t, n in np.ndindex(timesteps.reward.shape):
        obs = jax.tree.map(lambda x: x[t, n], timesteps.obs)  # noqa: B023
        rows = [jax.tree.map(lambda x: x[i], obs) for i in range(*team)] if team else [obs]  # noqa: B023
        if not all(map(env.observation_space.contains, rows)):
            yield f"obs is not in observation_space in step {t}, lane {n}"
            break
    if timesteps.action_mask is not None and not timesteps.action_mask.any(-1).all():
        yield f"action_mask has no legal action {_where(~timesteps.action_mask.any(-1))}"


def _boundaries(played: _Played) -> Iterator[str]:
    """The boundary rule, next-step reset."""
    timesteps = played.timesteps
    first, ended = timesteps.first[1:], timesteps.ended[:-1]
    if (wrong := first != ended).any():
        yield (
            "first must be true exactly in the step after terminated or truncated (next-step "
            f"reset), but is {first[wrong][0]} {_where(wrong, 1)}"
        )
    if (wrong := ended & (timesteps.reward[1:] != 0)).any():
        yield f"reward must be 0 in the step that resets a lane, but is not {_where(wrong, 1)}"
    if (wrong := ended & timesteps.ended[1:]).any():
        yield (
            "terminated and truncated must be false in the step that resets a lane, but one is "
            f"true {_where(wrong, 1)}"
        )
    if (wrong := timesteps.terminated & timesteps.truncated).any():
        yield f"terminated and truncated must not both be true; they are {_where(wrong)}"
    if (wrong := timesteps.episode.ended & ~timesteps.ended).any():
        yield (
            "episode.ended must only be true where terminated or truncated; it is alone "
            f"{_where(wrong)}"
        )
    if ended.sum() > 2 and _repeats(timesteps.obs, ended) and not _repeats(timesteps.obs, ~ended):
        yield (
            "obs must be the final observation where an episode ended, but always is that of the "
            "next step, which begins a new one: do not reset in the step that ends"
        )


def _repeats(obs: PyTree, at: np.ndarray) -> bool:
    """Whether observations at some steps are always those of the next step."""
    return all(np.array_equal(x[:-1][at], x[1:][at]) for x in jax.tree.leaves(obs))


def _episodes(env: Env, played: _Played) -> Iterator[str]:
    """Statistics of episodes are those of the rewards and steps that were seen."""
    timesteps = played.timesteps
    returns, length = np.zeros((2, *timesteps.reward.shape[1:]))
    over = np.ones(returns.shape, bool)
    clips = bool(env.recording.options)  # the game's rewards and ends then differ from those seen
    for t in range(len(timesteps.reward)):
        first = timesteps.first[t]
        returns = np.where(over, 0, returns) + timesteps.reward[t]
        length = np.where(over, 0, length + ~first)
        over = timesteps.episode.ended[t]
        if (wrong := timesteps.episode.length[t] != length).any():
            n = np.flatnonzero(wrong)[0]
            yield (
                f"episode.length is {timesteps.episode.length[t][n]} in step {t}, lane {n}, but "
                f"{length[n]:.0f} steps were taken in the episode"
            )
            break
        if not clips and not np.allclose(timesteps.episode.returns[t], returns, 1e-4, 1e-4):
            n = np.argmax(np.abs(timesteps.episode.returns[t] - returns))
            yield (
                f"episode.returns is {timesteps.episode.returns[t][n]:g} in step {t}, lane {n}, "
                f"but rewards of {returns[n]:g} were paid in the episode"
            )
            break
    limit = env.max_episode_steps
    if limit is not None and timesteps.episode.length.max() > limit:
        longest = timesteps.episode.length.max()
        yield f"an episode took {longest} steps, but max_episode_steps is {limit}"


def _purity(
    env: Env, step: Any, state: PyTree, timestep: TimeStep, end: _End | None, key: PRNGKeyArray
) -> Iterator[str]:
    """The same input gives the same output, and a reset ignores the action."""
    one_key, other_key = jax.random.split(key)
    action = _random_action(env, timestep, one_key)
    one, other = (step(env, state, action, one_key) for _ in range(2))
    again, _ = env.reset(key), env.reset(other_key)
    if not _equal(one, other) or not _equal(again, env.reset(key)):
        yield "step and reset must be pure: the same state, action and key gave another result"
    if end is None:
        return
    ended, before, lanes = end
    after = [
        step(env, ended, _random_action(env, before, each), one_key)
        for each in jax.random.split(other_key, 8)
    ]
    seen = [jax.tree.map(lambda x: x[lanes], each) for _, each in after]
    if not all(_equal(seen[0], each) for each in seen[1:]):
        yield "the step that resets a lane must ignore the action, but what follows depends on it"


def _equal(one: PyTree, other: PyTree) -> bool:
    def data(x: Any) -> np.ndarray:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    same = lambda x, y: np.array_equal(data(x), data(y))  # noqa: E731
    return jax.tree.all(jax.tree.map(same, one, other))


def _replica(env: Env) -> Iterator[str]:
    """`replicate` makes a like environment with another number of lanes."""
    number = env.num_envs + 1
    try:
        replica = env.replicate(number)
    except Exception as error:
        yield str(_failed(f"replicate({number})", error))
        return
    for name in ("observation_space", "action_space", "num_agents", "max_episode_steps"):
        if getattr(replica, name) != getattr(env, name):
            yield f"replicate changes {name}: {getattr(replica, name)}, not {getattr(env, name)}"
    if replica.num_envs != number:
        yield f"replicate({number}) makes {replica.num_envs} lanes"
    if replica is not env:
        replica.close()


def _where(wrong: np.ndarray, later: int = 0) -> str:
    t, n, *_ = np.argwhere(wrong)[0]
    return f"in step {t + later}, lane {n}"
