"""Equal layers, one after another, with their parameters stacked on a leading axis.

Axes: B batch, T query length, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class Stack(nnx.Module):
    """`depth` layers made by `make(rngs)`; a layer maps (x, each, *shared) to x.

    scan: run the layers as one compiled `lax.scan` (compile time and code size do not grow with depth) instead of
        unrolled (faster on a CPU). The parameters are stacked either way, so checkpoints fit both.
    remat: compute each layer again in the backward pass instead of keeping its activations.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, scan: bool, remat: bool, rngs: nnx.Rngs):
        self.layers = nnx.vmap(make)(rngs.split(depth))
        self.depth, self.scan, self.remat = depth, scan, remat

    def __call__(self, x: jax.Array, *shared: Any, each: Any = None) -> jax.Array:
        """Pass x through all layers. each: a pytree of arrays with leading axis `depth`, one slice for each layer;
        shared: the same for all layers."""
        return self.run(lambda layer, x, each: (layer(x, each, *shared), None), x, each)[0]

    def run(
        self, apply: Callable[[nnx.Module, Any, Any], tuple[Any, Any]], x: Any, each: Any = None
    ) -> tuple[Any, Any]:
        """`apply` maps (layer, x, its slice of each) to (x for the next layer, a result of its own). Returns the last x
        and the results of all layers, stacked on a leading axis."""
        if self.remat:
            apply = jax.checkpoint(apply, prevent_cse=not self.scan)
        if self.scan:
            return lax.scan(lambda x, inputs: apply(inputs[0], x, inputs[1]), x, (self.layers, each))
        results = []
        for index in range(self.depth):
            x, result = apply(_at(index, self.layers), x, _at(index, each))
            results.append(result)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    def map(self, function: Callable[[nnx.Module], Any]) -> Any:
        """`function` of every layer, the results stacked on a leading axis."""
        if self.scan:
            return lax.map(function, self.layers)
        results = [function(_at(index, self.layers)) for index in range(self.depth)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def _at(index: int, stacked: Any) -> Any:
    """One slice of every array."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)
