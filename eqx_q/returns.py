"""Targets of temporal-difference learning, as pure functions over time-major arrays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .types import AnyArray, Scalar


def q_lambda(
    reward: Float[AnyArray, "T *lanes"],
    terminated: Bool[AnyArray, "T *lanes"],
    truncated: Bool[AnyArray, "T *lanes"],
    next_value: Float[AnyArray, "T *lanes"],
    *,
    discount: Scalar,
    lambda_: Scalar,
) -> Float[Array, "T *lanes"]:
    """Q(λ) targets (Peng & Williams 1996; PQN, Gallici et al. 2024, §3).

        G_t = r_t + γ (1 - terminated_t) [(1 - λ c_t) next_value_t + λ c_t G_{t+1}]

    with c_t = 0 where the episode terminated or was truncated, and at the last step; else 1.

    **Arguments:**

    - `reward`, `terminated`, `truncated`: what step `t` led to.
    - `next_value`: max_a Q at the observation that step `t` led to: at a truncation, that is the
        episode's true final observation.
    - `discount`: γ.
    - `lambda_`: λ.

    A step that resets a lane is no transition: its own target means nothing and must be masked,
    but no other target depends on it, since the step before it has c = 0.
    """
    reward, terminated, truncated = map(jnp.asarray, (reward, terminated, truncated))
    continues = ~(terminated | truncated).at[-1].set(True)  # the last step has no trace either
    trace = lambda_ * continues
    bootstrap = discount * ~terminated
    next_value = jnp.where(terminated, 0.0, next_value)  # whatever it is, NaN included
    # G_t = offset_t + factor_t G_{t+1}: all but the recurrence is done outside the scan.
    offset = reward + bootstrap * (1 - trace) * next_value
    factor = bootstrap * trace

    def backwards(target, step):
        offset, factor = step
        target = offset + factor * target
        return target, target

    _, targets = jax.lax.scan(
        backwards, jnp.zeros_like(reward[0]), (offset, factor), reverse=True, unroll=8
    )
    return targets
