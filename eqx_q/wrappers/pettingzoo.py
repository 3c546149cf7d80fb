"""PettingZoo: teams of agents, stepped in Python (pettingzoo.farama.org)."""

import contextlib
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterable
from typing import Any, get_args

import gymnasium
import numpy as np
import pettingzoo
from gymnasium.spaces import flatten, flatten_space
from jaxtyping import Bool, Int, Shaped
from pettingzoo import EnvSpec
from pettingzoo.utils import AECEnv, ParallelEnv, aec_to_parallel

from ..errors import MissingExtraError, UnknownNameError, UsageError
from ..spaces import Box, Discrete
from ..types import AnyArray
from .drawing import quiet_pygame
from .host import Host, HostEnv, Reported, cast_box, shapes_of
from .options import TeamReward, require_choice

_OWN_OPTIONS = ("pad", "team_reward")  # not of the environment
_VERSION = re.compile(r"[-_]v(\d+)$")
_PACKAGES = ("mpe2",)  # whose modules are environments; PettingZoo's own are in its registry


class _Player:
    """One agent: how what it sees is read, and what it does is said."""

    def __init__(self, agent: Any, index: int, env: ParallelEnv):
        space, actions = env.observation_space(agent), env.action_space(agent)
        if not isinstance(actions, gymnasium.spaces.Discrete):
            raise UsageError(
                f"Q-learning needs Discrete actions, those of agent '{agent}' are {actions}: "
                "discretise them"
            )
        self.agent, self.index = agent, index
        self.num_actions, self._first_action = int(actions.n), int(actions.start)
        self.gives_mask, self._space = False, space
        if isinstance(space, gymnasium.spaces.Dict) and "action_mask" in space.spaces:
            self.gives_mask, self._space = True, space["observation"]
        self._is_box = isinstance(self._space, gymnasium.spaces.Box)
        box = self._space if self._is_box else flatten_space(self._space)
        if not isinstance(box, gymnasium.spaces.Box):
            raise UsageError(f"observations of {space} cannot be made one flat array")
        self.box = cast_box(box)

    def see(self, obs: Any) -> Shaped[np.ndarray, "*own_obs"]:
        """The observation as an array."""
        obs = obs["observation"] if self.gives_mask else obs
        seen = np.asarray(obs if self._is_box else flatten(self._space, obs))
        if seen.shape != self.box.shape:
            raise UsageError(
                f"agent '{self.agent}' observes an array of shape {seen.shape}, "
                f"but its space says {self.box.shape}"
            )
        return seen

    def legal(self, obs: Any, info: dict[str, Any]) -> Bool[np.ndarray, " own_actions"]:
        """What its mask allows; all where there is no mask, or one that allows nothing."""
        mask = (
            obs["action_mask"] if self.gives_mask and obs is not None else info.get("action_mask")
        )
        if mask is None or not np.any(mask):
            return np.ones(self.num_actions, bool)
        return np.asarray(mask, bool)

    def do(self, action: int) -> int:
        """The action as the environment counts it."""
        if action >= self.num_actions:
            raise UsageError(
                f"agent '{self.agent}' has {self.num_actions} actions, action {action} is padding: "
                "choose by the action mask"
            )
        return action + self._first_action


class PettingZooHost(Host):
    """PettingZoo environments, one a lane, one stepped after the other.

    PettingZoo resets nothing by itself: a lane whose episode ended is reset here, a step later.
    The episode ends when all agents are done. It is `truncated` if any agent was truncated, and
    not terminated as well, in that last step; otherwise `terminated`. (How agents ended that were
    done before does not count: there is nothing left of them to bootstrap.)

    In `agent_mask` an agent is alive until the step in which it terminates, or is truncated while
    others go on; where the whole episode is truncated, those truncated are still alive. It sees its
    last observation in the step in which it is done, zeros and a reward of 0 from the next on.

    Observations are `float32`, or `uint8` where all are so; spaces other than `Box` are flattened.
    Masks are those of `info["action_mask"]` or of observations `{"observation", "action_mask"}`;
    where the very first reset gives none, there are none later.
    """

    max_episode_steps = None

    def __init__(
        self,
        envs: list[ParallelEnv],
        seed: int,
        pad: bool,
        team_reward: str,
        recipe: tuple[Any, dict[str, Any]],
    ):
        self.envs = envs
        self.is_open = True
        self.num_envs = len(envs)
        self._recipe = recipe
        self._team_reward = team_reward
        agents = list(getattr(envs[0], "possible_agents", ()))
        if not agents:
            raise UsageError("the environment names no possible_agents: a team needs a size")
        self.num_agents = len(agents)
        self._players = {x: _Player(x, m, envs[0]) for m, x in enumerate(agents)}
        players = self._players.values()
        sizes = [player.num_actions for player in players]
        if len(set(sizes)) > 1 and not pad:
            raise UsageError(
                f"agents have {_listed(sizes)} actions: pad=true gives all of them the most, "
                "and masks what an agent lacks"
            )
        self.observation_space = _common_box([player.box for player in players], pad)
        self.action_space = Discrete(gymnasium.spaces.Discrete(max(sizes)))
        self._seeds: list[int | None] = [seed + lane for lane in range(self.num_envs)]
        self._ended = [False] * self.num_envs
        first = [env.reset(seed=seed + lane) for lane, env in enumerate(envs)]
        self._has_mask = (
            len(set(sizes)) > 1
            or any(player.gives_mask for player in players)
            or any("action_mask" in info for _, infos in first for info in infos.values())
        )
        self.shapes = shapes_of(
            _stack([self._report(*one, env.agents) for env, one in zip(envs, first, strict=True)])
        )

    def reset(self) -> Reported:
        return _stack([self._reset(lane) for lane in range(self.num_envs)])

    def step(self, action: Int[AnyArray, "N M"]) -> Reported:
        action = np.asarray(action)
        return _stack(
            [
                self._reset(lane) if self._ended[lane] else self._step(lane, action[lane])
                for lane in range(self.num_envs)
            ]
        )

    def replicate(self, num_envs: int, seed: int, options: dict[str, Any]) -> "PettingZooHost":
        source, made_with = self._recipe
        return _host(source, num_envs, seed=seed, **(made_with | options))

    def render(self, lane: int) -> Any:
        env = self.envs[lane]
        return env.render() if getattr(env, "render_mode", None) == "rgb_array" else None

    def close(self) -> None:
        self.is_open = False
        for env in self.envs:
            env.close()

    def _reset(self, lane: int) -> Reported:
        env, seed = self.envs[lane], self._seeds[lane]
        self._seeds[lane], self._ended[lane] = None, False
        return self._report(*env.reset(seed=seed), env.agents)

    def _step(self, lane: int, action: Int[np.ndarray, " M"]) -> Reported:
        env = self.envs[lane]
        acting = list(env.agents)
        actions = {x: self._players[x].do(int(action[self._players[x].index])) for x in acting}
        obs, reward, terminated, truncated, info = env.step(actions)
        present = {*acting, *env.agents}
        alive = [x for x in env.agents if not (terminated.get(x) or truncated.get(x))]
        cut_off = [x for x in acting if truncated.get(x) and not terminated.get(x)]
        self._ended[lane] = ended = not alive
        return self._report(
            {agent: one for agent, one in obs.items() if agent in present},
            info,
            alive or cut_off,
            reward={agent: reward[agent] for agent in acting if agent in reward},
            terminated=ended and not cut_off,
            truncated=ended and bool(cut_off),
        )

    def _report(
        self,
        obs: dict[Any, Any],
        info: dict[Any, Any],
        alive: list[Any],
        reward: dict[Any, float] | None = None,
        terminated: bool = False,
        truncated: bool = False,
    ) -> Reported:
        """What one lane reports."""
        reward, agents, space = reward or {}, list(self._players), self.observation_space
        report = {
            "obs": np.zeros((len(agents), *space.shape), space.dtype),
            "reward": self._pay(reward),
            "terminated": np.asarray(terminated),
            "truncated": np.asarray(truncated),
            "agent_mask": np.array([x in alive for x in agents]),
            "agent_reward": np.array([reward.get(x, 0) for x in agents], np.float32),
        }
        if self._has_mask:
            report["action_mask"] = np.zeros((len(agents), int(self.action_space.n)), bool)
        for agent, player in self._players.items():
            m, own = player.index, obs.get(agent)
            if own is not None:
                seen = player.see(own)
                report["obs"][(m, *map(slice, seen.shape))] = seen
            if self._has_mask:
                legal = player.legal(own, info.get(agent, {}))
                report["action_mask"][m, : player.num_actions] = legal
        return report

    def _pay(self, reward: dict[Any, float]) -> np.ndarray:
        """The team's reward."""
        paid = np.array([*reward.values()])
        if self._team_reward == "shared" and len(paid) and not np.allclose(paid, paid[0]):
            raise UsageError(
                f"team_reward=shared, but agents were paid {_listed(paid)}: use sum or mean"
            )
        shares = {"sum": 1, "mean": len(self._players), "shared": max(1, len(paid))}
        return np.asarray(paid.sum() / shares[self._team_reward], np.float32)


def _stack(reports: list[Reported]) -> Reported:
    return {name: np.stack([one[name] for one in reports]) for name in reports[0]}


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(values))


def _common_box(boxes: list[Box], pad: bool) -> Box:
    """A space for what any agent sees, padded at the ends of its axes, and for zeros."""
    shapes = [box.shape for box in boxes]
    if len(set(shapes)) > 1 and not pad:
        raise UsageError(
            f"agents observe arrays of shapes {_listed(shapes)}: pad=true fills them up with zeros"
        )
    if len({len(shape) for shape in shapes}) > 1:
        raise UsageError(f"observations of shapes {_listed(shapes)} cannot be padded to one")
    shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    dtype = np.result_type(*(box.dtype for box in boxes))
    low, high = np.zeros(shape, dtype), np.zeros(shape, dtype)
    for box in boxes:
        own = tuple(map(slice, box.shape))
        low[own] = np.minimum(low[own], box.low)
        high[own] = np.maximum(high[own], box.high)
    return Box(gymnasium.spaces.Box(low, high, shape, dtype.type))


def ids() -> list[str]:
    """The environments of PettingZoo and of mpe2 where all act at once; more can be imported."""
    found = set(_registered(pettingzoo.parallel_registry))
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        modules = pkgutil.iter_modules(spec.submodule_search_locations if spec else [])
        found |= {f"{package}.{one.name}" for one in modules if _VERSION.search(one.name)}
    return sorted(found)


def accepts(source: Any, options: dict[str, Any]) -> bool:
    """Whether `source` is a PettingZoo environment, a class of such, or a function that makes one.

    To know what a function makes, it is called once more; what it made is closed if it is one of
    these. Anything else is left alone: it may be an object that the caller goes on with.
    """
    if isinstance(source, type) or not callable(source):
        kind = source if isinstance(source, type) else type(source)
        return issubclass(kind, (ParallelEnv, AECEnv))
    options = {name: value for name, value in options.items() if name not in _OWN_OPTIONS}
    made: Any = None
    with contextlib.suppress(Exception):
        made = source(**options)
    if not isinstance(made, (ParallelEnv, AECEnv)):
        return False
    made.close()
    return True


def make(
    source: Any,
    num_envs: int,
    *,
    seed: int = 0,
    pad: bool = False,
    team_reward: str = "sum",
    **options: Any,
) -> HostEnv:
    """Makes teams of PettingZoo's.

    **Arguments:**

    - `source`: `"family.name"` of PettingZoo's own (`"classic.rps_v2"`); the name of a
        module with a function `parallel_env` or `env` (`"mpe2.simple_spread_v3"`); or a function
        that returns a `ParallelEnv`, or an `AECEnv` that PettingZoo can convert.
    - `num_envs`: lanes.
    - `seed`: of the environments: lane `i` gets `seed + i`.
    - `pad`: for agents that differ: observations are filled up with zeros at the ends of their
        axes, and actions up to the most that an agent has; the mask forbids those.
    - `team_reward`: `"sum"` of the agents' rewards; `"mean"`, that sum over `num_agents`;
        `"shared"` where all are paid alike: what each of them is.
    - `options`: of the environment, or keyword arguments of the function.
    """
    options = {"pad": pad, "team_reward": team_reward, **options}
    return HostEnv(_host(source, num_envs, seed=seed, **options))


def _host(
    source: Any, num_envs: int, *, seed: int, pad: bool, team_reward: str, **options: Any
) -> PettingZooHost:
    require_choice("team_reward", team_reward, get_args(TeamReward))
    recipe = (source, {"pad": pad, "team_reward": team_reward, **options})
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
        envs = [env, *(_parallel(create(**options)) for _ in range(1, num_envs))]
    except UsageError:
        raise
    except Exception as error:  # whatever an environment's constructor trips over
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"PettingZoo cannot make {source!r}: {what}") from error
    return PettingZooHost(envs, seed, pad, team_reward, recipe)


def _parallel(env: Any) -> ParallelEnv:
    """`env` where all agents act at once."""
    if isinstance(env, AECEnv):
        if not env.metadata.get("is_parallelizable", False):
            raise UsageError(
                f"the agents of {env} take turns, which no team does: PettingZoo can convert only "
                "environments with metadata['is_parallelizable']"
            )
        return aec_to_parallel(env)
    if not isinstance(env, ParallelEnv):
        raise TypeError(f"the function must return a ParallelEnv, not a {type(env).__name__}")
    return env


def _registered(registry: dict[str, EnvSpec]) -> dict[str, EnvSpec]:
    """By the names they have here: `classic/rps-v2` is `classic.rps_v2`."""
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
        raise UsageError(f"the module '{name}' has no function 'parallel_env' or 'env'")
    return create
