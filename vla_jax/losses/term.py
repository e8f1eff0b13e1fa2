"""A named part of the objective, with the share of samples that carried it.

Axes: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.errors import UserError


class Term(NamedTuple):
    """value: mean over the samples that carried the term. valid_fraction: their share of the batch. weight: what the
    value was multiplied by in the objective; 0 for a term that is only logged."""

    value: Float[Array, ""]
    valid_fraction: Float[Array, ""]
    weight: float = 0.0


def mean_over(values: Float[Array, " B"], carried: Bool[Array, " B"]) -> Float[Array, ""]:
    """Mean of `values` where `carried`; 0, with gradient 0, where nothing was carried."""
    return jnp.where(carried, values, 0.0).sum() / jnp.maximum(carried.sum(), 1)


def term(values: Float[Array, " B"], carried: Bool[Array, " B"], weight: float = 0.0) -> Term:
    """The mean over the samples that carried it."""
    return Term(mean_over(values, carried), carried.mean(dtype=jnp.float32), weight)


def check_terms(terms: Mapping[str, Term]) -> None:
    """Raise if a term that has a weight was carried by no sample. Call on the host, with concrete values.

    A public implementation of BayesianVLA trained for months with a key loss that silently skipped every sample.
    """
    for name, part in terms.items():
        if float(part.weight) != 0 and float(part.valid_fraction) == 0:
            raise UserError(
                f"loss term {name!r} has weight {float(part.weight):g}, but no sample of the batch carried it: look at "
                "token_mask (empty instructions?) and action_mask, or set its weight to 0"
            )
