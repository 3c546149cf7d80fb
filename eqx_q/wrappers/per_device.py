"""Environments outside JAX for several devices: one for each device."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
from jaxtyping import Array, PRNGKeyArray, PyTree, Shaped, UInt8

from ..sharding import AXIS, ManyDevices, Placement
from ..spaces import Leaf, Space
from ..types import TimeStep
from .env import Env, Recording


def make_for(
    place: Placement, make: Callable[[int, int], Env], num_envs: int, *, seed: int = 0
) -> Env:
    """Makes an environment of `num_envs` lanes that the devices of a run share.

    An environment in JAX is shared as it is; of one outside JAX, each device has its own. Lane `i`
    of an emulator is seeded with `seed + i` either way.

    **Arguments:** `make`: makes an environment from a number of lanes and a seed.

    **Raises:** `UsageError` if the lanes do not divide over the devices.
    """
    if not isinstance(place, ManyDevices):
        return make(num_envs, seed)
    place.check_divides(num_envs, "lanes (num_envs)")
    each = num_envs // place.num_devices
    devices = enumerate(place.mesh.devices)
    first, *rest = (i for i, d in devices if d.process_index == jax.process_index())
    env = make(each, seed + first * each)
    if not env.on_host:
        return env.replicate(num_envs)
    return PerDevice([env, *(env.replicate(each, seed=seed + i * each) for i in rest)], place)


class PerDevice(Env):
    """Environments outside JAX, one for each device, as one environment.

    A program compiled for several devices steps each on its own device. `reset` must be called
    outside `jit`.

    **Arguments:** `envs`: equal environments for the devices of this process, in their order.
    """

    envs: tuple[Env, ...]
    place: ManyDevices = eqx.field(static=True)
    observation_space: Space = eqx.field(static=True)
    action_space: Leaf = eqx.field(static=True)
    num_envs: int = eqx.field(static=True)
    num_agents: int | None = eqx.field(static=True)
    on_host: bool = eqx.field(static=True)
    max_episode_steps: int | None = eqx.field(static=True)

    def __init__(self, envs: list[Env], place: ManyDevices):
        one = envs[0]
        self.envs = tuple(envs)
        self.place = place
        self.observation_space = one.observation_space
        self.action_space = one.action_space
        self.num_envs = one.num_envs * place.num_devices
        self.num_agents = one.num_agents
        self.on_host = True
        self.max_episode_steps = one.max_episode_steps

    @property
    def recording(self) -> Recording:
        """See `Env`; the same for all."""
        return self.envs[0].recording

    @property
    def num_devices(self) -> int:
        """See `Env`."""
        return self.place.num_devices

    @property
    def agent_kinds(self) -> tuple[int, ...] | None:
        return self.envs[0].agent_kinds

    @property
    def state_size(self) -> int | None:
        return self.envs[0].state_size

    def reset(self, key: PRNGKeyArray) -> tuple[PyTree, TimeStep]:
        started = [env.reset(key) for env in self.envs]
        started = jax.tree.map(lambda *x: jnp.concatenate(x), *started)
        if jax.process_count() > 1:  # every process gets the lanes of all
            started = multihost_utils.process_allgather(started, tiled=True)
        return started

    def step(
        self, state: PyTree, action: Shaped[Array, "N *M_and_action"], key: PRNGKeyArray
    ) -> tuple[PyTree, TimeStep]:
        def step(state: PyTree, action: Array, key: PRNGKeyArray) -> tuple[PyTree, TimeStep]:
            here = jax.lax.axis_index(AXIS) % len(self.envs)
            return jax.lax.switch(here, [env.step for env in self.envs], state, action, key)

        lanes, all_of_it = PartitionSpec(AXIS), PartitionSpec()
        return jax.shard_map(
            step,
            mesh=self.place.mesh,
            in_specs=(lanes, lanes, all_of_it),
            out_specs=lanes,
            check_vma=False,
        )(state, action, key)

    def replicate(self, num_envs: int, *, seed: int = 0, **options: Any) -> Env:
        """See `Env`; the new environment is for a single device."""
        return self.envs[0].replicate(num_envs, seed=seed, **options)

    def render(self, state: PyTree, lane: int = 0) -> UInt8[np.ndarray, "height width 3"] | None:
        here, lane = divmod(lane, self.envs[0].num_envs)
        return self.envs[here].render(state, lane)

    def close(self) -> None:
        for env in self.envs:
            env.close()
