"""What a compiled program costs: operations from its trace, traffic between chips from its compiled text.

A compiler's own count of operations takes the body of a loop once, whatever its number of rounds; both counts here
multiply by it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters import partial_eval

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f64": 8, "s64": 8, "u64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"


def count_flops(traced: ClosedJaxpr) -> float:
    """Floating-point operations of all matrix products and convolutions that the outputs depend on; two an element of
    a product, everything else is nothing beside them."""
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return _flops(needed)


def _flops(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
            outputs = kernel[numbers.rhs_spec[0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
        elif name == "scan":
            total += params["length"] * _flops(params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_flops(branch.jaxpr) for branch in params["branches"])
        else:
            total += sum(_flops(inner) for inner in _inner(params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Programs inside an equation."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part


def kept_bytes(traced: ClosedJaxpr) -> int:
    """Bytes of what a traced function returns and did not get as an argument: what a forward pass keeps, if the
    function returns its `jax.vjp`."""
    given = set(traced.jaxpr.invars)
    kept = {var for var in traced.jaxpr.outvars if not isinstance(var, Literal)} - given
    return sum(math.prod(var.aval.shape) * np.dtype(var.aval.dtype).itemsize for var in kept if _is_array(var.aval))


def _is_array(aval: Any) -> bool:
    try:
        np.dtype(aval.dtype)
    except TypeError:  # keys and the like
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Traffic:
    """count: how often a kind of collective runs in a step. size: bytes of the whole arrays that it moves, as each chip
    sees them: an all-gather's result, a reduce-scatter's argument."""

    count: int
    size: float


_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')
_GROUPS = (re.compile(r"replica_groups=\[(\d+),(\d+)\]"), re.compile(r"replica_groups=\{\{([\d,]+)\}"))


def count_traffic(text: str) -> dict[str, Traffic]:
    """Collectives by kind, from the text of a compiled program (HLO)."""
    computations = _computations(text)
    entry = next(name for name, lines in computations.items() if lines and lines[0].startswith("ENTRY"))
    found: dict[str, dict[Any, tuple[int, float]]] = {}
    for name, times in _runs(computations, entry).items():
        for line in computations[name][1:]:
            operation = _OPERATION.match(line)
            kind = operation and operation[3].removesuffix("-start")
            if kind == "send" and "xla_megascale_runtime" in line:  # the TPU compiler's way to another slice
                kind = BETWEEN_SLICES
            elif kind not in KINDS:
                continue
            size = _bytes(operation[2], largest=operation[3].endswith(("-start", "send")))
            # The TPU compiler's "all-reduce-scatter": an all-reduce of which each chip keeps its slice.
            scattered = "reduce-scatter" in name
            # It also cuts a collective into pieces that overlap with other work; they share its channel.
            channel = re.search(r"channel_id=(\d+)", line)
            own_channel = channel and kind not in ("collective-permute", BETWEEN_SLICES)
            key = channel[1] if own_channel else operation[1]
            if kind == "reduce-scatter":
                size *= _group(line)
            found.setdefault("reduce-scatter" if scattered else kind, {})[key] = (times, size)
    return {
        kind: Traffic(sum(times for times, _ in each.values()), sum(times * size for times, size in each.values()))
        for kind, each in found.items()
    }


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation by its name, its header first."""
    computations, current = {}, []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[1], [])
        if line.startswith("}"):
            current = []
        elif header or line.startswith(" "):
            current.append(line)
    return computations


def _runs(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for line in computations[name][1:]:
            operation = _OPERATION.match(line)
            if not operation or operation[3].endswith(("-done", "-update")):
                continue
            body = re.search(r"body=%?([\w.\-]+)", line)
            if body:
                visit(body[1], times * _trips(line, computations))
            called = re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line)
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            called += [branch.strip(" %") for branch in branches[1].split(",")] if branches else []
            for callee in called:
                if callee in computations:
                    visit(callee, times)

    visit(entry, 1)
    return runs


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """Rounds of a loop: as the compiler notes them, or the bound that its condition compares with."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
    bounds = [int(n) for text in computations[condition] for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    return max(bounds, default=1)


def _bytes(shapes: str, largest: bool) -> float:
    """Bytes of an array or of a tuple of arrays; of a started collective, whose tuple has its arguments too, the
    largest."""
    sizes = [
        BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _SHAPE.findall(shapes)
        if kind in BYTES
    ]
    return float(max(sizes, default=0) if largest else sum(sizes))


def _group(line: str) -> int:
    """How many chips take part together."""
    rows, listed = (pattern.search(line) for pattern in _GROUPS)
    return int(rows[2]) if rows else len(listed[1].split(",")) if listed else 1
