"""Where the arrays of a training lie: on one device, copied, or in parts.

All devices form one axis, `data`. Windows are dealt out along it; parameters and what
the optimiser keeps of them are copied to every device (`data`), or cut along their
longest axis that the devices divide (`full`), as in ZeRO. The compiler adds what has to
be exchanged, so the step is written as for one device.

References: Rajbhandari et al. (2020); Xu et al. (2021) for the compiler.

>>> Placement.of("none").devices
1
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"
"""The axis of the devices."""

Shard = Literal["none", "data", "full"]


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
        return jax.device_put(tree, self.layouts(tree))
