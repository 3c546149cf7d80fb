"""Lanes of an environment that is written in JAX."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree, Shaped, UInt8

from ..spaces import Leaf, Space
from ..types import TimeStep
from . import autoreset
from .autoreset import LaneState, Report
from .env import Env


@runtime_checkable
class Game(Protocol):
    """A suite's environment with its parameters, for one lane.

    Hashed by identity, and shared by equal calls of `make`, so that they share compiled code.

    **Attributes:**

    - `observation_space`, `action_space`, `num_agents`, `max_episode_steps`, `state_size`,
        `agent_kinds`: as in [`eqx_q.wrappers.Env`][].
    - `lanes_per_reset`: `None` for cheap resets, computed in every lane and step. A number for
        expensive ones, computed in batches of `num_envs / lanes_per_reset`; see `autoreset.step`.
    """

    @property
    def observation_space(self) -> Space: ...
    @property
    def action_space(self) -> Leaf: ...
    @property
    def num_agents(self) -> int | None: ...
    @property
    def max_episode_steps(self) -> int | None: ...
    @property
    def state_size(self) -> int | None: ...
    @property
    def agent_kinds(self) -> tuple[int, ...] | None: ...
    @property
    def lanes_per_reset(self) -> int | None: ...

    def reset(self, key: PRNGKeyArray) -> tuple[PyTree, Report]:
        """Starts an episode in one lane."""
        ...

    def step(
        self, state: PyTree, action: Shaped[Array, "*M_and_action"], key: PRNGKeyArray
    ) -> tuple[PyTree, Report]:
        """Acts in one lane."""
        ...

    def render(self, state: PyTree) -> UInt8[np.ndarray, "height width 3"] | None:
        """Draws one lane."""
        ...

    def replace(self, options: dict[str, Any]) -> "Game":
        """The same game with some options replaced."""
        ...


class Lanes(Env):
    """Lanes of one game."""

    game: Game = eqx.field(static=True)
    observation_space: Space = eqx.field(static=True)
    action_space: Leaf = eqx.field(static=True)
    num_envs: int = eqx.field(static=True)
    num_agents: int | None = eqx.field(static=True)
    on_host: bool = eqx.field(static=True)
    max_episode_steps: int | None = eqx.field(static=True)

    def __init__(self, game: Game, num_envs: int):
        self.game = game
        self.observation_space = game.observation_space
        self.action_space = game.action_space
        self.num_envs = num_envs
        self.num_agents = game.num_agents
        self.on_host = False
        self.max_episode_steps = game.max_episode_steps

    @property
    def state_size(self) -> int | None:
        return self.game.state_size

    @property
    def agent_kinds(self) -> tuple[int, ...] | None:
        return self.game.agent_kinds

    def reset(self, key: PRNGKeyArray) -> tuple[LaneState, TimeStep]:
        return autoreset.reset(self.game.reset, key, self.num_envs)

    def step(
        self, state: LaneState, action: Shaped[Array, "N *M_and_action"], key: PRNGKeyArray
    ) -> tuple[LaneState, TimeStep]:
        ratio = self.game.lanes_per_reset
        at_once = None if ratio is None else -(-self.num_envs // ratio)
        return autoreset.step(
            self.game.reset, self.game.step, state, action, key, resets_at_once=at_once
        )

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any) -> "Lanes":
        del seed  # all randomness comes from the keys
        return Lanes(self.game.replace(options) if options else self.game, num_envs)

    def render(self, state: LaneState, lane: int = 0) -> UInt8[np.ndarray, "height width 3"] | None:
        return self.game.render(jax.tree.map(lambda x: x[lane], state.inner))

    def close(self) -> None:
        pass
