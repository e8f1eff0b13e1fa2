"""Where arrays lie on a mesh of devices with the axes data, fsdp and tensor.

Two tables say it. MESH_AXES sends the logical axes of arrays to mesh axes; PARAMETERS names the logical axes of every
parameter by its path, and a path that it does not know is an error, so that no parameter is forgotten.

The batch is split over `data` and `fsdp` together. Wide matrices are split twice: `tensor` splits heads and hidden
units, so that a block needs one reduction after its second matrix, and `fsdp` splits the other axis to save memory: a
layer's weights are gathered where they are used (Zero-3, arXiv 1910.02054). Short vectors are on every device.
"""

from __future__ import annotations

import re

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

AXES = ("data", "fsdp", "tensor")

# logical axis: mesh axes
MESH_AXES = {
    "batch": ("data", "fsdp"),
    "width": "fsdp",  # D, of the model and of the expert
    "words": "tensor",  # V
    "heads": "tensor",  # N x H and K x H
    "hidden": "tensor",  # F
}

# (paths, logical axes of the last dimensions); the first match counts, the layers of a stack come before them
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(^|/)words$", ("words", "width")),
    (r"^head/kernel$", ("width", "words")),
    (r"/adapter/down$", ("width", None)),
    (r"/adapter/up$", (None, "width")),
    (r"/(query|key|value)/kernel$", ("width", "heads")),
    (r"/attention/output/kernel$", ("heads", "width")),
    (r"/mlp/(gate|up)/kernel$", ("width", "hidden")),
    (r"/mlp/down/kernel$", ("hidden", "width")),
    # small: a convolution, and the first layers of actions and states
    (r"^vision/maps/kernel$|/(action|action_in|state_in)/kernel$", ()),
    (r"/kernel$", ("width", None)),
    (r"(^|/)(position|queries|future|identity)$", (None, "width")),
    (r"/(bias|scale)$|^vision/view$|^normalizer/", ()),
)


def partition(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The mesh axis of each dimension of the parameter at `path`. Axes that the mesh lacks, or that do not divide a
    dimension, are left out.

    Raises:
        KeyError: PARAMETERS does not know the path.
    """
    logical = next((axes for pattern, axes in PARAMETERS if re.search(pattern, path)), None)
    if logical is None:
        raise KeyError(f"no place for the parameter {path!r}: add its logical axes to PARAMETERS in {__name__}")
    axes = [None] * (len(shape) - len(logical)) + [MESH_AXES.get(axis) for axis in logical]
    fits = (axis in mesh.shape and size % mesh.shape[axis] == 0 for axis, size in zip(axes, shape, strict=True))
    return PartitionSpec(*(axis if fit else None for axis, fit in zip(axes, fits, strict=True)))


def sharding(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Where the parameter at `path` lies."""
    return NamedSharding(mesh, partition(path, shape, mesh))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Where the samples of a batch lie: the first axis of every array is split."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))


def whole(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_samples(x: jax.Array) -> jax.Array:
    """Says to the compiler, where a mesh is set, that the first axis counts samples; the other axes are left to it.

    Without it, a compiler that multiplies samples split over `fsdp` by weights split over `fsdp` may move the samples
    instead of the weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.ndim == 0:
        return x
    spec = PartitionSpec(MESH_AXES["batch"], *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)


def put(array: np.ndarray | jax.Array, place: Sharding) -> jax.Array:
    """An array that every process has, on the devices of all: each takes its own parts from its own copy, where
    `jax.device_put` first compares all copies, on every device."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, place, lambda index: host[index])
