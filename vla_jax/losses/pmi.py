"""How much an instruction tells about the actions beyond what the image told, measured on the action side.

Both functions compare the velocity fields of the prior and the posterior branch under the same noise and times, which
removes most of the variance. Each is 0 when the instruction is uninformative.

Axes: B batch, R noise draws of one sample, C chunk length, A action width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.losses.flow_matching import Draw, Field, draw_errors

LAST_TIME = 0.999  # the weight t / (1 - t) is cut here


def surrogate(
    prior: Field, posterior: Field, actions: Float[Array, "B C A"], action_mask: Bool[Array, "B C"], draws: Draw
) -> Float[Array, " B"]:
    """FM(prior) - FM(posterior) of each sample, in the units of the loss. Actions in model units."""
    return _difference(prior, posterior, actions, action_mask, draws).mean(1)


def pointwise_information(
    prior: Field,
    posterior: Field,
    actions: Float[Array, "B C A"],
    action_mask: Bool[Array, "B C"],
    key: PRNGKeyArray,
    draws: int,
) -> Float[Array, " B"]:
    """log pi(a | v, l) - log p(a | v) of each sample in nats, exact for exact fields and many draws.

    The integral over t of t / (1 - t) times the expected difference of the summed squared velocity errors: the
    pointwise I-MMSE relation (Kong et al., arXiv 2302.03792) on the path x_t = (1 - t) noise + t a, whose
    signal-to-noise ratio is t^2 / (1 - t)^2. The times of a sample are stratified. Actions in model units.
    """
    noise_key, time_key = jax.random.split(key)
    B, C, A = actions.shape
    noise = jax.random.normal(noise_key, (B, draws, C, A))
    strata = (jnp.arange(draws) + jax.random.uniform(time_key, (B, draws))) / draws
    time = LAST_TIME * strata
    summed = _difference(prior, posterior, actions, action_mask, Draw(noise, time)) * (A * action_mask.sum(-1))[:, None]
    return LAST_TIME * (summed * time / (1 - time)).mean(1)


def _difference(prior, posterior, actions, action_mask, draws) -> Float[Array, "B R"]:
    return draw_errors(prior, actions, action_mask, draws) - draw_errors(posterior, actions, action_mask, draws)
