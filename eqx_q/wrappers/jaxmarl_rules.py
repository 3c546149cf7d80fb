"""`RULES`: facts about JaxMARL's environments that its interface does not expose, by class."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxmarl import environments
from jaxmarl.environments.smax.heuristic_enemy_smax_env import EnemySMAX
from jaxtyping import Array, Bool, Float, Int, UInt8

from ..types import AnyArray
from .drawing import draw_discs, draw_grid
from .options import TeamReward


@dataclasses.dataclass(frozen=True)
class Rules:
    """Facts about an environment that JaxMARL's interface does not expose, but its state does.

    **Attributes**, all but the last two functions of `env` and one lane's state:

    - `terminated`: of `env`, the state before, the actions, the state after, and JaxMARL's `done`:
        whether the task itself ended the episode. If only `done` is true, it was a time limit.
    - `longest`: of `env` alone: the time limit in steps; `None` if there is none.
    - `agent_mask`: mask of agents that are alive.
    - `action_masks`: masks of legal actions, by agent.
    - `global_state`: the state of the whole team, for learning only. JaxNav's is left out: it has
        one per agent, with that agent's observation.
    - `metrics`: further metrics of an episode.
    - `draw`: a picture. (Hanabi and the riddle have none, JaxNav does not have one yet.)
    - `team_reward`: the default for `make`'s option.
    - `shaped`: whether there are shaped rewards in addition to the game's own.
    """

    terminated: Callable[..., Bool[Array, ""]] = lambda env, before, action, after, done: done
    longest: Callable[[Any], int | None] = lambda env: None
    agent_mask: Callable[..., Bool[Array, " M"] | None] = lambda env, state: None
    action_masks: Callable[..., Mapping[str, Array] | None] = lambda env, state: None
    global_state: Callable[..., Float[Array, " S"] | None] = lambda env, state: None
    metrics: Callable[..., dict[str, AnyArray]] = lambda env, state: {}
    draw: Callable[..., UInt8[np.ndarray, "height width 3"] | None] = lambda env, state: None
    team_reward: TeamReward = "sum"
    shaped: bool = False


def _never(env: Any, before: Any, action: Any, after: Any, done: Bool[Array, ""]):
    return jnp.zeros_like(done)


def _steps(env: Any) -> int:
    return int(env.max_steps)


def _steps_and_one(env: Any) -> int:
    return int(env.max_steps) + 1  # it checks the step counter before incrementing it


def _units(state: Any) -> Any:
    return getattr(state, "state", state)  # unwraps the environments with a scripted enemy


def _sides(env: Any, state: Any) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether any ally is alive, and whether any enemy is."""
    alive = _units(state).unit_alive
    return alive[: env.num_allies].any(), alive[env.num_allies :].any()


def _battle_over(env: Any, before: Any, action: Any, after: Any, done: Any) -> Bool[Array, ""]:
    allies, enemies = _sides(env, after)
    return ~allies | ~enemies


def _battle_won(env: Any, state: Any) -> dict[str, AnyArray]:
    allies, enemies = _sides(env, state)
    return {"won": allies & ~enemies}


def _all_arrived_or_crashed(env: Any, before: Any, action: Any, after: Any, done: Any):
    return (after.goal_reached | after.move_term | after.term).all()


def _told(env: Any, before: Any, action: Int[Array, " M"], after: Any, done: Any):
    return action[before.agent_in_room] == env.game_actions["TELL"]


def _draw_battle(env: Any, state: Any) -> UInt8[np.ndarray, "height width 3"]:
    units = _units(state)
    radii = np.asarray(env.unit_type_radiuses)[units.unit_types]
    colours = np.where(units.unit_teams[:, None] == 0, _ALLY, _ENEMY)
    alive, size = units.unit_alive, np.array([env.map_width, env.map_height], float)
    return draw_discs(units.unit_positions[alive], radii[alive], colours[alive], 0 * size, size)


def _draw_particles(env: Any, state: Any) -> UInt8[np.ndarray, "height width 3"]:
    colours = np.asarray(env.colour, np.uint8)
    corner = np.array([2.0, 2.0])
    return draw_discs(state.p_pos, np.asarray(env.rad), colours, -corner, corner)


def _draw_kitchen(env: Any, state: Any) -> UInt8[np.ndarray, "height width 3"]:
    from jaxmarl.viz.overcooked_visualizer import OvercookedVisualizer  # imports matplotlib

    border = env.agent_view_size - 1
    grid = np.asarray(state.maze_map)[border:-border, border:-border]
    return OvercookedVisualizer._render_grid(
        grid, agent_dir_idx=state.agent_dir_idx, agent_inv=state.agent_inv
    )


def _draw_kitchen_v2(env: Any, state: Any) -> UInt8[np.ndarray, "height width 3"]:
    return np.asarray(_kitchen_v2()._render_state(state), np.uint8)


@functools.cache
def _kitchen_v2() -> Any:
    """One visualizer for all, since each compiles its own code."""
    from jaxmarl.viz.overcooked_v2_visualizer import OvercookedV2Visualizer

    return OvercookedV2Visualizer()


def _draw_coins(env: Any, state: Any) -> UInt8[np.ndarray, "height width 3"]:
    places = (state.red_coin_pos, state.blue_coin_pos, state.red_pos, state.blue_pos)
    grid = np.zeros((3, 3, 4), np.float32)
    for thing, place in enumerate(places):
        grid[*place, thing] = 1
    return draw_grid(grid)


_ALLY, _ENEMY = np.array([(80, 140, 255), (90, 200, 90)], np.uint8)

_BATTLE = Rules(
    terminated=_battle_over,
    longest=_steps_and_one,
    agent_mask=lambda env, state: _units(state).unit_alive[: env.num_agents],
    action_masks=lambda env, state: env.get_avail_actions(state),
    global_state=lambda env, state: env.get_world_state(state).astype(jnp.float32),
    metrics=_battle_won,
    draw=_draw_battle,
)
_KITCHEN = Rules(terminated=_never, longest=_steps, team_reward="shared", shaped=True)

RULES: list[tuple[type, Rules]] = [
    (environments.SMAX, _BATTLE),
    (EnemySMAX, dataclasses.replace(_BATTLE, team_reward="shared")),
    (environments.Overcooked, dataclasses.replace(_KITCHEN, draw=_draw_kitchen)),
    (environments.OvercookedV2, dataclasses.replace(_KITCHEN, draw=_draw_kitchen_v2)),
    (
        environments.SimpleMPE,
        Rules(terminated=_never, longest=_steps_and_one, draw=_draw_particles),
    ),
    (
        environments.Hanabi,
        Rules(
            action_masks=lambda env, state: env.get_legal_moves(state),
            team_reward="shared",
        ),
    ),
    (environments.SwitchRiddle, Rules(terminated=_told, longest=_steps, team_reward="shared")),
    (
        environments.CoinGame,
        Rules(
            terminated=_never,
            longest=lambda env: env.num_inner_steps * env.num_outer_steps,
            draw=_draw_coins,
        ),
    ),
    (
        environments.JaxNav,
        Rules(
            terminated=_all_arrived_or_crashed,
            longest=_steps,
            # Not `done`, which the time limit also sets. `term` lags by one step, but nothing else
            # records the agents that evaporated then.
            agent_mask=lambda env, state: ~(state.goal_reached | state.move_term | state.term),
        ),
    ),
]
