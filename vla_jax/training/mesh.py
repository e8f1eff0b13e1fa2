"""The mesh of a run: its shape, the state and the batch on it, and what every device holds.

`nn.placement` has the tables that say which axis of an array is split over which axis of the mesh.
"""

import dataclasses
import math
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from vla_jax.errors import UserError
from vla_jax.nn.placement import AXES, batch_sharding, sharding, whole
from vla_jax.training.state import TrainState

Tree = TypeVar("Tree")
KIB = 2**10


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; 0, for one of them, is what the others leave.

    data: copies of the weights, each for a part of the batch. fsdp: parts of weights and optimiser, each also for a
    part of the batch. tensor: parts of every layer's heads and hidden units, all for the same samples.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if min(sizes) < 0 or sizes.count(0) > 1:
            raise UserError(
                f"mesh is {dict(zip(AXES, sizes, strict=True))}: sizes must be positive, and only one may be 0"
            )

    def shape(self, devices: int) -> tuple[int, int, int]:
        """Sizes of the axes for this number of devices."""
        sizes = [getattr(self, axis) for axis in AXES]
        given = math.prod(size for size in sizes if size)
        if devices % given or (0 not in sizes and devices != given):
            wanted = " x ".join(f"{axis}={size or '…'}" for axis, size in zip(AXES, sizes, strict=True))
            raise UserError(f"mesh {wanted} does not fit {devices} devices: change mesh.data, mesh.fsdp or mesh.tensor")
        return tuple(size or devices // given for size in sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of these; neighbours on a TPU's wires are neighbours on its last axes.

    Several TPU slices, which only the data-centre network joins, divide `data` among them.

    Raises:
        UserError: a shape that does not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    data, fsdp, tensor = config.shape(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if data % slices:
        raise UserError(
            f"mesh.data = {data} cannot be divided among {slices} slices: make it a multiple of {slices}, so that "
            "fsdp and tensor stay within a slice"
        )
    if slices > 1:
        within, across = (data // slices, fsdp, tensor), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
    _check_samples_stay_in_a_process(grid)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check_samples_stay_in_a_process(grid: np.ndarray) -> None:
    """Raises UserError if devices that share samples belong to several processes, which read different ones."""
    for group in grid.reshape(-1, grid.shape[-1]):
        if len({device.process_index for device in group}) > 1:
            raise UserError(
                f"mesh.tensor = {len(group)} reaches over several processes (hosts): make it smaller, and mesh.fsdp "
                "larger instead"
            )


def state_shardings(state: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
    """Where every array of a state lies. state: arrays or shapes.

    Averaged weights and the optimiser's moments lie where their parameters do; all else is on every device.
    """
    shapes = {path: leaf.shape for path, leaf in state.weights.items()}

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = (entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey))
        name = next((name for name in names if shapes.get(name) == leaf.shape), None)
        return whole(mesh) if name is None else sharding(name, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def with_shardings(shapes: Tree, shardings: Tree) -> Tree:
    """The shapes, each with its place."""
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings)


def place_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Splits the leading axis of this process's NumPy arrays over its devices; together they are the global batch."""
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(batch_sharding(mesh), array), batch)


def global_rows(local: int) -> np.ndarray:
    """Where this process's samples stand in the global batch: process p of P reads rows p, p + P, ..."""
    return np.arange(local, dtype=np.int32) * jax.process_count() + jax.process_index()


def check_batch_size(name: str, size: int, mesh: Mesh, parts: int = 1) -> None:
    """Raises UserError if a global batch cannot be split evenly: over `parts` that follow one another, then over the
    devices."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % (parts * shares):
        by = f" in {parts} parts" if parts > 1 else ""
        raise UserError(
            f"{name} {size} cannot be divided among {shares} devices (mesh.data x mesh.fsdp){by}: make it a multiple "
            f"of {parts * shares}, or give mesh.tensor more devices"
        )


def local_weights(tree: Tree) -> Tree:
    """Whole arrays on this process's first device, for programs that know no mesh."""
    device = jax.local_devices()[0]

    def gather(array: jax.Array) -> jax.Array:
        if array.is_fully_addressable:
            return jax.device_put(array, device)
        everywhere = jax.jit(lambda x: x, out_shardings=whole(array.sharding.mesh))(array)
        return jax.device_put(everywhere.addressable_data(0), device)

    return jax.tree.map(gather, tree)


def bytes_on_device(tree: Any, shardings: Any) -> int:
    """Bytes of these arrays on one device."""
    sizes = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


def describe(state: TrainState, shardings: TrainState) -> str:
    """The mesh, how the parameters are split, and the bytes that they and the optimiser take on a device."""
    mesh = shardings.step.mesh
    by_spec: dict[str, int] = {}
    weights, places = state.weights, shardings.weights
    for path, leaf in weights.items():
        spec = tuple(axis for axis in places[path].spec if axis)
        name = "x".join(map(str, spec)) or "whole"
        by_spec[name] = by_spec.get(name, 0) + leaf.size
    total = sum(by_spec.values())
    split = ", ".join(f"{name} {count / total:.1%}" for name, count in sorted(by_spec.items(), key=lambda kv: -kv[1]))
    held = {
        "parameters": bytes_on_device(weights, places),
        "average": bytes_on_device(state.ema, shardings.ema),
        "optimiser": bytes_on_device(state.opt_state, shardings.opt_state),
    }
    held_text = ", ".join(f"{name} {in_units(size)}" for name, size in held.items() if size)
    shape = " ".join(f"{axis}={mesh.shape[axis]}" for axis in mesh.axis_names)
    return f"mesh: {shape} ({mesh.size} devices)   split: {split}\nevery device holds: {held_text}"


def in_units(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < KIB:
            return f"{size:.3g} {unit}"
        size /= KIB
    return f"{size:.2f} GiB"
