"""Environments with every kind of observation and action."""

from typing import ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from pettingzoo import ParallelEnv

ACTIONS = {
    "discrete": Discrete(3, start=-1),
    "multi_discrete": MultiDiscrete([2, 3], start=[0, 4]),
    "multi_binary": MultiBinary(2),
    "box": Box(np.array([-1.0, 0.1]), np.array([0.3, 5.0]), dtype=np.float64),
    "whole_box": Box(np.array([-1, 2]), np.array([1, 5]), dtype=np.int16),
}


def observed(actions) -> Dict:
    x = Box(-9, 9, (2,), np.float64)
    return Dict(
        {
            "last": actions,
            "nest": Tuple([Discrete(4, start=2), Dict({"x": x, "bits": MultiBinary(2)})]),
            "image": Box(0, 255, (3, 3, 1), np.uint8),
            "word": Text(3),
        }
    )


def observe(last, time, start):
    inner = {"x": np.array([start, time / 3]), "bits": np.array([time % 2, 1], np.int8)}
    image = np.full((3, 3, 1), time, np.uint8)
    return {"last": last, "nest": (2 + time % 4, inner), "image": image, "word": "abc"}


def least(actions):
    """An action to start from."""
    if isinstance(actions, Box):
        return actions.low
    return np.zeros(actions.shape, actions.dtype)[()] + getattr(actions, "start", 0)


def multi_mask(time):
    """What is legal of `multi_discrete`: an array for each factor."""
    return np.array([1, time % 2], np.int8), np.array([time % 2, 1, time == 3], np.int8)


class Kinds(gymnasium.Env):
    """Pays what it was told to do; ends after 4 to 6 steps."""

    def __init__(self, actions: str = "multi_discrete"):
        self.action_space = ACTIONS[actions]
        self.observation_space = observed(self.action_space)

    def _report(self):
        multi = isinstance(self.action_space, MultiDiscrete)
        info = {"action_mask": multi_mask(self.time)} if multi else {}
        return observe(self.last, self.time, self.start), info

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.start = 0, int(self.np_random.integers(3))
        self.last = least(self.action_space)
        return self._report()

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time, self.last = self.time + 1, action
        obs, info = self._report()
        return obs, float(np.sum(action)), self.time == 4 + self.start, False, info


class KindsTeam(ParallelEnv):
    """Two that are alike; each is paid what it does. The second leaves after 2 steps."""

    metadata: ClassVar = {"name": "kinds", "render_modes": []}
    possible_agents: ClassVar = ["a", "b"]
    render_mode = None

    def __init__(self, actions: str = "multi_discrete"):
        self.action_spaces = dict.fromkeys("ab", ACTIONS[actions])
        self.observation_spaces = {agent: observed(ACTIONS[actions]) for agent in "ab"}

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def state(self):
        return np.array([self.time, len(self.agents), 0.5])

    def _observe(self, agents):
        infos = {agent: {"action_mask": multi_mask(self.time)} for agent in agents}
        if not isinstance(self.action_spaces["a"], MultiDiscrete):
            infos = {agent: {} for agent in agents}
        return {agent: observe(self.last[agent], self.time, 1) for agent in agents}, infos

    def reset(self, seed=None, options=None):
        self.time, self.agents = 0, ["a", "b"]
        self.last = {agent: least(self.action_spaces[agent]) for agent in self.agents}
        return self._observe(self.agents)

    def step(self, actions):
        acting, self.time, self.last = self.agents, self.time + 1, actions
        for agent in acting:
            assert self.action_spaces[agent].contains(actions[agent])
        over = {agent: self.time == (2 if agent == "b" else 5) for agent in acting}
        self.agents = [agent for agent in acting if not over[agent]]
        obs, infos = self._observe(acting)
        paid = {agent: float(np.sum(actions[agent])) for agent in acting}
        return obs, paid, over, dict.fromkeys(acting, False), infos
