"""From Q-values to decisions: what every agent's `act` shares."""

import gymnasium
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..errors import UsageError
from ..types import AnyArray, Decision, Memory, Scalar
from .exploration import epsilon_greedy, legal


def lanes_of(
    shape: tuple[int, ...], space: gymnasium.spaces.Box, num_agents: int | None
) -> tuple[int, ...]:
    """The axes of `shape` before those of one observation: lanes, if any; agents, in a team.

    **Raises:** `UsageError` where `shape` is not that of observations of `space`.
    """
    own = space.shape
    team = () if num_agents is None else (num_agents,)
    lanes = shape[: len(shape) - len(own)]
    if (
        shape != (*lanes, *own)
        or len(lanes) - len(team) not in (0, 1)
        or (lanes[len(lanes) - len(team) :] != team)
    ):
        one = (*team, *own)
        raise UsageError(
            f"obs has shape {shape}; the agent expects {one}, "
            f"or (lanes, {', '.join(map(str, one))})"
        )
    return lanes


def check_mask(mask: AnyArray | None, shape: tuple[int, ...]) -> None:
    """Raises `UsageError` where a mask of actions has another shape."""
    if mask is not None and mask.shape != shape:
        raise UsageError(
            f"action_mask has shape {mask.shape}, not {shape}: axes are lanes, agents of a team, "
            "then actions"
        )


def choose(
    q_values: Float[Array, "*lanes A"],
    action_mask: Bool[AnyArray, "..."] | None,
    epsilon: Scalar,
    key: PRNGKeyArray | None,
    memory: Memory = None,
) -> Decision:
    """The best legal action, or with a key and probability `epsilon` any legal one.

    **Raises:** `UsageError` where the mask has another shape than the Q-values.
    """
    check_mask(action_mask, q_values.shape)
    mask = None if action_mask is None else jnp.asarray(action_mask)
    q_values = legal(q_values, mask)
    if key is None:
        action = jnp.argmax(q_values, axis=-1)
    else:
        action = epsilon_greedy(q_values, epsilon, key, mask)
    return Decision(action, jnp.max(q_values, axis=-1), memory)
