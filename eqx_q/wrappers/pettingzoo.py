"""PettingZoo: teams of agents, stepped in Python (pettingzoo.farama.org)."""

import contextlib
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterable
from typing import Any, get_args

import gymnasium
import jax
import numpy as np
import pettingzoo
from jaxtyping import Bool, Float, PyTree, Shaped
from pettingzoo import EnvSpec
from pettingzoo.utils import AECEnv, ParallelEnv, aec_to_parallel

from .. import spaces
from ..errors import MissingExtraError, UnknownNameError, UsageError
from ..spaces import Box, Discrete, Leaf, Space
from ..types import AnyArray
from .conversion import Senses, as_taken
from .drawing import quiet_pygame
from .env import kinds_of
from .guard import Guard, Guarded, Restarted, Unfit, check, check_reward, report_restart
from .host import Host, HostEnv, Reported, shapes_of
from .options import TeamReward, require_choice

_VERSION = re.compile(r"[-_]v(\d+)$")
_PACKAGES = ("mpe2",)  # packages whose modules are environments, besides PettingZoo's registry


class _Player:
    """Converts one agent's observations and actions."""

    def __init__(self, agent: Any, index: int, env: ParallelEnv, leave_out: tuple[str, ...]):
        self.agent, self.index = agent, index
        self._takes: Any = env.action_space(agent)
        self.actions = spaces.of_actions(self._takes)
        self.sees = spaces.without(env.observation_space(agent), leave_out)
        self.senses = Senses.of(self.sees, self.actions)
        self.num_choices = sum(spaces.factors(self.actions))

    def see(self, obs: Any) -> PyTree[np.ndarray]:
        """The observation's arrays."""
        try:
            return self.senses.see(obs)
        except UsageError as error:
            raise UsageError(f"agent '{self.agent}': {error}") from None

    def legal(self, obs: Any, info: dict[str, Any]) -> Bool[np.ndarray, " own_choices"]:
        """Its legal actions; all of them without a mask."""
        says_nothing = obs is None and self.senses.tells_mask
        mask = None if says_nothing else self.senses.mask(obs, info)
        return np.ones(self.num_choices, bool) if mask is None else mask

    def do(self, action: Shaped[np.ndarray, "*action"], actions: Leaf) -> Any:
        """Converts an action of the team's space `actions` to the environment's form."""
        if isinstance(actions, Box) and actions != self.actions:
            action = self._takes.low + action * (self._takes.high - self._takes.low)
        if not isinstance(actions, Discrete):
            return as_taken(self._takes, action)
        index, choices = int(action - actions.start), self.num_choices
        if index >= choices:
            raise UsageError(
                f"agent '{self.agent}' has {choices} actions, action {action} is padding: "
                "choose with the action mask"
            )
        return index + int(self._takes.start)


class PettingZooHost(Host):
    """PettingZoo environments, one per lane, stepped one after the other.

    PettingZoo does not reset by itself: a lane whose episode ended is reset here, a step later. The
    episode ends when all agents are done. It is `truncated` if, in that last step, an agent was
    truncated and not terminated as well; otherwise `terminated`. (How agents ended that were done
    earlier does not matter: they have nothing to bootstrap.)

    In `agent_mask` an agent is alive until the step in which it terminates, or is truncated while
    others continue; if the whole episode is truncated, the truncated agents are still alive. An
    agent gets its last observation in the step in which it is done, then zeros and a reward of 0.

    Arrays of observations are `uint8` if they are so in the environment, else `int32` or `float32`.
    Masks come from `info["action_mask"]`, or such an entry of the observations (see
    `conversion.Senses`). If the first reset has none, later steps must not have one.
    """

    max_episode_steps = None

    def __init__(
        self,
        lanes: list[Guarded[ParallelEnv]],
        seed: int,
        pad: bool,
        team_reward: str,
        global_state: bool | None,
        leave_out: tuple[str, ...],
        recipe: tuple[Any, dict[str, Any], dict[str, Any]],
    ):
        self.lanes = lanes
        self.is_open = True
        self.num_envs = len(lanes)
        self.leave_out = leave_out
        self._recipe = recipe
        self._team_reward = team_reward
        one = lanes[0].env
        agents = list(getattr(one, "possible_agents", ()))
        if not agents:
            raise UsageError("the environment has no possible_agents: define them")
        self.num_agents = len(agents)
        self._players = {x: _Player(x, m, one, leave_out) for m, x in enumerate(agents)}
        players = self._players.values()
        seen, done = [x.senses.space for x in players], [x.actions for x in players]
        self.agent_kinds = kinds_of(zip(seen, done, strict=True))
        self.action_space = _common_actions(done, pad)
        self.observation_space = spaces.map_leaves(_with_zeros, _common_observations(seen, pad))
        self._unseen = _unseen(self.observation_space, self.num_agents)
        seeds = [seed + lane for lane in range(self.num_envs)]
        self._seeds: list[int | None] = [*seeds]
        self._ended = [False] * self.num_envs
        self._finite, self.state_size = lanes[0].guard.finite, None
        first = [lane.reset(self._start, seed) for lane, seed in zip(lanes, seeds, strict=True)]
        first = [told.fresh if isinstance(told, Restarted) else told for told in first]
        self.state_size = _state_size(lanes[0].env, global_state)
        self._has_mask = bool(spaces.factors(self.action_space)) and (
            len({player.num_choices for player in players}) > 1
            or any(player.senses.tells_mask for player in players)
            or any("action_mask" in info for _, infos, _ in first for info in infos.values())
        )
        reports = [
            self._fresh(lane.env, obs, info, self._state(lane.env))
            for lane, (obs, info, _) in zip(lanes, first, strict=True)
        ]
        self.shapes = shapes_of(_stack(reports))

    def reset(self) -> Reported:
        return _stack([self._reset(lane) for lane in range(self.num_envs)])

    def step(self, action: Shaped[AnyArray, "N M *action"]) -> Reported:
        action = np.asarray(action)
        return _stack(
            [
                self._reset(lane) if self._ended[lane] else self._step(lane, action[lane])
                for lane in range(self.num_envs)
            ]
        )

    def replicate(self, num_envs: int, seed: int, options: dict[str, Any]) -> "PettingZooHost":
        source, own, made_with = self._recipe
        own = {name: options.pop(name, value) for name, value in own.items()}
        return _host(source, num_envs, seed, own, made_with | options)

    def render(self, lane: int) -> Any:
        env = self.lanes[lane].env
        return env.render() if getattr(env, "render_mode", None) == "rgb_array" else None

    def close(self) -> None:
        self.is_open = False
        for lane in self.lanes:
            lane.close()

    def _reset(self, lane: int) -> Reported:
        seed, self._seeds[lane], self._ended[lane] = self._seeds[lane], None, False
        told = self.lanes[lane].reset(self._start, seed)
        if isinstance(told, Restarted):
            report_restart(lane, told.reason)
            told = told.fresh
        return self._fresh(self.lanes[lane].env, *told)

    def _step(self, lane: int, action: Shaped[np.ndarray, "M *action"]) -> Reported:
        env, space = self.lanes[lane].env, self.action_space
        acting = list(env.agents)
        actions = {
            x: self._players[x].do(action[self._players[x].index, ...], space) for x in acting
        }
        told = self.lanes[lane].step(lambda env: self._act(env, actions), self._start)
        env = self.lanes[lane].env
        if isinstance(told, Restarted):
            report_restart(lane, told.reason)
            return self._fresh(env, *told.fresh) | {"broken": np.array(True)}
        obs, reward, terminated, truncated, info, state = told
        present = {*acting, *env.agents}
        alive = [x for x in env.agents if not (terminated.get(x) or truncated.get(x))]
        cut_off = [x for x in acting if truncated.get(x) and not terminated.get(x)]
        self._ended[lane] = ended = not alive
        return self._report(
            {agent: one for agent, one in obs.items() if agent in present},
            info,
            state,
            alive or cut_off,
            reward={agent: reward[agent] for agent in acting if agent in reward},
            terminated=ended and not cut_off,
            truncated=ended and bool(cut_off),
        )

    def _start(self, env: ParallelEnv, seed: int | None) -> tuple[Any, ...]:
        obs, info = env.reset(seed=seed)
        self._check(obs, env.agents)
        return obs, info, self._state(env)

    def _act(self, env: ParallelEnv, actions: dict[Any, Any]) -> tuple[Any, ...]:
        obs, reward, terminated, truncated, info = env.step(actions)
        self._check(obs, {*actions, *env.agents})  # dead agents are not checked
        for agent in actions.keys() & reward.keys():
            check_reward(reward[agent])
        return obs, reward, terminated, truncated, info, self._state(env)

    def _state(self, env: ParallelEnv) -> Float[np.ndarray, " state"] | None:
        """The environment's `state()`, if it is reported."""
        if self.state_size is None:
            return None
        state = np.asarray(env.state(), np.float32).ravel()
        if state.size != self.state_size:
            raise Unfit(f"its state() has {state.size} numbers, but had {self.state_size}")
        if self._finite and not np.isfinite(state).all():
            raise Unfit("its state() is not finite")
        return state

    def _check(self, obs: dict[Any, Any], agents: Iterable[Any]) -> None:
        for agent in agents:
            if (one := obs.get(agent)) is not None:
                check(self._players[agent].sees, one, str(agent), finite=self._finite)

    def _fresh(
        self, env: ParallelEnv, obs: dict[Any, Any], info: dict[Any, Any], state: np.ndarray | None
    ) -> Reported:
        return self._report(obs, info, state, env.agents)

    def _report(
        self,
        obs: dict[Any, Any],
        info: dict[Any, Any],
        state: np.ndarray | None,
        alive: list[Any],
        reward: dict[Any, float] | None = None,
        terminated: bool = False,
        truncated: bool = False,
    ) -> Reported:
        """The report of one lane."""
        reward, agents = reward or {}, list(self._players)
        report = {
            "obs": jax.tree.map(np.copy, self._unseen),
            "reward": self._pay(reward),
            "terminated": np.asarray(terminated),
            "truncated": np.asarray(truncated),
            "broken": np.array(False),
            "agent_mask": np.array([x in alive for x in agents]),
            "agent_reward": np.array([reward.get(x, 0) for x in agents], np.float32),
        }
        if state is not None:
            report["global_state"] = state
        if self._has_mask:
            choices = sum(spaces.factors(self.action_space))
            report["action_mask"] = np.zeros((len(agents), choices), bool)
        for agent, player in self._players.items():
            m, own = player.index, obs.get(agent)
            if own is not None:
                for all_see, sees in zip(
                    jax.tree.leaves(report["obs"]), jax.tree.leaves(player.see(own)), strict=True
                ):
                    all_see[(m, *map(slice, sees.shape))] = sees
            if self._has_mask:
                legal = player.legal(own, info.get(agent, {}))
                report["action_mask"][m, : player.num_choices] = legal
            else:
                player.senses.expect_no_mask(info.get(agent, {}))
        return report

    def _pay(self, reward: dict[Any, float]) -> np.ndarray:
        """The team's reward."""
        paid = np.array([*reward.values()])
        if self._team_reward == "shared" and len(paid) and not np.allclose(paid, paid[0]):
            raise UsageError(
                f"team_reward=shared, but agents got rewards {_listed(paid)}: use sum or mean"
            )
        shares = {"sum": 1, "mean": len(self._players), "shared": max(1, len(paid))}
        return np.asarray(paid.sum() / shares[self._team_reward], np.float32)


def _stack(reports: list[Reported]) -> Reported:
    return jax.tree.map(lambda *x: np.stack(x), *reports)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(values))


def _common_actions(of_agents: list[Leaf], pad: bool) -> Leaf:
    """A common space for the actions of all agents."""
    first = of_agents[0]
    if all(one == first for one in of_agents):
        return first
    if all(isinstance(one, Box) and one.shape == first.shape for one in of_agents):
        return Box(gymnasium.spaces.Box(0, 1, first.shape))  # fractions of each agent's own range
    if not all(isinstance(one, Discrete) for one in of_agents):
        raise UsageError(
            f"agents have the action spaces {_listed(of_agents)}: make them equal, or Boxes of one "
            "shape, or Discrete with pad=true"
        )
    sizes = [sum(spaces.factors(one)) for one in of_agents]
    if len(set(sizes)) > 1 and not pad:
        raise UsageError(
            f"agents have {_listed(sizes)} actions: set pad=true to give all the largest number, "
            "and mask the actions that an agent lacks"
        )
    starts = {int(one.start) for one in of_agents if isinstance(one, Discrete)}
    start = starts.pop() if len(starts) == 1 else 0
    return Discrete(gymnasium.spaces.Discrete(max(sizes), start=start))


def _common_observations(of_agents: list[Space], pad: bool) -> Space:
    """A common space for the observations of all agents, padded at the ends of their axes."""
    first = of_agents[0]
    if all(one == first for one in of_agents):
        return first
    numbers = [one for one in of_agents if isinstance(one, Discrete)]
    if len(numbers) == len(of_agents):
        start = min(int(one.start) for one in numbers)
        end = max(int(one.start + one.n) for one in numbers)
        return Discrete(gymnasium.spaces.Discrete(end - start, start=start))
    boxes = [one for one in of_agents if isinstance(one, Box)]
    shapes = [box.shape for box in boxes]
    if len(boxes) < len(of_agents) or len({len(shape) for shape in shapes}) > 1:
        raise UsageError(
            f"agents observe {_listed(of_agents)}, which cannot be padded to one space: wrap the "
            "environment so that all observe alike"
        )
    if len(set(shapes)) > 1 and not pad:
        raise UsageError(
            f"agents observe arrays of shapes {_listed(shapes)}: set pad=true to pad with zeros"
        )
    shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    dtype = np.result_type(*(box.dtype for box in boxes))
    low, high = np.zeros(shape, dtype), np.zeros(shape, dtype)
    for box in boxes:
        own = tuple(map(slice, box.shape))
        low[own] = np.minimum(low[own], box.low)
        high[own] = np.maximum(high[own], box.high)
    return spaces.of_observations(gymnasium.spaces.Box(low, high, shape, dtype.type))


def _with_zeros(path: str, leaf: Leaf) -> Leaf:
    """Extends a space to include zeros, which dead agents observe."""
    if not isinstance(leaf, Box):
        return leaf
    low, high = np.minimum(leaf.low, 0), np.maximum(leaf.high, 0)
    return Box(gymnasium.spaces.Box(low, high, leaf.shape, leaf.dtype.type))


def _unseen(space: Space, num_agents: int) -> PyTree[np.ndarray]:
    """The observation of dead agents: zeros, or the start of spaces that do not start at 0."""
    shapes, structure = jax.tree.flatten(spaces.shapes(space, num_agents))
    starts = [getattr(leaf, "start", 0) for _, leaf in spaces.leaves(space)]
    fills = [np.full(x.shape, one, x.dtype) for x, one in zip(shapes, starts, strict=True)]
    return jax.tree.unflatten(structure, fills)


def _state_size(env: ParallelEnv, wanted: bool | None) -> int | None:
    """The size of the environment's `state()`; `None` if it is not reported."""
    if wanted is False:
        return None
    state = None
    if callable(getattr(env.unwrapped, "state", None)):  # some have a plain attribute `state`
        # PettingZoo's base class raises this if there is no state. Its wrappers pass the call on,
        # so looking for the method is not enough.
        with contextlib.suppress(NotImplementedError):
            state = np.asarray(env.state())
    if state is None:
        if wanted:
            raise UsageError("the environment has no state(): leave out global_state")
        return None
    return state.size if wanted or state.ndim == 1 else None  # an image only if it is requested


def ids() -> list[str]:
    """The parallel environments of PettingZoo and mpe2; others can be imported by name."""
    found = set(_registered(pettingzoo.parallel_registry))
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        modules = pkgutil.iter_modules(spec.submodule_search_locations if spec else [])
        found |= {f"{package}.{one.name}" for one in modules if _VERSION.search(one.name)}
    return sorted(found)


def accepts(source: Any) -> bool:
    """Whether `source` is a PettingZoo environment, or a class of one."""
    kind = source if isinstance(source, type) else type(source)
    return issubclass(kind, (ParallelEnv, AECEnv))


def make(
    source: Any,
    num_envs: int,
    *,
    seed: int = 0,
    pad: bool = False,
    team_reward: str = "sum",
    global_state: bool | None = None,
    leave_out: Iterable[str] = (),
    guard: Guard = Guard(),  # noqa: B008
    **options: Any,
) -> HostEnv:
    """Makes lanes of a PettingZoo environment.

    **Arguments:**

    - `source`: `"family.name"` of one of PettingZoo's own (`"classic.rps_v2"`); the name of a
        module with a function `parallel_env` or `env` (`"mpe2.simple_spread_v3"`); or a function
        that returns a `ParallelEnv`, or an `AECEnv` that PettingZoo can convert.
    - `num_envs`: lanes.
    - `seed`: of the environments: lane `i` gets `seed + i`.
    - `pad`: for agents with different spaces: pad observations of one array each with zeros at the
        ends of their axes, and `Discrete` actions up to the largest number; the mask forbids these.
        Not needed for equal spaces of any kind, nor if only ranges differ, of `Discrete` or `Box`
        observations or of `Box` actions: these then range from 0 to 1, as fractions of each agent's
        own range.
    - `team_reward`: `"sum"` of the agents' rewards; `"mean"`, that sum over `num_agents`;
        `"shared"`, the common reward that all agents get.
    - `global_state`: whether the environment's `state()` becomes the timestep's `global_state`;
        `None`: if it has one that is not an image.
    - `leave_out`: entries of `Dict` observations, by path, that the agents do not see.
    - `guard`: what to do when a lane fails.
    - `options`: of the environment, or keyword arguments of the function.
    """
    own: dict[str, Any] = {"pad": pad, "team_reward": team_reward, "global_state": global_state}
    own |= {"leave_out": tuple(leave_out), "guard": guard}
    return HostEnv(_host(source, num_envs, seed, own, options))


def _host(
    source: Any, num_envs: int, seed: int, own: dict[str, Any], options: dict[str, Any]
) -> PettingZooHost:
    require_choice("team_reward", own["team_reward"], get_args(TeamReward))
    recipe = (source, own, dict(options))
    guard: Guard = own["guard"]
    if isinstance(source, (ParallelEnv, AECEnv)):
        raise UsageError("each lane needs an environment of its own: give a function that makes it")
    quiet_pygame()
    create = _creator(source) if isinstance(source, str) else source
    try:
        env = _parallel(create(**options))
        modes = env.metadata.get("render_modes", ())
        if isinstance(source, str) and "render_mode" not in options and "rgb_array" in modes:
            env.close()
            options["render_mode"] = "rgb_array"
            env = _parallel(create(**options))
        made = [env]
        lanes = [
            Guarded(lambda: made.pop() if made else _parallel(create(**options)), lane, guard)
            for lane in range(num_envs)
        ]
    except UsageError:
        raise
    except Exception as error:  # an environment's constructor may raise anything
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"PettingZoo cannot make {source!r}: {what}") from error
    own = {name: value for name, value in own.items() if name != "guard"}
    return PettingZooHost(lanes, seed, recipe=recipe, **own)


def _parallel(env: Any) -> ParallelEnv:
    """`env` as an environment in which all agents act at once."""
    if isinstance(env, AECEnv):
        if not env.metadata.get("is_parallelizable", False):
            raise UsageError(
                f"the agents of {env} take turns, which teams do not support: choose an "
                "environment with metadata['is_parallelizable'], which PettingZoo can convert"
            )
        return aec_to_parallel(env)
    if not isinstance(env, ParallelEnv):
        raise TypeError(f"the function must return a ParallelEnv, not a {type(env).__name__}")
    return env


def _registered(registry: dict[str, EnvSpec]) -> dict[str, EnvSpec]:
    """Specifications by eqx_q's names: `classic/rps-v2` becomes `classic.rps_v2`."""
    return {_VERSION.sub(r"_v\1", one).replace("/", "."): spec for one, spec in registry.items()}


def _creator(name: str) -> Callable[..., Any]:
    name = name.removeprefix("pettingzoo.")
    known = _registered(pettingzoo.aec_registry) | _registered(pettingzoo.parallel_registry)
    if name in known:
        return known[name].make
    if not all(part.isidentifier() for part in name.split(".")):
        raise UnknownNameError("PettingZoo environment", name, ids())
    package = name.partition(".")[0]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"'{name}' needs the package '{error.name}': install it") from error
        if package in _PACKAGES and error.name == package:
            raise MissingExtraError(package, "multi-agent") from error
        raise UnknownNameError("PettingZoo environment", name, ids()) from None
    create = getattr(module, "parallel_env", None) or getattr(module, "env", None)
    if create is None:
        raise UsageError(f"the module '{name}' has no function 'parallel_env' or 'env': add one")
    return create
