"""JaxMARL: teams in JAX, such as SMAX, Overcooked and MPE (github.com/FLAIROx/JaxMARL)."""

import dataclasses
import functools
import inspect
import pickle
import warnings
from collections.abc import Mapping
from typing import Any, get_args

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxmarl import environments, registered_envs
from jaxmarl.environments import MultiAgentEnv, spaces
from jaxmarl.environments.smax.heuristic_enemy_smax_env import EnemySMAX
from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt8

from ..errors import UnknownNameError, UsageError
from ..spaces import Box, Discrete
from .autoreset import Lasting, Report
from .env import kinds_of
from .jaxmarl_rules import RULES, Rules
from .lanes import Lanes
from .options import TeamReward, TimeLimit, require_choice, require_count


class Play(eqx.Module):
    """The state of one lane. `steps` counts over all its episodes."""

    game: PyTree
    steps: Lasting


@dataclasses.dataclass(frozen=True, eq=False)
class Game:
    """A JaxMARL environment, adapted to the environment contract.

    Hashed by identity, and shared by equal calls of `make`, so that they share compiled code.

    **Attributes:**

    - `source`, `options`: the arguments that it was made with.
    - `team_reward`, `time_limit`, `pad`, `shaped_reward_horizon`, `shaped_reward_lanes`: as in
        `make`.
    - `observation_space`: of one agent, without bounds, since JaxMARL's are often wrong.
    - `action_mask`: mask of the actions that each agent has, if these differ.
    """

    source: Any
    options: dict[str, Any]
    env: MultiAgentEnv
    rules: Rules
    team_reward: TeamReward
    time_limit: TimeLimit
    pad: bool
    shaped_reward_horizon: float
    shaped_reward_lanes: int
    observation_space: Box
    action_space: Discrete
    num_agents: int
    max_episode_steps: int | None
    state_size: int | None
    agent_kinds: tuple[int, ...]
    action_mask: Bool[np.ndarray, "M A"] | None
    lanes_per_reset: None = None

    def reset(self, key: PRNGKeyArray) -> tuple[Play, Report]:
        """Starts an episode in one lane."""
        obs, state = self.env.reset(key)
        no, zeros = jnp.array(False), jnp.zeros(len(self.env.agents))
        return Play(state, Lasting(jnp.int32(0))), self._report(obs, state, zeros, zeros, no, no)

    def step(self, state: Play, action: Int[Array, " M"], key: PRNGKeyArray) -> tuple[Play, Report]:
        """Acts in one lane. Avoids JaxMARL's `step`, which resets in the same step."""
        before, steps = state.game, state.steps.value
        actions = {agent: action[i] for i, agent in enumerate(self.env.agents)}
        obs, after, rewards, done, info = self.env.step_env(key, before, actions)
        done = jnp.asarray(done["__all__"], bool)
        if self.time_limit == "terminate":
            terminated = done
        else:
            terminated = done & self.rules.terminated(self.env, before, action, after, done)
        reward = self._by_agent(rewards)
        shaped = jnp.zeros_like(reward)
        if self.shaped_reward_horizon > 0:
            progress = steps * (self.shaped_reward_lanes / self.shaped_reward_horizon)
            shaped = self._by_agent(info["shaped_reward"]) * jnp.maximum(1.0 - progress, 0.0)
        report = self._report(obs, after, reward, shaped, terminated, done & ~terminated)
        return Play(after, Lasting(steps + 1)), report

    def render(self, state: Play) -> UInt8[np.ndarray, "height width 3"] | None:
        """Draws one lane, if there is a rule for that."""
        return self.rules.draw(self.env, jax.tree.map(np.asarray, state.game))

    def replace(self, options: dict[str, Any]) -> "Game":
        """The same game with some options replaced."""
        return _game(self.source, self.options | options)

    def _report(self, obs, state, reward, shaped, terminated, truncated) -> Report:
        if self.team_reward == "shared":
            game_reward, bonus = reward[0], shaped.sum()  # shaped rewards are individual
        else:
            team = jnp.sum if self.team_reward == "sum" else jnp.mean
            game_reward, bonus = team(reward), team(shaped)
        return Report(
            self._observe(obs),
            game_reward + bonus,
            terminated,
            truncated,
            self.rules.metrics(self.env, state),
            self._legal(state),
            self.rules.agent_mask(self.env, state),
            reward + shaped,
            game_reward,
            self.rules.global_state(self.env, state),
        )

    def _by_agent(self, values: Mapping[str, Array]) -> Float[Array, " M"]:
        return jnp.stack([jnp.asarray(values[a], jnp.float32) for a in self.env.agents])

    def _observe(self, obs: Mapping[str, Array]) -> Float[Array, "M *obs"]:
        """Converts observations to `float32`: JaxMARL's bytes are features, not pixels."""
        shape = self.observation_space.shape
        return jnp.stack([_fill(obs[a].astype(jnp.float32), shape) for a in self.env.agents])

    def _legal(self, state: PyTree) -> Bool[Array, "M A"] | None:
        masks = self.rules.action_masks(self.env, state)
        if masks is None:
            return None if self.action_mask is None else jnp.asarray(self.action_mask)
        shape = (int(self.action_space.n),)
        return jnp.stack([_fill(jnp.asarray(masks[a], bool), shape) for a in self.env.agents])


def ids() -> list[str]:
    """All JaxMARL environments whose agents observe one array each and have discrete actions."""
    return [name for name in _CLASSES if name not in _UNFIT]


def accepts(source: Any) -> bool:
    """Whether `source` is a JaxMARL environment."""
    return isinstance(source, MultiAgentEnv)


def make(source: Any, num_envs: int, *, seed: int = 0, **options: Any) -> Lanes:
    """Makes lanes of a JaxMARL environment.

    In games between adversaries (most of MPE's), the team's reward is meaningless; only
    `agent_reward` is useful.

    **Arguments:**

    - `source`: a name, or a JaxMARL environment. If its class is not JaxMARL's own, its `done`
        counts as termination, since a time limit cannot be distinguished.
    - `num_envs`: lanes.
    - `seed`: unused: all randomness comes from the keys.
    - `options`: those of the environment's constructor, with SMAX's `map` and Overcooked's `layout`
        given by name, and

        - `team_reward`: the team's reward is the `"sum"` of its agents' rewards, their `"mean"`, or
            the common reward that all agents get (`"shared"`; refused if known not to be common).
            The default is `"shared"` where there is one (SMAX against an enemy, Overcooked, Hanabi,
            the switch riddle), else `"sum"`.
        - `time_limit`: `"truncate"`, or `"terminate"` to report a time limit as termination, as
            JaxMARL does.
        - `pad`: whether to pad the observations of agents that see less (with zeros, at the end of
            each axis) and the actions of agents that have fewer (with illegal ones).
        - `shaped_reward_horizon`: in Overcooked, env steps (over all lanes) in which the weight of
            the shaped reward falls from 1 to 0, as in JaxMARL's baselines. 0: no shaped reward.
            `episode.returns` never includes it.
        - `shaped_reward_lanes`: the lanes to count for that: with several learners, those of one.
            The default is `num_envs`; `replicate` keeps it.
    """
    del seed
    if options.get("shaped_reward_lanes") is None:
        options["shaped_reward_lanes"] = num_envs
    return Lanes(_game(source, options), num_envs)


def _game(source: Any, options: dict[str, Any]) -> Game:
    if not isinstance(source, str):
        return _configured(source, options, source, options)
    if source not in registered_envs:
        raise UnknownNameError("JaxMARL environment", source, ids())
    if source not in _CLASSES:
        raise UsageError(
            f"{source} cannot be made by its name alone: make it with jaxmarl.make, "
            "and pass that environment instead of the name"
        )
    # Pickled, since options may be lists or arrays, which cannot be keys of a cache.
    return _named_game(source, pickle.dumps(sorted(options.items())))


@functools.cache
def _named_game(name: str, pickled_options: bytes) -> Game:
    options = dict(pickle.loads(pickled_options))
    ours = {option: value for option, value in options.items() if option in _OURS}
    theirs = {option: value for option, value in options.items() if option not in _OURS}
    known = _constructor_options(_CLASSES[name])
    for option in theirs:
        if option not in known:
            raise UnknownNameError("option", option, [*known, *_OURS])
    require_choice("attack_mode", theirs.get("attack_mode", "closest"), _ATTACK_MODES)
    if "max_steps" in theirs:
        require_count("max_steps", theirs["max_steps"])
    arguments = _DEFAULTS.get(name, {}) | _look_up(_CLASSES[name], theirs)
    try:
        with warnings.catch_warnings():  # for example, that Overcooked has a successor
            warnings.simplefilter("ignore")
            env = _CLASSES[name](**arguments)
        return _configured(name, options, env, ours)
    except UsageError:
        raise
    except Exception as error:  # it does not check its options, so anything may be raised
        message = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"JaxMARL cannot make {name} with these options: {message}") from error


def _configured(
    source: Any, options: dict[str, Any], env: MultiAgentEnv, ours: dict[str, Any]
) -> Game:
    """**Arguments:** `options`: all options of `make`; `ours`: those that are not JaxMARL's."""
    known_rules = next((rules for kind, rules in RULES if isinstance(env, kind)), None)
    rules = known_rules or Rules()
    for option in ours:
        if option not in _OURS:
            raise UnknownNameError("option", option, _OURS)
    ours = _OURS | {"team_reward": rules.team_reward} | ours
    require_choice("team_reward", ours["team_reward"], get_args(TeamReward))
    require_choice("time_limit", ours["time_limit"], get_args(TimeLimit))
    if known_rules and ours["team_reward"] == "shared" != rules.team_reward:
        raise UsageError(
            f"the agents of {env.name} get different rewards: set team_reward to sum or mean"
        )
    horizon = ours["shaped_reward_horizon"]
    if not isinstance(horizon, int | float) or isinstance(horizon, bool) or not horizon >= 0:
        raise UsageError(f"shaped_reward_horizon={horizon!r}: give 0 or more env steps")
    require_count("shaped_reward_lanes", ours["shaped_reward_lanes"])
    if horizon > 0 and not rules.shaped:
        raise UsageError(f"{env.name} has no shaped reward: leave out shaped_reward_horizon")
    return Game(source, options, env, rules, **ours, **_described(env, rules, ours["pad"]))


def _described(env: MultiAgentEnv, rules: Rules, pad: bool) -> dict[str, Any]:
    """The fields of a `Game` that the environment itself decides."""
    counts = [_num_actions(env, agent) for agent in env.agents]
    shapes = _observation_shapes(env)
    for what, values in (("observations of shapes", shapes), ("numbers of actions", counts)):
        if len(set(values)) > 1 and not pad:
            raise UsageError(
                f"the agents of {env.name} have different {what} "
                f"({', '.join(map(str, sorted(set(values))))}): give pad=true to pad them"
            )
    if len({len(shape) for shape in shapes}) > 1:
        raise UsageError(
            f"the agents of {env.name} observe shapes {sorted(set(shapes))}, which cannot be "
            "padded: give them the same number of axes"
        )
    mask = np.arange(max(counts)) < np.array(counts)[:, None]
    shape = tuple(int(size) for size in np.max(shapes, axis=0))
    _, state = jax.eval_shape(env.reset, jax.random.key(0))
    seen = jax.eval_shape(lambda state: rules.global_state(env, state), state)
    return {
        "observation_space": Box(gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)),
        "action_space": Discrete(gymnasium.spaces.Discrete(max(counts))),
        "action_mask": None if mask.all() else mask,
        "num_agents": len(env.agents),
        "max_episode_steps": rules.longest(env),
        "state_size": None if seen is None else seen.shape[0],
        "agent_kinds": kinds_of(zip(shapes, counts, strict=True)),
    }


def _num_actions(env: MultiAgentEnv, agent: Any) -> int:
    space = env.action_space(agent)
    if not isinstance(space, spaces.Discrete):
        raise UsageError(
            f"{env.name} has {type(space).__name__} actions: choose an environment with Discrete "
            "actions"
        )
    return int(space.n)


def _observation_shapes(env: MultiAgentEnv) -> list[tuple[int, ...]]:
    key = jax.random.key(0)
    first, state = jax.eval_shape(env.reset, key)
    actions = {agent: jnp.int32(0) for agent in env.agents}
    if not isinstance(first, dict) or not all(hasattr(first.get(a), "shape") for a in actions):
        raise UsageError(f"{env.name} must observe one array for each of its agents")
    later = jax.eval_shape(env.step_env, key, state, actions)[0]
    for agent in actions:
        if first[agent].shape != later[agent].shape:
            raise UsageError(
                f"{agent} of {env.name} observes shape {first[agent].shape} after reset, "
                f"but {later[agent].shape} after step: make them the same"
            )
    return [first[agent].shape for agent in actions]


def _constructor_options(kind: type) -> set[str]:
    """The options that a constructor takes or passes on, or that `_look_up` resolves for it."""
    names = set(inspect.signature(kind).parameters)
    if issubclass(kind, EnemySMAX):
        names |= set(inspect.signature(environments.SMAX).parameters)
    if issubclass(kind, environments.SimpleMPE):
        names |= {*inspect.signature(environments.SimpleMPE).parameters, *_MPE_PHYSICS}
    return (names | {"map"} if "scenario" in names else names) - {"env_kwargs", "kwargs"}


def _look_up(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """Replaces the names of maps and layouts by these."""
    if "map" in options:
        scenario = _known("map", str(options["map"]), MAP_NAME_TO_SCENARIO)
        return {k: v for k, v in options.items() if k != "map"} | {"scenario": scenario}
    if isinstance(options.get("layout"), str):
        second = issubclass(kind, environments.OvercookedV2)
        table = environments.overcooked_v2_layouts if second else environments.overcooked_layouts
        return options | {"layout": _known("layout", options["layout"], table)}
    return options


def _known(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise UnknownNameError(kind, name, table)
    return table[name]


def _fill(x: Array, shape: tuple[int, ...]) -> Array:
    """`x` with zeros at the end of its axes, up to `shape`."""
    return jnp.pad(x, [(0, size - own) for own, size in zip(x.shape, shape, strict=True)])


_CLASSES = {
    "SMAX": environments.SMAX,
    "HeuristicEnemySMAX": environments.HeuristicEnemySMAX,
    "overcooked": environments.Overcooked,
    "overcooked_v2": environments.OvercookedV2,
    "MPE_simple_v3": environments.SimpleMPE,
    "MPE_simple_tag_v3": environments.SimpleTagMPE,
    "MPE_simple_world_comm_v3": environments.SimpleWorldCommMPE,
    "MPE_simple_spread_v3": environments.SimpleSpreadMPE,
    "MPE_simple_crypto_v3": environments.SimpleCryptoMPE,
    "MPE_simple_speaker_listener_v4": environments.SimpleSpeakerListenerMPE,
    "MPE_simple_push_v3": environments.SimplePushMPE,
    "MPE_simple_adversary_v3": environments.SimpleAdversaryMPE,
    "MPE_simple_reference_v3": environments.SimpleReferenceMPE,
    "MPE_simple_facmac_v1": environments.SimpleFacmacMPE,
    "MPE_simple_facmac_3a_v1": environments.SimpleFacmacMPE3a,
    "MPE_simple_facmac_6a_v1": environments.SimpleFacmacMPE6a,
    "MPE_simple_facmac_9a_v1": environments.SimpleFacmacMPE9a,
    "hanabi": environments.Hanabi,
    "switch_riddle": environments.SwitchRiddle,
    "coin_game": environments.CoinGame,
    "jaxnav": environments.JaxNav,
    "storm": environments.InTheGrid,
    "storm_2p": environments.InTheGrid_2p,
    "storm_np": environments.InTheMatrix,
}
# Environments with continuous actions, or observations that are not one array per agent.
_UNFIT = {name for name in _CLASSES if name.startswith(("MPE_simple_facmac", "storm"))}
# Options for environments whose actions are continuous by default.
_DEFAULTS = {
    "MPE_simple_world_comm_v3": {"action_type": "Discrete"},
    "jaxnav": {"act_type": "Discrete"},
}
_MPE_PHYSICS = ("damping", "contact_force", "contact_margin")  # accepted, but not in a signature
_ATTACK_MODES = ("closest", "random")  # JaxMARL silently treats any other name as the first
_OURS = {
    "team_reward": "sum",
    "time_limit": "truncate",
    "pad": False,
    "shaped_reward_horizon": 0,
    "shaped_reward_lanes": None,
}
