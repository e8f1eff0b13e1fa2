"""Accelerators by name: what a chip holds and does, and devices of it that need not be there.

Sources: the vendors' data sheets (cloud.google.com/tpu/docs, NVIDIA H100 SXM and H200 SXM). A TPU's memory is what its
compiler leaves to programs; of a GPU's, a tenth is left to the driver, NCCL and fragmentation.
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
    """memory: bytes that a program may use. flops: bfloat16 operations a second. link: bytes a second between chips,
    all links together, one way; between GPUs of a node. network: the same between nodes, for a GPU."""

    memory: float
    flops: float
    link: float
    network: float = 0.0


CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12, 200e9),
    "v5p": Chip(95.74 * GIB, 459e12, 600e9),
    "v6e": Chip(31.25 * GIB, 918e12, 448e9),
    # NVLink, and an InfiniBand port of 400 Gbit/s for each
    "H100": Chip(0.9 * 80e9, 989e12, 450e9, 50e9),
    "H200": Chip(0.9 * 141e9, 989e12, 450e9, 50e9),
}
NODE = 8  # GPUs


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind. name: as JAX calls it; "" where there is no compiler for it."""

    kind: str
    count: int
    name: str

    @property
    def chip(self) -> Chip:
        """One of them."""
        return CHIPS[self.kind]

    def link(self, chips: int) -> float:
        """Bytes a second between this many neighbouring chips, one way, on the slowest way."""
        return self.chip.network if self.chip.network and chips > NODE else self.chip.link

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
            return list(topologies.get_topology_desc(platform="tpu", topology_name=self.name).devices)
        except Exception as error:  # the plugin's own type
            raise UserError(f"no topology {self.name!r} ({str(error).splitlines()[0][:120]})") from error


def parse_topology(text: str) -> Topology:
    """ "v5e:16x16", "v5p:4x4x4", "v6e:8x8", or "64xH100" and "8xH200".

    Raises:
        UserError: anything else.
    """
    if match := re.fullmatch(r"(v5e|v5p|v6e):(\d+(?:x\d+)+)", text):
        return Topology(match[1], math.prod(map(int, match[2].split("x"))), text)
    if match := re.fullmatch(r"(\d+)x(H100|H200)", text):
        return Topology(match[2], int(match[1]), "")
    raise UserError(f"unknown topology {text!r}: v5e:16x16, v6e:8x8, v5p:4x4x4, 8xH100 and 64xH200 are examples")
