"""Likelihood of the instruction under one of the branches.

Axes: B batch, L instruction length, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_log_likelihood(logits: Float[Array, "B L V"], tokens: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """log p(token), each under the logits made one place earlier."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1)


def mean_over_tokens(values: Float[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, " B"]:
    """Mean over the tokens where `mask`; 0 for a sample without any."""
    return jnp.where(mask, values, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
