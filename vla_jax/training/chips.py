"""Accelerators by name: what a chip holds and does, and devices of it that need not be there.

Sources: the vendors' data sheets (cloud.google.com/tpu/docs, NVIDIA H100 SXM and H200 SXM). A TPU's memory is what its
compiler leaves to programs; of a GPU's, a tenth is left to the driver, NCCL and fragmentation. A v5e's and a v6e's
part of the data-centre network is a 256th of the pod's.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from vla_jax.errors import UserError

GIB = 2**30
# What the TPU compiler asks for on a machine without a TPU. Without ALLOW_MULTIPLE_…, two plans at a time would abort.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """memory: bytes that a program may use. flops: bfloat16 operations a second. link: bytes a second between chips of
    a slice, or GPUs of a node, all links together, one way. network: the same between slices, or nodes."""

    memory: float
    flops: float
    link: float
    network: float


CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12, 200e9, 3.125e9),
    "v5p": Chip(95.74 * GIB, 459e12, 600e9, 6.25e9),
    "v6e": Chip(31.25 * GIB, 918e12, 448e9, 12.5e9),
    # NVLink, and an InfiniBand port of 400 Gbit/s for each
    "H100": Chip(0.9 * 80e9, 989e12, 450e9, 50e9),
    "H200": Chip(0.9 * 141e9, 989e12, 450e9, 50e9),
}
NODE = 8  # GPUs


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind. name: of a slice, as JAX calls it; "" where there is no compiler for it."""

    kind: str
    count: int
    name: str
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """One of them."""
        return CHIPS[self.kind]

    @property
    def neighbours(self) -> int:
        """Chips with links between them: those of a slice, or of a node."""
        return self.count // self.slices if self.name else NODE

    def link(self, chips: int) -> float:
        """Bytes a second between this many neighbouring chips, one way, on the slowest way."""
        return self.chip.network if chips > self.neighbours else self.chip.link

    def devices(self) -> list[Any]:
        """Descriptions of all chips, to compile for. Raises UserError where the TPU compiler is missing."""
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"planning for {self.name} needs the TPU compiler: pip install -c constraints.txt 'libtpu==0.0.42.*' "
                "(extra 'tpu'); no TPU is needed"
            )
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.name, num_slices=self.slices)
            return list(found.devices)
        except Exception as error:  # the plugin's own type
            raise UserError(f"no topology {self.name!r} ({str(error).splitlines()[0][:120]})") from error


def parse_topology(text: str) -> Topology:
    """ "v5e:16x16", "v5p:4x4x4", "v6e:8x8", "2xv5e:16x16" (two slices), or "64xH100" and "8xH200".

    Raises:
        UserError: anything else.
    """
    if match := re.fullmatch(r"(?:([1-9]\d*)x)?((v5e|v5p|v6e):(\d+(?:x\d+)+))", text):
        slices = int(match[1] or 1)
        return Topology(match[3], slices * math.prod(map(int, match[4].split("x"))), match[2], slices)
    if match := re.fullmatch(r"(\d+)x(H100|H200)", text):
        return Topology(match[2], int(match[1]), "")
    raise UserError(f"unknown topology {text!r}: v5e:16x16, v5p:4x4x4, 2xv5e:16x16, 8xH100 and 64xH200 are examples")
