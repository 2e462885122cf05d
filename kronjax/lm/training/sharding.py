"""Placement of the arrays of a training: on one device, copied, or split.

All devices form one axis, `data`, over which windows are distributed. Parameters and
the state of the optimiser are copied to every device (`data`), or split along their
longest axis that the number of devices divides (`full`), as in ZeRO. The compiler adds
the communication, so the step is written as for one device. The devices may belong to
several processes, each of which makes the same calls with the same numbers and holds
the parts on its own devices.

References: Rajbhandari et al. (2020); Xu et al. (2021) for the compiler.

>>> Placement.of("none").devices
1
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kronjax.lm.training.settings import Shard

AXIS = "data"
"""Name of the axis of devices."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Devices, and the layout of arrays on them.

    Attributes:
        mesh: The devices, along one axis.
        shard: `none`, `data` or `full`.
    """

    mesh: Mesh
    shard: Shard

    @classmethod
    def of(cls, shard: Shard) -> "Placement":
        """Return a placement on all devices, or on the first for `none`.

        Raises:
            ValueError: If `shard` is not one of the three.
        """
        if shard not in ("none", "data", "full"):
            raise ValueError(f"shard is {shard!r}; write none, data or full")
        devices = jax.devices() if shard != "none" else jax.local_devices()[:1]
        return cls(Mesh(np.array(devices), (AXIS,)), shard)

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.mesh.size

    @property
    def is_shared(self) -> bool:
        """Whether some devices belong to other processes."""
        return not self.copied.is_fully_addressable

    @property
    def copied(self) -> NamedSharding:
        """The layout of an array that is copied to every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def windows(self, axis: int) -> NamedSharding:
        """Return the layout of windows along an axis."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))

    def layout(self, x: Any) -> NamedSharding:
        """Return the layout of an array, or of its abstract shape."""
        shape, count = np.shape(x), self.devices
        axes = [i for i, size in enumerate(shape) if size and size % count == 0]
        if self.shard != "full" or not axes:
            return self.copied
        longest = max(axes, key=lambda i: shape[i])
        return self.windows(longest)

    def layouts(self, tree: Any) -> Any:
        """Return the layouts of all arrays of a tree."""
        return jax.tree.map(self.layout, tree)

    def put(self, tree: Any) -> Any:
        """Return a tree with its arrays placed on the devices."""
        layouts = self.layouts(tree)
        if not self.is_shared:
            return jax.device_put(tree, layouts)  # one call for all arrays
        return jax.tree.map(self._lay, tree, layouts)

    def deal(self, windows: np.ndarray, axis: int) -> jax.Array:
        """Return windows along an axis, distributed over the devices."""
        return self._lay(windows, self.windows(axis))

    def gather(self, tree: Any) -> Any:
        """Return a tree of arrays that are complete in this process."""
        if not self.is_shared:
            return tree

        def whole(x):
            return jnp.asarray(jax.device_put(x, self.copied).addressable_data(0))

        return jax.tree.map(whole, tree)

    def any(self, flag: bool) -> jax.Array:
        """Return whether any process raises a flag, without waiting for it."""
        given = np.full(self.devices, flag)
        return _any(self.deal(given, 0), self.copied)

    def _lay(self, x: Any, layout: NamedSharding) -> jax.Array:
        if not self.is_shared:
            return jax.device_put(x, layout)
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, layout)
        array = np.asarray(x)
        return jax.make_array_from_callback(array.shape, layout, lambda at: array[at])


@functools.partial(jax.jit, static_argnums=1)
def _any(flags: jax.Array, copied: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(flags.any(), copied)
