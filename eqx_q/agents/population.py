"""Populations: many agents as one."""

from collections.abc import Mapping

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped

from .. import spaces
from ..errors import UsageError
from ..spaces import Leaf
from ..types import AnyArray, Count, Decision, Memory, Rollout, Scalar, Transitions
from .agent import Agent, Batches, Rollouts


class Population(Agent):
    """`S` agents (seeds x hyperparameters) that act and learn side by side, as one `Agent`.

    Lanes are `[S * N]`, member by member; each member gets its own `N`. Environments are not
    vmapped, so this also works with those that cannot be: many seeds in one emulator pool.

        keys = jax.random.split(key, 16)
        members = eqx.filter_vmap(lambda key: PQN.create(obs_space, act_space, key=key))(keys)
        agent = Population(members)

    It learns as its members do: from rollouts of all lanes, or from batches of transitions.

    **Attributes:** `members`: an agent whose array leaves have a leading axis `S`.
    """

    members: Agent

    def __init__(self, members: Agent):
        """Raises `UsageError` unless `members` is one agent with a leading member axis."""
        self.members = members
        sizes = {x.shape[:1] for x in jax.tree.leaves(eqx.filter(members, eqx.is_array))}
        if members.num_members is not None or len(sizes) != 1 or () in sizes:
            raise UsageError(
                "Population takes one agent whose arrays have a leading member axis: make it with "
                "eqx.filter_vmap over keys or hyperparameters"
            )

    @property
    def num_members(self) -> int:
        """`S`."""
        return jax.tree.leaves(eqx.filter(self.members, eqx.is_array))[0].shape[0]

    @property
    def observation_space(self) -> gymnasium.Space:
        """The space of one lane."""
        return self.members.observation_space

    @property
    def action_space(self) -> Leaf:
        """The space of one lane."""
        return self.members.action_space

    @property
    def num_agents(self) -> int | None:
        """See `Agent`; the same for every member."""
        return self.members.num_agents

    @property
    def num_choices(self) -> int:
        """See `Agent`; the same for every member."""
        return self.members.num_choices

    @property
    def learns_from(self) -> Rollouts | Batches:
        """See `Agent`; the same for every member."""
        return eqx.filter_eval_shape(self.member, 0).learns_from

    @property
    def learnt(self) -> Count:
        """See `Agent`; one number per member."""
        return self.members.learnt

    def member(self, index: int) -> Agent:
        """One member as a single agent."""
        return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, self.members)

    def select(self, indices: Int[AnyArray, " K"]) -> "Population":
        """A population of `K` of the members; indices may repeat."""
        take = lambda x: x[jnp.asarray(indices)] if eqx.is_array(x) else x  # noqa: E731
        return Population(jax.tree.map(take, self.members))

    def initial_memory(self, num_envs: int) -> Memory:
        """See `Agent`; `num_envs` counts the lanes of all members."""
        lanes = self._lanes(num_envs)
        memory = eqx.filter_vmap(lambda member: member.initial_memory(lanes))(self.members)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), memory)

    def act(
        self,
        obs,
        memory=None,
        *,
        first=None,
        action_mask=None,
        reward=None,
        epsilon=None,
        key=None,
    ) -> Decision:
        """See `Agent`. `obs` has the lanes of all members; `epsilon` may be one per member."""
        space = self.observation_space
        obs = spaces.cast(space, spaces.select(space, obs))
        axes = spaces.leading_axes(space, obs)
        if len(axes) < (1 if self.num_agents is None else 2):
            raise UsageError(
                f"obs has no axis of lanes: give the lanes of all {self.num_members} members"
            )
        self._lanes(axes[0])
        lanes = self._split((obs, memory, first, action_mask, reward), axis=0)
        if epsilon is not None:
            epsilon = jnp.broadcast_to(epsilon, self.num_members)
        keys = None if key is None else jax.random.split(key, self.num_members)

        def act(member, lanes, epsilon, key):
            obs, memory, first, action_mask, reward = lanes
            return member.act(
                obs,
                memory,
                first=first,
                action_mask=action_mask,
                reward=reward,
                epsilon=epsilon,
                key=key,
            )

        decision = eqx.filter_vmap(act)(self.members, lanes, epsilon, keys)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), decision)

    def update(
        self, experience: Rollout | Transitions, *, key: PRNGKeyArray
    ) -> tuple["Population", dict[str, Float[Array, "S ..."]]]:
        """See `Agent`. Member `i` gets `jax.random.split(key, S)[i]`.

        Each member learns from its own lanes of a rollout, or from its own row of a batch
        `[S, B, ...]`.
        """
        if isinstance(experience, Rollout):
            experience = self._split_rollout(experience)
        keys = jax.random.split(key, self.num_members)
        members, metrics = eqx.filter_vmap(
            lambda member, experience, key: member.update(experience, key=key)
        )(self.members, experience, keys)
        return Population(members), metrics

    def with_schedule(self, steps: Float[Array, "*S"]) -> "Population":
        """See `Agent`."""
        with_schedule = eqx.filter_vmap(lambda member, steps: member.with_schedule(steps))
        return Population(with_schedule(self.members, steps))

    def hyperparameters(self) -> dict[str, Shaped[Array, " S"]]:
        """See `Agent`: one value per member."""
        return self.members.hyperparameters()

    def with_hyperparameters(
        self, values: Mapping[str, Scalar | Shaped[AnyArray, " S"]]
    ) -> "Population":
        """See `Agent`: give one value per member, or one for all."""
        return Population(self.members.with_hyperparameters(values))

    def measure(self, fn, rollout: Rollout) -> PyTree[Array]:
        """See `Agent`."""
        return jax.vmap(fn)(self._split_rollout(rollout))

    def _lanes(self, num_envs: int) -> int:
        if num_envs % self.num_members:
            raise UsageError(
                f"{num_envs} lanes do not divide over {self.num_members} members: "
                f"make the environment with a multiple of {self.num_members} lanes"
            )
        return num_envs // self.num_members

    def _split(self, tree: PyTree, axis: int) -> PyTree:
        """Views the lane axis `S * N` as `S, N`, and puts the member axis first."""

        def split(x):
            shape = (*x.shape[:axis], self.num_members, -1, *x.shape[axis + 1 :])
            return jnp.moveaxis(jnp.reshape(x, shape), axis, 0)

        return jax.tree.map(split, tree)

    def _split_rollout(self, rollout: Rollout) -> Rollout:
        """`[T, S * N, ...]` as `[S, T, N, ...]`."""

        def of_lanes(rollout: Rollout) -> tuple[PyTree, PyTree]:
            return rollout.memory, rollout.weight

        stacked = self._split(eqx.tree_at(of_lanes, rollout, (None, None), is_leaf=_is_none), 1)
        lanes = self._split(of_lanes(rollout), 0)
        return eqx.tree_at(of_lanes, stacked, lanes, is_leaf=_is_none)


def _is_none(x) -> bool:
    return x is None
