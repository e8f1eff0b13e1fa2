"""A recorded action is to be likelier under its own instruction than under another one.

    -log sigmoid((e(l') - e(l)) / tau),    e(l) = |v(x_t, t | v, l) - (a - noise)|^2

l' is the instruction of another sample of the batch; image, state, noise and times are the same for both, so that the
words alone make the difference. A policy that does not read them is at log 2.

This is InfoNCE with one negative (arXiv 1807.03748): whatever the score, valid_fraction x (log 2 - value) is in
expectation a lower bound of I(l; a, v). The score e(l') - e(l) is log pi(a | v, l) - log pi(a | v, l') up to a weight:
times t / (1 - t), summed over dimensions and integrated over t, it would be that difference (pointwise I-MMSE, arXiv
2302.03792; see `flow.density.relative_log_likelihood`). Here the density of the training times is the weight, and tau
the scale.

The negatives come from p(l), as the data do not show p(l | v). So the bound is on I(l; a, v) = I(l; v) + I(l; a | v):
a policy also lowers the term by noticing that l' does not fit the scene, without knowing what to do about it.

Axes: B batch, L instruction length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.models.policy import Instruction

# Of e, the mean squared velocity error of one action dimension (model units): at a difference of a few TEMPERATURE the
# two are told apart and the gradient fades.
TEMPERATURE = 0.1


def negatives(tokens: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> tuple[Instruction, Bool[Array, " B"]]:
    """The instruction of each sample's neighbour, as batches are in random order, and where that is another one.

    A sample without an instruction of its own has no other one.
    """
    other = Instruction(jnp.roll(tokens, 1, 0), jnp.roll(mask, 1, 0))
    differs = (jnp.where(mask, tokens, -1) != jnp.where(other.mask, other.tokens, -1)).any(-1)
    return other, differs & mask.any(-1)


def contrast(own: Float[Array, " B"], other: Float[Array, " B"]) -> Float[Array, " B"]:
    """-log sigmoid((other - own) / tau) of each sample's errors e(l) and e(l')."""
    return -jax.nn.log_sigmoid((other - own) / TEMPERATURE)
