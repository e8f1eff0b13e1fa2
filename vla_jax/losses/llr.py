"""The log-likelihood ratio of the instruction between the two branches.

BayesianVLA / LangForce (arXiv 2601.15197), Eq. 7: L_LLR = log p(l | v, H_Q of the prior) - sg(log p(l | v)), a mean
over tokens. As the second part is not differentiated, the gradient is that of an instruction language-model loss on the
ordering [v, Q, l]; the second part moves the logged value, and chooses and weighs tokens when the options below are on.

Axes: B batch, L instruction length, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from vla_jax.losses.language import mean_over_tokens, token_log_likelihood
from vla_jax.losses.term import mean_over

DECAY, MARGIN, TEMPERATURE = 0.99, 0.7, 0.5


class GateState(NamedTuple):
    """Running mean of the instruction's negative log-likelihood given the image, and whether it has begun."""

    mean: Float[Array, ""]
    started: Bool[Array, ""]


def initial_gate() -> GateState:
    """The state before the first batch."""
    return GateState(jnp.zeros((), jnp.float32), jnp.zeros((), bool))


class LLR(NamedTuple):
    """Per sample: gate x ratio, and its parts. carried is False for a sample with an empty instruction."""

    ratio: Float[Array, " B"]
    prior: Float[Array, " B"]
    posterior: Float[Array, " B"]
    gate: Float[Array, " B"]
    carried: Bool[Array, " B"]


def log_likelihood_ratio(
    prior_logits: Float[Array, "B L V"],
    posterior_logits: Float[Array, "B L V"],
    tokens: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    gate_state: GateState,
    *,
    hard_tokens: int = 0,
    gate: bool = False,
) -> tuple[LLR, GateState]:
    """LLR of each sample, and the new gate state.

    hard_tokens: keep only this many tokens of each sample, those that the posterior ordering's p(l | v) finds most
        surprising (0 keeps all).
    gate: weigh samples by sigmoid((0.7 m - N) / 0.5), where N = -log p(l | v) a token and m is its running mean (decay
        0.99, set by the first batch): instructions that the image gives away count more.
    """
    carried = mask.any(-1)
    prior = token_log_likelihood(prior_logits, tokens)
    posterior = token_log_likelihood(lax.stop_gradient(posterior_logits), tokens)
    surprise = -mean_over_tokens(posterior, mask)
    gate_state = _update(gate_state, surprise, carried)
    weight = jax.nn.sigmoid((MARGIN * gate_state.mean - surprise) / TEMPERATURE) if gate else jnp.ones_like(surprise)
    kept = mask if hard_tokens == 0 else _hardest(-posterior, mask, hard_tokens)
    prior, posterior = mean_over_tokens(prior, kept), mean_over_tokens(posterior, kept)
    return LLR(weight * (prior - posterior), prior, posterior, weight, carried), gate_state


def _update(state: GateState, surprise: Float[Array, " B"], carried: Bool[Array, " B"]) -> GateState:
    """m <- 0.99 m + 0.01 mean(N); the first batch sets m, and a batch without instructions changes nothing."""
    batch = mean_over(surprise, carried)
    new = jnp.where(state.started, DECAY * state.mean + (1 - DECAY) * batch, batch)
    return GateState(jnp.where(carried.any(), new, state.mean), state.started | carried.any())


def _hardest(surprise: Float[Array, "B L"], mask: Bool[Array, "B L"], count: int) -> Bool[Array, "B L"]:
    """True at the `count` most surprising tokens of each sample, at all of them where there are fewer."""
    order = jnp.argsort(jnp.where(mask, surprise, -jnp.inf), -1, descending=True)
    rank = jnp.argsort(order, -1)
    return mask & (rank < count)
