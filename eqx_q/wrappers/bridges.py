"""Bridges from eqx_q environments to the APIs of Gymnasium and PettingZoo."""

import copy
import importlib.util
from typing import TYPE_CHECKING, Any

import gymnasium
import jax
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ..errors import MissingExtraError, UsageError
from ..types import TimeStep
from .conversion import write_mask
from .env import Env
from .loop import Loop

if TYPE_CHECKING:
    from .pettingzoo_bridge import PettingZooBridge


def to_gymnasium(
    env: Env, *, render_mode: str | None = None
) -> "GymnasiumBridge | GymnasiumVectorBridge":
    """`env` as a `gymnasium.Env` if it has one lane, else as a `gymnasium.vector.VectorEnv`.

    A vector environment resets lanes as `env` does, in the step after their episode ended
    (`AutoresetMode.NEXT_STEP`). `info` has `"action_mask"` if there is one (in the form that
    Gymnasium's spaces sample with), and `"metrics"` if the suite has some. Compiled once.

    **Arguments:**

    - `render_mode`: `"rgb_array"`, or `None` to draw nothing.

    **Seeds.** `reset(seed=s)` starts from `jax.random.key(s)`; each reset and step takes
    `key, own = jax.random.split(key)` and uses `own`. Environments outside JAX (`env.on_host`) are
    seeded when they are made: a seed has no effect on them, and a warning says so.

    **Raises:** `UsageError` for a team.
    """
    if env.num_agents is not None:
        raise UsageError("Gymnasium does not support teams: use eqx_q.wrappers.to_pettingzoo")
    bridge = GymnasiumBridge if env.num_envs == 1 else GymnasiumVectorBridge
    return bridge(env, render_mode)


def to_pettingzoo(env: Env, *, render_mode: str | None = None) -> "PettingZooBridge":
    """`env`, which must have one lane, as a PettingZoo `ParallelEnv` of `"agent_0"`, `"agent_1"`...

    An agent is terminated in the step that removes it from `agent_mask`; the others are terminated
    or truncated with the team's episode. An agent gets its own reward if there is one, else the
    team's. `state()` is the timestep's `global_state`, if there is one. An environment without
    agents becomes a team of one. `info`, seeds and `render_mode` are as in `to_gymnasium`.

    **Raises:** `UsageError` for more lanes; `MissingExtraError` without PettingZoo.
    """
    if env.num_envs != 1:
        raise UsageError(
            f"PettingZoo does not support lanes, but env has {env.num_envs}: make it with "
            "num_envs=1"
        )
    if importlib.util.find_spec("pettingzoo") is None:
        raise MissingExtraError("pettingzoo", "multi-agent")
    from .pettingzoo_bridge import PettingZooBridge  # an optional package

    return PettingZooBridge(env, render_mode)


class GymnasiumBridge(gymnasium.Env):
    """See `to_gymnasium`."""

    def __init__(self, env: Env, render_mode: str | None):
        self._loop = Loop(env, render_mode)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
        self.render_mode = render_mode
        self.observation_space = copy.deepcopy(env.observation_space)
        self.action_space = copy.deepcopy(env.action_space)
        self._over = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        timestep = self._loop.reset(seed)
        self._over = False
        return _lane(timestep.obs), self._info(timestep)

    def step(self, action: Any):
        if self._over:
            raise gymnasium.error.ResetNeeded("the episode is over: call reset")
        timestep = self._loop.step(np.array([action]))
        self._over = bool(timestep.ended[0])
        return (
            _lane(timestep.obs),
            float(timestep.reward[0]),
            bool(timestep.terminated[0]),
            bool(timestep.truncated[0]),
            self._info(timestep),
        )

    def render(self):
        return self._loop.render(0)

    def close(self):
        self._loop.env.close()

    def _info(self, timestep: TimeStep) -> dict[str, Any]:
        info: dict[str, Any] = {}
        if timestep.action_mask is not None:
            info["action_mask"] = write_mask(self._loop.env.action_space, timestep.action_mask[0])
        if timestep.episode.metrics:
            info["metrics"] = _lane(timestep.episode.metrics)
        return info


class GymnasiumVectorBridge(VectorEnv):
    """See `to_gymnasium`."""

    def __init__(self, env: Env, render_mode: str | None):
        self._loop = Loop(env, render_mode)
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": 30,
            "autoreset_mode": AutoresetMode.NEXT_STEP,
        }
        self.render_mode = render_mode
        self.num_envs = env.num_envs
        self.single_observation_space = copy.deepcopy(env.observation_space)
        self.single_action_space = copy.deepcopy(env.action_space)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        timestep = self._loop.reset(seed)
        return timestep.obs, self._infos(timestep)

    def step(self, actions: Any):
        timestep = self._loop.step(np.asarray(actions))
        flags = timestep.terminated, timestep.truncated
        return timestep.obs, timestep.reward, *flags, self._infos(timestep)

    def render(self):
        if self.render_mode is None:
            return None
        return tuple(self._loop.render(lane) for lane in range(self.num_envs))

    def close_extras(self, **kwargs: Any):
        self._loop.env.close()

    def _infos(self, timestep: TimeStep) -> dict[str, Any]:
        """The `info` of all lanes; Gymnasium's markers say that every lane has each entry."""
        info: dict[str, Any] = {}
        if timestep.action_mask is not None:
            space = self._loop.env.action_space
            masks = [write_mask(space, lane) for lane in timestep.action_mask]
            info["action_mask"] = _of_lanes(masks)
        if timestep.episode.metrics:
            info["metrics"] = timestep.episode.metrics
        return info | {f"_{name}": np.ones(self.num_envs, bool) for name in info}


def _lane(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _of_lanes(masks: list[Any]) -> np.ndarray:
    """Stacks entries of `info` as Gymnasium does: non-arrays in an array of objects."""
    if isinstance(masks[0], np.ndarray):
        return np.stack(masks)
    objects = np.empty(len(masks), object)
    for lane, mask in enumerate(masks):
        objects[lane] = mask
    return objects
