"""Weights that break the tie between what a picture shows and what is asked for.

In biased data the picture gives the instruction away: p(l | v) is sharp, and imitation has no reason to read. Weighting
every sample by p(l) / p(l | v) turns the joint law of pictures and instructions into the product of its margins, under
which the picture says nothing about the instruction (as far as both were seen together at all). It is the importance
weight of imitation learning under a shifted law of contexts (Shimodaira 2000, doi 10.1016/S0378-3758(00)00115-4), with
the policy's own language head as the model of both likelihoods; -log of it is the information between v and l.

Axes: B batch, L instruction length.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

LIMIT = 4.0  # nats: no sample counts more than e^4 times, or less than e^-4 times, what it would count unweighted


def balance_weights(
    seen: Float[Array, "B L"], alone: Float[Array, "B L"], mask: Bool[Array, "B L"], exponent: float
) -> Float[Array, " B"]:
    """(p(l) / p(l | v))^exponent, made to have mean 1 over the batch; no gradient passes.

    seen, alone: log p of each token with the picture and without it. exponent: 1 balances, 0 leaves the data as they
    are. A sample with an empty instruction has a ratio of 1.
    """
    ratio = jnp.where(mask, alone - seen, 0.0).sum(-1)
    weights = jnp.exp(exponent * jnp.clip(lax.stop_gradient(ratio), -LIMIT, LIMIT))
    return weights / weights.mean()


def effective_share(weights: Float[Array, " B"]) -> Float[Array, ""]:
    """Kish's effective sample size as a share of the batch: (sum w)^2 / (B sum w^2)."""
    return jnp.square(weights.sum()) / (len(weights) * jnp.square(weights).sum())
