"""Low-rank adapters on dense layers (LoRA, arXiv 2106.09685).

Axes: B batch, D inputs, F outputs, R rank, L layers of a stack.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vla_jax.errors import UserError
from vla_jax.nn.dense import Dense


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """rank: 0 is no adapters. strength: the adapters' product is scaled by strength / rank. layers: a regular
    expression on the paths of dense layers, "trunk/blocks/layers/attention/query" and the like."""

    rank: int = 0
    strength: float = 16.0
    layers: str = r"^trunk/.*/attention/(query|key|value|output)$"


class Adapter(nnx.Module):
    """x A B strength / R, zero at first. For a stack of layers, A and B have its leading axis."""

    def __init__(self, kernel: Float[Array, "*L D F"], config: LoraConfig, rngs: nnx.Rngs):
        *lead, inputs, outputs = kernel.shape
        down = jax.random.normal(rngs.params(), (*lead, inputs, config.rank)) * inputs**-0.5
        self.down = nnx.Param(down)
        self.up = nnx.Param(jnp.zeros((*lead, config.rank, outputs)))
        self.scale = config.strength / config.rank

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B F"]:
        return (x @ self.down[...].astype(x.dtype)) @ (self.up[...] * self.scale).astype(x.dtype)

    @property
    def product(self) -> Float[Array, "*L D F"]:
        """What the adapter adds to the layer's matrix."""
        return jnp.einsum("...DR,...RF->...DF", self.down[...], self.up[...]) * self.scale


def add_adapters(module: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Gives every dense layer of the module that `config.layers` matches an adapter."""
    try:
        chosen = [layer for path, layer in _dense_layers(module) if re.search(config.layers, path)]
    except re.error as error:
        raise UserError(f"lora.layers: {config.layers!r} is no regular expression: {error}") from error
    if not chosen:
        paths = ", ".join(path for path, _ in _dense_layers(module)[:4])
        raise UserError(f"lora.layers: {config.layers!r} matches no dense layer; there are {paths}, …")
    for layer in chosen:
        layer.adapter = nnx.data(Adapter(layer.kernel[...], config, rngs))


def merge_adapters(module: nnx.Module) -> None:
    """Adds every adapter's product to its layer's matrix and takes the adapter away."""
    for _, layer in _dense_layers(module):
        if layer.adapter is not None:
            kernel = layer.kernel[...]
            layer.kernel[...] = (kernel.astype(jnp.float32) + layer.adapter.product).astype(kernel.dtype)
            layer.adapter = None


def _dense_layers(module: nnx.Module) -> list[tuple[str, Dense]]:
    found = ((path, node) for path, node in nnx.iter_graph(module) if isinstance(node, Dense))
    return sorted((("/".join(map(str, path)), node) for path, node in found), key=lambda pair: pair[0])
