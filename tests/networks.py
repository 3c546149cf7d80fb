"""Helpers for tests of networks: build one from parts, and call it."""

import equinox as eqx
import jax

from eqx_q.nets import AbstractQNetwork, Inputs, NetworkOutput, make_network


@eqx.filter_jit
def call(network: AbstractQNetwork, obs, statistics=None, memory=None, **inputs) -> NetworkOutput:
    """The network on observations `[T, B, ...]`, by default as it is at first."""
    num_rows = jax.tree.leaves(obs)[0].shape[1]
    return network(
        Inputs(obs, **inputs),
        network.initial_statistics() if statistics is None else statistics,
        network.initial_memory(num_rows) if memory is None else memory,
    )


def make(name, space, num_actions, **options) -> AbstractQNetwork:
    """A shipped network for actions of one factor."""
    return make_network(name, space, (num_actions,), **options)


def q_values(network, obs, **inputs) -> jax.Array:
    """`[T, B, A]`, of a network with one value for each choice."""
    (values,) = jax.numpy.moveaxis(call(network, obs, **inputs).values, -1, 0)
    return values
