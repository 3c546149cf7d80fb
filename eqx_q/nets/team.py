"""Networks of teams. Agents are lanes: `B = N * M`, and lane `n * M + m` is agent `m`'s.

A team that shares its parameters needs no network of its own: each lane is computed for itself.
`AgentId` lets such a network tell the agents apart. `PerAgent` gives each its own parameters.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from ..errors import UsageError
from ..types import Memory
from .layers import AbstractLayer, Batch, BatchMask
from .network import AbstractQNetwork, NetworkOutput


class AgentId(AbstractLayer):
    """Features `[B, *axes, features]`, then as one-hot which of `num_agents` agents the row is."""

    num_agents: int = eqx.field(static=True)

    def initial_statistics(self) -> PyTree:
        return None

    def __call__(
        self, x: Batch, statistics: PyTree = None, batch_mask: BatchMask = None
    ) -> tuple[Batch, PyTree]:
        """Raises `UsageError` where the rows are not those of whole teams."""
        num_teams = _num_teams(x.shape[0], self.num_agents)
        ids = jnp.broadcast_to(jnp.eye(self.num_agents), (num_teams, *[self.num_agents] * 2))
        ids = ids.reshape(x.shape[0], *[1] * (x.ndim - 2), self.num_agents)
        ids = jnp.broadcast_to(ids, (*x.shape[:-1], self.num_agents))
        return jnp.concatenate([x, ids], axis=-1), None


class PerAgent(AbstractQNetwork):
    """A team whose agents have parameters (statistics, memory) of their own.

    **Attributes:** `members`: a network whose arrays have a leading axis `M`, as `eqx.filter_vmap`
    over keys makes it. Statistics have that axis too; memory has a leading axis of lanes.
    """

    members: AbstractQNetwork
    num_agents: int = eqx.field(static=True)

    def initial_statistics(self) -> PyTree:
        return eqx.filter_vmap(lambda member: member.initial_statistics())(self.members)

    def initial_memory(self, num_lanes: int) -> Memory:
        num_teams = _num_teams(num_lanes, self.num_agents)
        make = eqx.filter_vmap(lambda member: member.initial_memory(num_teams), out_axes=1)
        return _merge(make(self.members), axis=0)

    def __call__(
        self,
        obs: Shaped[Array, "T B *obs"],
        statistics: PyTree,
        memory: Memory = None,
        *,
        first: Bool[Array, "T B"] | None = None,
        last_action: Int[Array, "T B"] | None = None,
        last_reward: Float[Array, "T B"] | None = None,
        batch_mask: Bool[Array, "T B"] | None = None,
    ) -> NetworkOutput:
        """See `AbstractQNetwork`. Raises `UsageError` where the lanes are not whole teams."""

        def call(member, statistics, memory, inputs):
            obs, first, last_action, last_reward, batch_mask = inputs
            output = member(
                obs,
                statistics,
                memory,
                first=first,
                last_action=last_action,
                last_reward=last_reward,
                batch_mask=batch_mask,
            )
            return output.q_values, output.memory, output.statistics

        inputs = self._split((obs, first, last_action, last_reward, batch_mask), axis=1)
        call = eqx.filter_vmap(call, in_axes=(eqx.if_array(0), 0, 1, 2), out_axes=(2, 1, 0))
        q_values, memory, statistics = call(
            self.members, statistics, self._split(memory, axis=0), inputs
        )
        return NetworkOutput(_merge(q_values, axis=1), _merge(memory, axis=0), statistics)

    def _split(self, tree: PyTree[Array], axis: int) -> PyTree[Array]:
        """Lanes `N * M` at `axis` as `N, M`."""

        def split(x: Array) -> Array:
            num_teams = _num_teams(x.shape[axis], self.num_agents)
            return x.reshape(*x.shape[:axis], num_teams, self.num_agents, *x.shape[axis + 1 :])

        return jax.tree.map(split, tree)


def _merge(tree: PyTree[Array], axis: int) -> PyTree[Array]:
    """Undoes `_split`."""
    return jax.tree.map(lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]), tree)


def _num_teams(num_lanes: int, num_agents: int) -> int:
    if num_lanes % num_agents:
        raise UsageError(
            f"{num_lanes} lanes are not those of whole teams of {num_agents} agents: give the "
            "agents of each team side by side"
        )
    return num_lanes // num_agents
