"""Loads and saves vision-language models in the form that transformers reads: config.json and safetensors files.

Weights keep the type that they have in the files; `dtype` is that of the computation.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from vla_jax.errors import UserError
from vla_jax.models.vlm import VLM
from vla_jax.nn.flat import FlatArrays, flatten, unflatten
from vla_jax.nn.placement import partition, put
from vla_jax.pretrained.configs import from_json, read_json, to_json
from vla_jax.pretrained.safetensors import Pending, Tensor, read_header, write_file
from vla_jax.pretrained.tables import FAMILIES, Row, to_ours, to_theirs
from vla_jax.schema import suggest

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# what a processor is loaded from
PROCESSOR_FILES = (
    "*token*.json", "*token*.model", "vocab.*", "merges.txt", "*processor*.json", "chat_template*",
    "generation_config.json",
)  # fmt: skip


def load_vlm(directory: str | Path, *, mesh: Mesh | None = None, dtype: str | None = None, scan: bool = True) -> VLM:
    """The model in a checkpoint directory, its weights read one tensor at a time, straight to where they belong.

    Args:
        directory: of config.json and one or several safetensors files.
        mesh: spreads the weights over devices as `nn.placement` says; None is the first device.
        dtype: of the computation; None is the one in config.json.
        scan: run the layers as a compiled loop (see `nn.stack.Stack`).

    Raises:
        UserError: no checkpoint, an unsupported model, a truncated file, or a key that is missing, left over or
            misshapen, with its name and the nearest known one.
    """
    source = read_json(directory)
    config = from_json(source, dtype, scan)
    family = FAMILIES[source["model_type"]]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: family.model(config, nnx.Rngs(0))))
    params = load_params(directory, flatten(state), mesh)
    return nnx.merge(graphdef, unflatten(params))


def load_params(directory: str | Path, shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | None) -> FlatArrays:
    """The parameters of a checkpoint by path. shapes: those of the model that its config.json describes."""
    source = read_json(directory)
    family = FAMILIES[source["model_type"]]
    rows = family.table(from_json(source))
    tensors = {family.canonical(key): tensor for key, tensor in find_tensors(directory).items()}
    sizes = {path: leaf.shape for path, leaf in shapes.items()}
    _drop_tied_head(tensors, rows)
    _check_keys(tensors, rows, sizes)
    params = {}
    for row in rows:
        params |= _load_row(row, tensors, sizes, mesh)
    return params


def save_vlm(vlm: VLM, directory: str | Path, *, processor: str | Path | None = None, shard: int = SHARD_BYTES) -> None:
    """Writes a directory that transformers loads. It appears under its name when it is complete.

    processor: a checkpoint directory whose tokenizer and image processor are copied along. shard: bytes in a file.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not empty: choose another directory")
    name, family = next((name, family) for name, family in FAMILIES.items() if isinstance(vlm, family.model))
    params = flatten(nnx.split(vlm)[1])
    tensors = [tensor for row in family.table(vlm.config) for tensor in pending(row, params)]
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    try:
        _write_shards(temporary, tensors, shard)
        (temporary / "config.json").write_text(json.dumps(to_json(vlm.config, _type(params)), indent=2) + "\n")
        for pattern in PROCESSOR_FILES if processor is not None else ():
            for file in Path(processor).glob(pattern):
                shutil.copy(file, temporary)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_tensors(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory by key."""
    directory = Path(directory)
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise UserError(f"{directory} is no checkpoint: it has no safetensors files")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} is incomplete: {', '.join(missing)} missing; copy it again")
    return {key: tensor for name in names for key, tensor in read_header(directory / name).items()}


def _keys(row: Row, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The keys of a row, layer by layer."""
    return [row.key.format(layer) for layer in range(shapes[row.paths[0]][0])] if row.stacked else [row.key]


def _drop_tied_head(tensors: dict[str, Tensor], rows: list[Row]) -> None:
    """Some writers repeat a tied head; it must be the word embedding."""
    known = {path: row.key for row in rows for path in row.paths}
    if "lm_head.weight" in tensors and "head/kernel" not in known and known["words"] in tensors:
        head, words = tensors.pop("lm_head.weight"), tensors[known["words"]]
        if head.dtype != words.dtype or not np.array_equal(head.read().view(np.uint8), words.read().view(np.uint8)):
            raise UserError(
                "config.json ties lm_head.weight to the word embeddings, but the checkpoint has another one"
            )


def _check_keys(tensors: Mapping[str, Tensor], rows: list[Row], shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {key: row.shape(shapes) for row in rows for key in _keys(row, shapes)}
    missing, left_over = ([k for k in a if k not in b] for a, b in ((expected, tensors), (tensors, expected)))
    if missing:
        near = suggest(missing[0], left_over or list(tensors))
        raise UserError(f"the checkpoint lacks '{missing[0]}' ({len(missing)} keys missing){near}")
    if left_over:
        near = suggest(left_over[0], list(expected))
        raise UserError(f"the checkpoint has an unknown key '{left_over[0]}' ({len(left_over)} keys left over){near}")
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise UserError(
                f"'{key}' is {list(tensors[key].shape)} in the checkpoint; config.json implies {list(shape)}"
            )


def _load_row(row: Row, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], mesh: Mesh | None):
    """The parameters of one row."""
    keys = _keys(row, shapes)
    dtype = functools.reduce(jnp.promote_types, (tensors[key].dtype for key in keys))
    specs = {path: _spec(path, shapes[path], mesh) for path in row.paths}
    widths = [shapes[path][-1] for path in row.paths]
    if not row.stacked:
        pieces = _place_tensor(tensors[keys[0]], row, specs, mesh)
        ends = np.cumsum(widths)
        return {
            path: _cut(pieces, row.form, int(end - width), width, dtype, _sharding(specs[path], mesh))
            for path, end, width in zip(row.paths, ends, widths, strict=True)
        }
    stacks = {path: _zeros(shapes[path], dtype, _sharding(specs[path], mesh)) for path in row.paths}
    for layer, key in enumerate(keys):
        tensor, end = _place_tensor(tensors[key], row, specs, mesh), 0
        for path, width in zip(row.paths, widths, strict=True):
            stacks[path] = _write_layer(stacks[path], tensor, layer, row.form, end, width)
            end += width
        jax.block_until_ready(stacks)  # or the tensors of several layers would wait in memory
    return stacks


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh | None) -> PartitionSpec:
    return PartitionSpec() if mesh is None else partition(path, shape, mesh)


def _sharding(spec: PartitionSpec, mesh: Mesh | None) -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else NamedSharding(mesh, spec)


def _place_tensor(tensor: Tensor, row: Row, specs: Mapping[str, PartitionSpec], mesh: Mesh | None) -> Array:
    """A tensor of a file on the devices: split as its parameter will be, where it holds one in one matrix, else on all
    of them."""
    spec = ()
    if mesh is not None and len(row.paths) == 1 and not row.inputs:
        own = tuple(specs[row.paths[0]])[1 if row.stacked else 0 :]
        spec = own if row.form == "same" else own[::-1]
    return put(tensor.read(), _sharding(PartitionSpec(*spec), mesh))


def _zeros(shape: tuple[int, ...], dtype: Any, place: Sharding) -> Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)()


def _part(tensor: Array, form: str, start: int, width: int) -> Array:
    axis_width = tensor.shape[0] if form != "same" else tensor.shape[-1]
    if axis_width != width:  # one of several parameters in this tensor
        tensor = lax.slice_in_dim(tensor, start, start + width)
    return to_ours(tensor, form)


def _cut(tensor: Array, form: str, start: int, width: int, dtype: Any, place: Sharding) -> Array:
    """One parameter of a tensor."""
    if form == "same" and tensor.shape[-1] == width and tensor.dtype == dtype:
        return jax.device_put(tensor, place)
    return jax.jit(lambda t: _part(t, form, start, width).astype(dtype), out_shardings=place)(tensor)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _write_layer(stack: Array, tensor: Array, layer: int, form: str, start: int, width: int) -> Array:
    """One parameter of a tensor written into its layer's slice, in place."""
    part = _part(tensor, form, start, width).astype(stack.dtype)
    return lax.dynamic_update_index_in_dim(stack, part, layer, 0)


def pending(row: Row, params: FlatArrays) -> list[Pending]:
    """The tensors of a row, still to be made."""
    shapes = {path: params[path].shape for path in row.paths}
    dtype = np.dtype(params[row.paths[0]].dtype)

    def get(layer: int | None) -> np.ndarray:
        own = [np.asarray(params[path] if layer is None else params[path][layer]) for path in row.paths]
        return np.concatenate([to_theirs(part, row.form, row.inputs) for part in own])

    shape = row.shape(shapes)
    return [
        Pending(key, shape, dtype, functools.partial(get, layer if row.stacked else None))
        for layer, key in enumerate(_keys(row, shapes))
    ]


def _write_shards(directory: Path, pending: list[Pending], limit: int) -> None:
    """One file, or several of at most `limit` bytes and an index of them."""
    shards: list[list[Pending]] = [[]]
    for tensor in pending:
        if shards[-1] and sum(other.size for other in shards[-1]) + tensor.size > limit:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_file(directory / "model.safetensors", shards[0])
        return
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        write_file(directory / name, tensors)
    where = {tensor.key: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    total = sum(tensor.size for tensor in pending)
    (directory / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1) + "\n"
    )


def _type(params: FlatArrays) -> str:
    """The type of the weights: that of most of their bytes."""
    total: dict[str, int] = {}
    for leaf in params.values():
        total[str(leaf.dtype)] = total.get(str(leaf.dtype), 0) + leaf.nbytes
    return max(total, key=total.get)
