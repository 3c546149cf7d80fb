"""Several devices: one program, with its lanes or members spread over them.

JAX partitions a compiled program by the sharding of its arrays. Results do not depend on it: random
numbers belong to a lane or member, on whichever device that is. So little other code deals with
devices. Members of a population never communicate. Devices that share the lanes of one agent
exchange gradients once per minibatch, if their number divides the agent's `lane_groups`.

With several processes (`eqx_q.processes`), each runs the same program on its own devices. The first
one decides wherever they must agree, for example on the time.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .errors import UsageError

AXIS = "devices"

Lay = Callable[[Any, int | None], Any]


class Placement(abc.ABC):
    """The devices of a run: places its arrays, and lets its processes agree.

    All processes must call the same methods in the same order.
    """

    @property
    @abc.abstractmethod
    def num_devices(self) -> int:
        """Number of devices over all processes."""

    @abc.abstractmethod
    def put(self, tree: PyTree, axis: int | None = None) -> PyTree:
        """Spreads arrays that every process has along `axis`, or copies them to all devices."""

    @abc.abstractmethod
    def constrain(self, tree: PyTree, axis: int | None = None) -> PyTree:
        """`put` inside a compiled program, as a sharding constraint."""

    @abc.abstractmethod
    def gather(self, tree: PyTree) -> PyTree:
        """Collects spread arrays whole on one device of this process."""

    @abc.abstractmethod
    def agreed(self, value: int) -> int:
        """The first process's value."""

    @abc.abstractmethod
    def largest(self, value: int) -> int:
        """The largest value of any process."""

    @abc.abstractmethod
    def from_first(self, tree: PyTree) -> PyTree:
        """The first process's tree; those of the others must have the same shapes."""

    def check_divides(self, number: int, name: str) -> None:
        """Raises `UsageError` if `number` is not a multiple of the number of devices."""
        if number % self.num_devices:
            raise UsageError(
                f"{name}={number} does not divide over {self.num_devices} devices: make it a "
                f"multiple of {self.num_devices}, or use fewer devices"
            )


@dataclasses.dataclass(frozen=True)
class OneDevice(Placement):
    """Everything on JAX's default device."""

    @property
    def num_devices(self) -> int:
        """See `Placement`."""
        return 1

    def put(self, tree: PyTree, axis: int | None = None) -> PyTree:
        """Here and below: the tree itself."""
        return tree

    def constrain(self, tree: PyTree, axis: int | None = None) -> PyTree:
        return tree

    def gather(self, tree: PyTree) -> PyTree:
        return tree

    def agreed(self, value: int) -> int:
        return value

    def largest(self, value: int) -> int:
        return value

    def from_first(self, tree: PyTree) -> PyTree:
        return tree


@dataclasses.dataclass(frozen=True)
class ManyDevices(Placement):
    """Several devices, of this process or of several."""

    mesh: Mesh

    @property
    def num_devices(self) -> int:
        """See `Placement`, here and below."""
        return self.mesh.size

    def put(self, tree: PyTree, axis: int | None = None) -> PyTree:
        def put_array(x: Array) -> Array:
            sharding = self._sharding(x, axis)
            if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:  # placed already
                return jax.device_put(x, sharding)
            whole = sharding.is_fully_replicated  # a device that holds it needs no second copy
            return jax.make_array_from_callback(
                x.shape, sharding, lambda index: x if whole else x[index]
            )

        return jax.tree.map(lambda x: put_array(x) if eqx.is_array(x) else x, tree)

    def constrain(self, tree: PyTree, axis: int | None = None) -> PyTree:
        def constrain_array(x: Array) -> Array:
            return jax.lax.with_sharding_constraint(x, self._sharding(x, axis))

        return jax.tree.map(lambda x: constrain_array(x) if eqx.is_array(x) else x, tree)

    def gather(self, tree: PyTree) -> PyTree:
        arrays, rest = eqx.partition(tree, eqx.is_array)
        everywhere = _copied(NamedSharding(self.mesh, PartitionSpec()), arrays)
        return eqx.combine(jax.tree.map(lambda x: x.addressable_data(0), everywhere), rest)

    def agreed(self, value: int) -> int:
        if jax.process_count() == 1:
            return value
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))

    def largest(self, value: int) -> int:
        if jax.process_count() == 1:
            return value
        return int(np.max(multihost_utils.process_allgather(np.int32(value))))

    def from_first(self, tree: PyTree) -> PyTree:
        if jax.process_count() == 1:
            return tree

        def send(x: Array) -> Array:
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                data = multihost_utils.broadcast_one_to_all(jax.random.key_data(x))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
            return jnp.asarray(multihost_utils.broadcast_one_to_all(x))

        return jax.tree.map(lambda x: send(x) if eqx.is_array(x) else x, tree)

    def _sharding(self, x: Array, axis: int | None) -> NamedSharding:
        """Sharding along `axis` if that divides over the devices, else replication."""
        if axis is None or x.ndim <= axis or x.shape[axis] % self.num_devices:
            return NamedSharding(self.mesh, PartitionSpec())
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))


def place_on(devices: int | None) -> Placement:
    """Places a run on `devices` devices, over all processes; `None`: on all of them.

    **Raises:** `UsageError` if there are not that many, or if a process would have none.
    """
    there = jax.devices()
    number = len(there) if devices is None else devices
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UsageError(f"devices={number!r}: give a whole number of devices, 1 or more")
    if number > len(there):
        platform = there[0].platform
        mend = f", or divide the CPU with cpu_devices={number}" if platform == "cpu" else ""
        raise UsageError(
            f"devices={number}, but JAX sees {len(there)} ({platform}): use at most that{mend}"
        )
    if jax.process_count() > 1 and number != len(there):
        raise UsageError(
            f"devices={number}, but the {jax.process_count()} processes have {len(there)}: "
            "set devices=null to use all"
        )
    return OneDevice() if number == 1 else ManyDevices(Mesh(np.asarray(there[:number]), (AXIS,)))


@eqx.filter_jit
def _copied(sharding: NamedSharding, arrays: PyTree) -> PyTree:
    return jax.lax.with_sharding_constraint(arrays, sharding)
