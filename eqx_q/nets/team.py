"""Networks of teams. Agents are lanes: `B = N * M`, and lane `n * M + m` is agent `m`'s.

A team that shares parameters needs no special network: each lane is computed on its own. `AgentId`
lets such a network distinguish the agents. `PerAgent` gives each its own parameters.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..errors import UsageError
from ..types import AnyArray
from .layers import AbstractLayer, Batch, BatchMask
from .network import AbstractQNetwork, Inputs, NetworkOutput


class AgentId(AbstractLayer):
    """Appends the one-hot index of the agent to features `[B, *axes, features]`."""

    num_agents: int = eqx.field(static=True)

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        """Raises `UsageError` if the rows are not those of whole teams."""
        num_teams = _num_teams(x.shape[0], self.num_agents)
        ids = jnp.broadcast_to(jnp.eye(self.num_agents), (num_teams, *[self.num_agents] * 2))
        ids = ids.reshape(x.shape[0], *[1] * (x.ndim - 2), self.num_agents)
        ids = jnp.broadcast_to(ids, (*x.shape[:-1], self.num_agents))
        return jnp.concatenate([x, ids], axis=-1), None


class PerAgent(AbstractQNetwork):
    """A team whose agents have their own parameters, or share them within a kind.

    **Attributes:** `members`: a network whose arrays have a leading axis of kinds, made by
    `eqx.filter_vmap` over keys. `kinds`: the index into this axis for each of the `M` agents:
    `(0, 1, 2)` is one network each, `(0, 0, 1)` one per kind. Statistics have a leading axis `M`,
    memory a leading axis of lanes.
    """

    members: AbstractQNetwork
    kinds: tuple[int, ...] = eqx.field(static=True)

    def initial_statistics(self) -> PyTree:
        return eqx.filter_vmap(lambda member: member.initial_statistics())(self._agents())

    def initial_memory(self, num_lanes: int) -> PyTree:
        num_teams = _num_teams(num_lanes, len(self.kinds))
        make = eqx.filter_vmap(lambda member: member.initial_memory(num_teams), out_axes=1)
        return _merge(make(self._agents()), axis=0)

    def __call__(self, inputs: Inputs, statistics: PyTree, memory: PyTree) -> NetworkOutput:
        """See `AbstractQNetwork`. Raises `UsageError` if the lanes are not whole teams."""

        def call(member, statistics, memory, inputs):
            output = member(inputs, statistics, memory)
            return (output.values, output.features), output.memory, output.statistics

        call = eqx.filter_vmap(call, in_axes=(eqx.if_array(0), 0, 1, 2), out_axes=(2, 1, 0))
        told, memory, statistics = call(
            self._agents(), statistics, self._split(memory, axis=0), self._split(inputs, axis=1)
        )
        values, features = _merge(told, axis=1)
        return NetworkOutput(values, _merge(memory, axis=0), statistics, features)

    def _agents(self) -> AbstractQNetwork:
        """The network with a leading axis of agents."""
        if self.kinds == tuple(range(len(self.kinds))):
            return self.members
        arrays, rest = eqx.partition(self.members, eqx.is_array)
        return eqx.combine(jax.tree.map(lambda x: x[np.array(self.kinds)], arrays), rest)

    def _split(self, tree: PyTree, axis: int) -> PyTree:
        """Lanes `N * M` at `axis` as `N, M`."""

        def split(x: AnyArray) -> AnyArray:
            num_teams = _num_teams(x.shape[axis], len(self.kinds))
            return x.reshape(*x.shape[:axis], num_teams, len(self.kinds), *x.shape[axis + 1 :])

        return jax.tree.map(split, tree)


def _merge(tree: PyTree, axis: int) -> PyTree:
    """Undoes `_split`."""
    return jax.tree.map(lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]), tree)


def _num_teams(num_lanes: int, num_agents: int) -> int:
    if num_lanes % num_agents:
        raise UsageError(
            f"{num_lanes} lanes are not whole teams of {num_agents} agents: give all agents of "
            "each team, one after the other"
        )
    return num_lanes // num_agents
