"""What JaxMARL's interface does not tell of its environments, by kind: `RULES`."""

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
    """What JaxMARL's interface does not tell of an environment, but its state does.

    **Attributes**, all functions but the last two (`env`, then one lane's state):

    - `terminated`: of `env`, the state before, the actions, the state after, and JaxMARL's `done`:
        whether the task itself ended the episode. Where `done` and not this, it was a time limit.
    - `longest`: the steps of an episode that only the limit ends; `None` where there is no limit.
    - `agent_mask`: which agents live.
    - `action_masks`: by agent, the actions that are legal.
    - `global_state`: what learning may see of all, and no agent does. JaxNav's is left out: it is
        one for each agent, with what that agent sees.
    - `metrics`: what else to say of an episode.
    - `draw`: a picture. (Of Hanabi's cards and of the riddle there is none, of JaxNav not yet.)
    - `team_reward`: how the agents' rewards make the team's, where the caller does not say.
    - `shaped`: whether there are shaped rewards beside the game's own.
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
    return int(env.max_steps) + 1  # it looks at the clock before it sets it forward


def _units(state: Any) -> Any:
    return getattr(state, "state", state)  # an enemy that plays by itself is wrapped around them


def _sides(env: Any, state: Any) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether anybody lives of the allies, and of the enemies."""
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
    from jaxmarl.viz.overcooked_visualizer import OvercookedVisualizer  # it brings matplotlib

    border = env.agent_view_size - 1
    grid = np.asarray(state.maze_map)[border:-border, border:-border]
    return OvercookedVisualizer._render_grid(
        grid, agent_dir_idx=state.agent_dir_idx, agent_inv=state.agent_inv
    )


def _draw_kitchen_v2(env: Any, state: Any) -> UInt8[np.ndarray, "height width 3"]:
    return np.asarray(_kitchen_v2()._render_state(state), np.uint8)


@functools.cache
def _kitchen_v2() -> Any:
    """One for all: what it compiles is its own."""
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
            # Not `done`, which the time limit sets too. `term` is what it was a step before: of
            # those who evaporated then, nothing else is remembered.
            agent_mask=lambda env, state: ~(state.goal_reached | state.move_term | state.term),
        ),
    ),
]
