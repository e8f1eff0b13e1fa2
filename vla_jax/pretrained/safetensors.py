"""The safetensors format: eight bytes with the length of a JSON header, the header, and the tensors' bytes.

Tensors are read one at a time into memory of their own, and written one at a time, so that a checkpoint larger than
the host's memory can pass through.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

from vla_jax.errors import UserError

TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
ALIGNMENT = 64  # bytes; aligned memory can become a JAX array on a CPU without being copied


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies, and what it is."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, in memory of its own."""
        raw = np.empty(self.size + ALIGNMENT, np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT
        raw = raw[offset : offset + self.size]
        with open(self.file, "rb") as file:
            file.seek(self.start)
            if file.readinto(memoryview(raw)) != self.size:
                raise UserError(f"{self.file} is truncated: copy the file again")
        return raw.view(self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by key. Raises UserError for a file that is none, is cut short, or has unknown types."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise UserError(f"{path} is truncated, or no safetensors file: copy it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path} is no safetensors file: its header is damaged") from error
    tensors = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in TYPES:
            raise UserError(f"{path}: '{key}' has the type {entry['dtype']}; supported are {', '.join(TYPES)}")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[key] = Tensor(path, begin, tuple(entry["shape"]), TYPES[entry["dtype"]])
        if end > size or end - begin != tensors[key].size:
            raise UserError(f"{path} is truncated: '{key}' ends at byte {end} of {size}; copy the file again")
    return tensors


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor to be written: what it is, and how to get it when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    get: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Iterable[Pending]) -> None:
    """Writes one file, a tensor at a time."""
    tensors, header, end = list(tensors), {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        offsets = [end, end + tensor.size]
        header[tensor.key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor.get()).view(np.uint8).data if tensor.size else b"")
        file.flush()
        os.fsync(file.fileno())
