"""What the action tells about the instruction: log p(l | a, v) - log p(l | v), with the action in the conditioning.

BayesianVLA (arXiv 2601.15197) derives this quantity in Eq. 4 and then trains another one, in which no action occurs
(see `losses.llr`). Here the trunk reads the action chunk before the instruction. Its mean over the data is I(l; a | v)
when both likelihoods are those of the data, so both have to be trained: the *reader* on recorded actions, p(l | v) by
the language loss.

To make a policy informative, the reader then judges the policy's own actions. It is frozen there: a reader that learned
from them could agree with the policy on a code that means nothing to anybody else.

Axes: B batch, L instruction length, C chunk length, A action width.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Bool, Float, Int, Key

from vla_jax.flow.path import point
from vla_jax.losses.flow_matching import draw
from vla_jax.losses.language import token_log_likelihood
from vla_jax.models.expert import Condition, present
from vla_jax.models.policy import Chunk, Policy, Reading
from vla_jax.nn.flat import frozen


def recorded_chunk(
    actions: Float[Array, "B C A"], dimensions: Bool[Array, "B A"], keys: Key[Array, " B"], noised: bool
) -> Chunk:
    """What the reader learns from: recorded actions (model units), clean or at a point of the flow; 0 in dimensions
    that the robot lacks."""
    noise, time = (part[:, 0] for part in draw(keys, (1, *actions.shape[1:])))
    time = time if noised else time * 0 + 1
    return Chunk(present(point(noise, actions, time), dimensions), time)


def predicted_chunk(
    policy: Policy, condition: Condition, actions: Float[Array, "B C A"], keys: Key[Array, " B"]
) -> Chunk:
    """The actions at which the policy aims from a point of the flow: x_t + (1 - t) v(x_t, t), differentiable; 0 in
    dimensions that the robot lacks."""
    noise, time = draw(keys, (1, *actions.shape[1:]))
    x = point(noise, actions[:, None], time)
    aim = x + (1 - time[..., None, None]) * policy.velocity(x, time, condition)
    return Chunk(present(aim[:, 0], condition.dimensions), time[:, 0] * 0 + 1)


def likelihoods(policy: Policy, reading: Reading, tokens: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """log p of each instruction token in the ordering that was read."""
    return token_log_likelihood(policy.word_logits(reading.predictors), tokens)


def read_back(policy: Policy, chunk: Chunk, batch: dict[str, Any], mask: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    """log p(l | a, v) of each token under the frozen reader, differentiable in the actions alone."""
    reader = frozen(policy)
    reading = reader.encode(batch["images"], batch["tokens"], mask, ("action",), chunk)["action"]
    return likelihoods(reader, reading, batch["tokens"])
