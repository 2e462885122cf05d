"""Where the arrays of a training lie: on one device, copied, or in parts.

All devices form one axis, `data`. Windows are dealt out along it; parameters and what
the optimiser keeps of them are copied to every device (`data`), or cut along their
longest axis that the devices divide (`full`), as in ZeRO. The compiler adds what has to
be exchanged, so the step is written as for one device. The devices may be those of
several processes, each of which makes the same calls with the same numbers and holds
the parts that are on its own.

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
"""The axis of the devices."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Devices, and how arrays are laid out on them.

    Attributes:
        mesh: Of one axis.
        shard: `none`, `data` or `full`.
    """

    mesh: Mesh
    shard: Shard

    @classmethod
    def of(cls, shard: Shard) -> "Placement":
        """Return a placement on all devices, or on the first for `none`.

        Raises:
            ValueError: If there is no such placement.
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
        """Whether some of them belong to other processes."""
        return not self.copied.is_fully_addressable

    @property
    def copied(self) -> NamedSharding:
        """The layout of what every device has."""
        return NamedSharding(self.mesh, PartitionSpec())

    def windows(self, axis: int) -> NamedSharding:
        """Return the layout of windows that lie along an axis."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))

    def layout(self, x: Any) -> NamedSharding:
        """Return the layout of an array, or of one with this shape."""
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
        """Return a tree with its arrays laid out; those that are so already as is."""
        layouts = self.layouts(tree)
        if not self.is_shared:
            return jax.device_put(tree, layouts)  # all at once
        return jax.tree.map(self._lay, tree, layouts)

    def deal(self, windows: np.ndarray, axis: int) -> jax.Array:
        """Return windows that lie along an axis, dealt out to the devices."""
        return self._lay(windows, self.windows(axis))

    def gather(self, tree: Any) -> Any:
        """Return a tree with arrays that this process holds whole."""
        if not self.is_shared:
            return tree

        def whole(x):
            return jnp.asarray(jax.device_put(x, self.copied).addressable_data(0))

        return jax.tree.map(whole, tree)

    def any(self, flag: bool) -> jax.Array:
        """Return whether any process raises a flag; not waited for."""
        given = np.full(self.devices, flag)
        return _any(self.deal(given, 0), self.copied)

    def _lay(self, x: Any, layout: NamedSharding) -> jax.Array:
        if not self.is_shared:
            return jax.device_put(x, layout)
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, layout)
        held = np.asarray(x)
        return jax.make_array_from_callback(held.shape, layout, lambda at: held[at])


@functools.partial(jax.jit, static_argnums=1)
def _any(flags: jax.Array, copied: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(flags.any(), copied)
