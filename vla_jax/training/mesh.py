"""Where arrays live: the batch is split over the `data` axis of a device mesh, everything else is on every device."""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vla_jax.errors import UserError

Tree = TypeVar("Tree")


def make_mesh() -> Mesh:
    """All devices in a row, axis `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def place_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Splits the leading axis of this process's NumPy arrays over its devices; together they are the global batch."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(place, batch)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError if a global batch cannot be split evenly over the devices."""
    if batch_size % mesh.devices.size:
        raise UserError(f"data.batch_size {batch_size} cannot be divided among {mesh.devices.size} devices")
