"""How a model's parameters are split over a device mesh with the axes data, fsdp and tensor.

Wide matrices are split twice: `tensor` splits heads and hidden units, so that a block needs one reduction after its
second matrix, and `fsdp` splits the other axis to save memory. Everything else is on every device.
"""

from __future__ import annotations

import re

from jax.sharding import Mesh, NamedSharding, PartitionSpec

# (paths, mesh axes of the last dimensions); the first match counts
RULES = (
    (r"(^|/)words$", ("tensor", "fsdp")),
    (r"/(query|key|value|gate|up)/kernel$", ("fsdp", "tensor")),
    (r"/(output|down)/kernel$", ("tensor", "fsdp")),
    (r"^head/kernel$", ("fsdp", "tensor")),
    (r"/kernel$", ("fsdp", None)),
)


def partition(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The mesh axis of each dimension. Axes that the mesh lacks, or that do not divide a dimension, are left out."""
    axes = next((axes for pattern, axes in RULES if re.search(pattern, path)), ())
    axes = (None,) * (len(shape) - len(axes)) + axes
    fits = (axis in mesh.shape and size % mesh.shape[axis] == 0 for axis, size in zip(axes, shape, strict=True))
    return PartitionSpec(*(axis if fit else None for axis, fit in zip(axes, fits, strict=True)))


def sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where the parameter at `path` lies."""
    return NamedSharding(mesh, partition(path, shape, mesh))
