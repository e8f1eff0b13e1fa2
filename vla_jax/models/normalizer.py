"""What a policy has to know about its data, and the change of units at its border.

Axes: B batch, C chunk length, A action width.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """The facts of a data contract that fix a policy's shapes and units.

    vocabulary: number of token ids (id 0 is padding). max_tokens: longest instruction.
    action_low, action_high: SI values that are mapped to -1 and 1, one a dimension; state_low, state_high likewise.
    """

    vocabulary: int
    max_tokens: int
    image_size: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    state_low: tuple[float, ...]
    state_high: tuple[float, ...]

    def __post_init__(self):
        for name in ("action", "state"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if len(low) != len(high) or not all(a < b for a, b in zip(low, high, strict=True)):
                raise UserError(f"the {name} bounds need low < high in every dimension, got {low} and {high}")


class Constant(nnx.Variable):
    """A saved array that is not trained."""


class Normalizer(nnx.Module):
    """SI units outside, about [-1, 1] inside: y = 2 (x - low) / (high - low) - 1."""

    def __init__(self, facts: DataFacts):
        self.action_low = Constant(jnp.asarray(facts.action_low, jnp.float32))
        self.action_high = Constant(jnp.asarray(facts.action_high, jnp.float32))
        self.state_low = Constant(jnp.asarray(facts.state_low, jnp.float32))
        self.state_high = Constant(jnp.asarray(facts.state_high, jnp.float32))

    def normalize_action(self, action: Float[Array, "*B A"]) -> Float[Array, "*B A"]:
        """SI -> model units."""
        low, high = self.action_low[...], self.action_high[...]
        return 2 * (action - low) / (high - low) - 1

    def denormalize_action(self, action: Float[Array, "*B A"]) -> Float[Array, "*B A"]:
        """Model units -> SI."""
        low, high = self.action_low[...], self.action_high[...]
        return (action + 1) / 2 * (high - low) + low

    def normalize_state(self, state: Float[Array, "*B S"]) -> Float[Array, "*B S"]:
        """SI -> model units."""
        low, high = self.state_low[...], self.state_high[...]
        return 2 * (state - low) / (high - low) - 1
