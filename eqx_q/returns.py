"""Temporal-difference targets, as pure functions over time-major arrays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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

    - `reward`, `terminated`, `truncated`: the outcome of step `t`.
    - `next_value`: max_a Q at the observation after step `t`; at a truncation, that is the
        episode's true final observation.
    - `discount`: γ.
    - `lambda_`: λ.

    A step that resets a lane is not a transition: its target is meaningless and must be masked. No
    other target depends on it, since the step before it has c = 0.
    """
    reward, terminated, truncated = map(jnp.asarray, (reward, terminated, truncated))
    continues = ~(terminated | truncated).at[-1].set(True)  # the last step has no trace either
    trace = lambda_ * continues
    bootstrap = discount * ~terminated
    next_value = jnp.where(terminated, 0.0, next_value)  # replaces even NaN
    # G_t = offset_t + factor_t G_{t+1}: everything but the recurrence is outside the scan.
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


def n_step(
    reward: Float[AnyArray, "*#batch n"],
    length: Int[AnyArray, "*#batch"],
    terminated: Bool[AnyArray, "*#batch"],
    next_value: Float[AnyArray, "*#batch"],
    *,
    discount: Scalar,
) -> Float[Array, "*#batch"]:
    """n-step targets (Sutton & Barto 2018, equation 7.1), cut off at the end of the episode.

        G = sum_{i < k} γ^i r_i + γ^k (1 - terminated) next_value,   k = length <= n

    **Arguments:**

    - `reward`: of the `n` steps, 0 from step `length` on.
    - `length`: steps to the observation of `next_value`.
    - `terminated`: whether the task ended there; a truncated episode is bootstrapped.
    - `next_value`: the value of that observation.
    - `discount`: γ.
    """
    powers = jnp.asarray(discount, jnp.float32) ** jnp.arange(reward.shape[-1])
    next_value = jnp.where(terminated, 0.0, next_value)  # replaces even NaN
    return jnp.sum(powers * reward, axis=-1) + discount**length * next_value


def n_step_sequence(
    reward: Float[AnyArray, "T *lanes"],
    terminated: Bool[AnyArray, "T *lanes"],
    truncated: Bool[AnyArray, "T *lanes"],
    next_value: Float[AnyArray, "T *lanes"],
    *,
    discount: Scalar,
    n: int,
) -> Float[Array, "T *lanes"]:
    """n-step targets for every step of sequences (Sutton & Barto 2018, equation 7.1).

        G^1_t = r_t + γ (1 - terminated_t) next_value_t
        G^n_t = r_t + γ (1 - terminated_t) [(1 - c_t) next_value_t + c_t G^{n-1}_{t+1}]

    with c_t = 0 where the episode terminated or was truncated, and at the last step; else 1. So
    the targets of the last `n - 1` steps span fewer than `n` steps. Arguments as in `q_lambda`.
    """
    reward, terminated, truncated = map(jnp.asarray, (reward, terminated, truncated))
    continues = ~(terminated | truncated).at[-1].set(True)
    next_value = jnp.where(terminated, 0.0, next_value)  # replaces even NaN
    target = reward + discount * next_value
    for _ in range(n - 1):
        later = jnp.concatenate([target[1:], target[-1:]])
        target = reward + discount * jnp.where(continues, later, next_value)
    return target


def quantile_huber(
    quantiles: Float[Array, "*batch K"], targets: Float[Array, "*batch L"]
) -> Float[Array, "*batch"]:
    """The quantile Huber loss with κ = 1 (Dabney et al. 2018, equation 10).

    Summed over the `K` quantiles, whose fractions are the midpoints (2i + 1) / 2K, and averaged
    over the `L` target samples.
    """
    fractions = (jnp.arange(quantiles.shape[-1]) + 0.5) / quantiles.shape[-1]
    error = targets[..., None, :] - quantiles[..., :, None]
    huber = jnp.where(jnp.abs(error) <= 1, 0.5 * error**2, jnp.abs(error) - 0.5)
    weight = jnp.abs(fractions[:, None] - (error < 0))
    return jnp.sum(jnp.mean(weight * huber, axis=-1), axis=-1)
