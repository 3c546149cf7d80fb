"""A bridge to PettingZoo's API: see `bridges.to_pettingzoo`."""

import copy
from typing import Any

import gymnasium
import jax
import numpy as np
from jaxtyping import Float, PyTree
from pettingzoo import ParallelEnv

from ..types import AnyArray, TimeStep
from .conversion import legal_action, write_mask
from .env import Env
from .loop import Loop


class PettingZooBridge(ParallelEnv):
    """See `to_pettingzoo`."""

    def __init__(self, env: Env, render_mode: str | None):
        self._loop = Loop(env, render_mode)
        self._is_team = env.num_agents is not None
        self.metadata = {"name": "eqx_q", "render_modes": ["rgb_array"], "render_fps": 30}
        self.render_mode = render_mode
        if env.state_size is not None:
            self.state_space = gymnasium.spaces.Box(-np.inf, np.inf, (env.state_size,), np.float32)
        self.agents: list[str] = []
        self.possible_agents = [f"agent_{m}" for m in range(env.num_agents or 1)]
        # A copy for each agent: sampling from one does not affect the others.
        self.observation_spaces = {
            agent: copy.deepcopy(env.observation_space) for agent in self.possible_agents
        }
        self.action_spaces = {
            agent: copy.deepcopy(env.action_space) for agent in self.possible_agents
        }

    def observation_space(self, agent: str):
        return self.observation_spaces[agent]

    def action_space(self, agent: str):
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None):
        self._timestep = timestep = self._loop.reset(seed)
        self.agents = self.possible_agents
        self.agents = [agent for agent, is_alive in self._alive(timestep).items() if is_alive]
        return self._of_agents(timestep.obs), self._infos(timestep)

    def step(self, actions: dict[str, Any]):
        if not self.agents:
            return {}, {}, {}, {}, {}
        chosen = np.stack([self._chosen(agent, actions) for agent in self.possible_agents])
        self._timestep = timestep = self._loop.step(chosen[None] if self._is_team else chosen)
        ended, cut_off = bool(timestep.ended[0]), bool(timestep.truncated[0])
        alive = self._alive(timestep)
        report = (
            self._of_agents(timestep.obs),
            self._rewards(timestep),
            {x: not alive[x] or (ended and not cut_off) for x in self.agents},
            {x: alive[x] and cut_off for x in self.agents},
            self._infos(timestep),
        )
        self.agents = [x for x in self.agents if alive[x] and not ended]
        return report

    def state(self) -> Float[np.ndarray, " S"]:
        state = self._timestep.global_state
        return super().state() if state is None else np.asarray(state[0])

    def render(self):
        return self._loop.render(0)

    def close(self):
        self._loop.env.close()

    def _chosen(self, agent: str, actions: dict[str, Any]) -> AnyArray:
        """The agent's action; for dead agents, a legal one."""
        space, mask = self._loop.env.action_space, self._timestep.action_mask
        if agent in self.agents and agent in actions:
            return np.asarray(actions[agent], space.dtype)
        own = None if mask is None else self._of_all(mask)[self.possible_agents.index(agent)]
        return legal_action(space, own)

    def _of_all(self, values: AnyArray) -> AnyArray:
        """Values per agent; for a single agent, the lane axis serves as the axis of agents."""
        return values[0] if self._is_team else values

    def _of_agents(self, values: PyTree[AnyArray]) -> dict[str, Any]:
        """The values of the acting agents."""
        of_all, numbers = jax.tree.map(self._of_all, values), enumerate(self.possible_agents)
        by_agent = {agent: jax.tree.map(lambda x: x[m], of_all) for m, agent in numbers}  # noqa: B023
        return {agent: by_agent[agent] for agent in self.agents}

    def _alive(self, timestep: TimeStep) -> dict[str, bool]:
        if timestep.agent_mask is None:
            return dict.fromkeys(self.agents, True)
        return {agent: bool(x) for agent, x in self._of_agents(timestep.agent_mask).items()}

    def _rewards(self, timestep: TimeStep) -> dict[str, float]:
        if timestep.agent_reward is None:
            return dict.fromkeys(self.agents, float(timestep.reward[0]))
        return {agent: float(x) for agent, x in self._of_agents(timestep.agent_reward).items()}

    def _infos(self, timestep: TimeStep) -> dict[str, dict[str, Any]]:
        infos: dict[str, dict[str, Any]] = {agent: {} for agent in self.agents}
        metrics = {name: x[0] for name, x in timestep.episode.metrics.items()}
        for info in infos.values() if metrics else ():
            info["metrics"] = metrics.copy()
        if timestep.action_mask is not None:
            for agent, mask in self._of_agents(timestep.action_mask).items():
                infos[agent]["action_mask"] = write_mask(self._loop.env.action_space, mask)
        return infos
