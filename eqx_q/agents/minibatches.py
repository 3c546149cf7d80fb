"""Shuffled minibatches of a rollout, drawn within groups of lanes.

Every minibatch takes equally from each of `G` lane groups, so that devices that share the groups
need no data of each other.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Shaped

from ..types import AnyArray, Rollout


def shuffled(
    key: PRNGKeyArray, num_items: int, num_epochs: int, num_minibatches: int, num_groups: int
) -> Int[Array, "steps G B"]:
    """Indices of the items of each gradient step within each group of `num_items`.

    Each epoch is shuffled once.
    """
    # One sort of random keys: `jax.random.permutation` sorts twice.
    shape = (num_epochs, num_groups, num_items)
    order = jnp.argsort(jax.random.bits(key, shape), axis=-1)
    parts = order.reshape(*shape[:2], num_minibatches, -1)
    return jnp.moveaxis(parts, 1, 2).reshape(-1, num_groups, parts.shape[-1])


def as_row(x: Shaped[AnyArray, "T N ..."], num_groups: int) -> Shaped[Array, "TN ..."]:
    """Flattens all steps of all lanes, lane group by lane group."""
    groups = jnp.reshape(x, (x.shape[0], num_groups, -1, *x.shape[2:]))
    return jnp.moveaxis(groups, 1, 0).reshape(-1, *x.shape[2:])


def take(tree: PyTree[Array], index: Int[Array, "G B"], axis: int = 0) -> PyTree[Array]:
    """Takes items by their indices in each lane group; `axis` holds group after group."""
    return jax.tree.map(partial(_take, index=index, axis=axis), tree)


def take_lanes(rollout: Rollout, index: Int[Array, "G B"]) -> Rollout:
    """Takes lanes of a rollout by their indices in each lane group."""
    num_lanes = rollout.actions.shape[1]
    timesteps, actions = take((rollout.timesteps, rollout.actions), index, axis=1)

    def rows(x: Array) -> Array:  # of all agents of these lanes
        lanes = _take(x.reshape(num_lanes, -1, *x.shape[1:]), index)
        return lanes.reshape(-1, *x.shape[1:])

    return Rollout(timesteps, actions, jax.tree.map(rows, rollout.memory))


def apart(rollout: Rollout, num_groups: int) -> Rollout:
    """Splits a rollout by lane group, on a leading axis."""

    def lanes(x: Array, axis: int) -> Array:
        x = x.reshape(*x.shape[:axis], num_groups, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    over_time = partial(lanes, axis=1)
    timesteps, actions = jax.tree.map(over_time, (rollout.timesteps, rollout.actions))
    return Rollout(timesteps, actions, jax.tree.map(partial(lanes, axis=0), rollout.memory))


def _take(x: Shaped[Array, "..."], index: Int[Array, "G B"], axis: int = 0) -> Shaped[Array, "..."]:
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    groups = x.reshape(*before, len(index), -1, *after)

    def own(x: Array, i: Array) -> Array:  # without checks of the index, which take a kernel
        place = x.at[(*[slice(None)] * axis, i)]
        return place.get(mode="promise_in_bounds", wrap_negative_indices=False)

    taken = jax.vmap(own, in_axes=(axis, 0), out_axes=axis)(groups, index)
    return taken.reshape(*before, -1, *after)
