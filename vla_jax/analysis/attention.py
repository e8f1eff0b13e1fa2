"""Where a policy reads: the attention weights of the trunk and of the expert, and the things that they fall on.

The layers run as they do in the policy, and beside each its softmax is computed again, so that nothing is kept for this
when a policy is trained or acts.

Axes: B batch, R readers (or noise draws, where it says so), N query heads, T query length, S key length, C chunk
length, A action width, O things.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.analysis.likelihood import repeat_scene
from vla_jax.errors import UserError
from vla_jax.flow.path import point
from vla_jax.models.expert import ActionExpert, Memory
from vla_jax.models.policy import Packed, Policy
from vla_jax.models.reasoning import last_words
from vla_jax.models.trunk import Trunk
from vla_jax.nn.attention import attention_weights

TIMES = (0.0, 0.25, 0.5, 0.75)  # flow times at which the expert is watched: those of a sampler of four steps


def trunk_attention(trunk: Trunk, packed: Packed) -> Float[Array, "depth B N T T"]:
    """The weights of every layer, for the inputs of `Trunk.__call__`. Rows of padding tokens mean nothing.

    Raises:
        UserError: a trunk with taps, whose layers do not run alike.
    """
    if packed.taps is not None:
        raise UserError("attention cannot be shown for a model that taps its vision tower (DeepStack)")
    layout = packed.layout
    mask = layout.mask & packed.valid[:, None]
    rotary = trunk.rotary(layout.sight.position if packed.position is None else packed.position)

    def layer(block, x, each):
        y = block.attention_norm(x)
        keys, _ = block.attention.keys_values(y, rotary)
        return block(x, mask, rotary), attention_weights(block.attention.queries(y, rotary), keys, mask)

    return trunk.blocks.run(layer, packed.sequence.astype(trunk.dtype))[1]


def expert_attention(
    expert: ActionExpert, actions: Float[Array, "B R C A"], time: Float[Array, "B R"], memory: Memory
) -> Float[Array, "depth B R N T S"]:
    """The weights with which each of R draws looks at the condition, in every cross-attention block, for the inputs of
    `ActionExpert.__call__`. The last C of the T tokens are the actions."""
    x, embedded = expert.begin(actions, time, memory)
    mask = None if memory.valid is None else memory.valid[:, None]

    def layer(pair, x, each):
        keys, _, _ = each
        B, R, T, D = x.shape
        queries = pair.cross.attention.queries(pair.cross.norm(x, embedded).reshape(B, R * T, D))
        weights = attention_weights(queries, keys, mask)
        return pair(x, each, embedded, mask), jnp.moveaxis(weights.reshape(B, -1, R, T, keys.shape[1]), 2, 1)

    return expert.pairs.run(layer, x, (memory.keys, memory.values, None))[1]


class Gaze(NamedTuple):
    """How the readers of a sequence share out their attention: rows sum to 1 over all three; the words' padding has 0.

    The readers are the latent queries; where a policy has none, the actions of a chunk; or the words that it says.
    """

    image: Float[Array, "B R T"]
    text: Float[Array, "B R L"]
    query: Float[Array, "B R Q"]


@functools.partial(jax.jit, static_argnames="branch")
def gaze(
    policy: Policy,
    observation: dict[str, Any],
    tokens: Int[Array, "B L"],
    token_mask: Bool[Array, "B L"],
    key: PRNGKeyArray,
    branch: str = "posterior",
) -> Gaze:
    """Mean over layers and heads of the attention that decides what the actions may know, in one scene under each of B
    instructions.

    With latent queries it is theirs, in the trunk: the expert sees nothing but them. With conditioning on the policy's
    own words alone it is the trunk's where each of these is said. Otherwise it is the expert's own cross-attention to
    the trunk's tokens, a mean over TIMES on the way from noise to the chunk that the policy samples.

    Args:
        observation: of the one scene, as in `Policy.act`.
        key: of the noise.
        branch: "posterior" or "prior".

    Raises:
        UserError: a policy without queries has no prior.
    """
    observation = repeat_scene(observation, len(tokens))
    packed = policy.pack(observation["images"], *policy.reason(observation["images"], tokens, token_mask), (branch,))
    layout, text = packed.layout, packed.layout[f"{branch}/text"]
    if policy.config.conditioning == "tokens":
        weights = _action_gaze(policy, observation, tokens, token_mask, key)
    else:
        weights = trunk_attention(policy.trunk, packed).mean((0, 2))
    if policy.config.conditioning == "queries":
        weights = weights[:, layout[f"{branch}/query"]]
        return Gaze(_of_image(weights, policy), weights[..., text], weights[..., layout[f"{branch}/query"]])
    if policy.config.conditioning == "reasoning":
        said = text.start + last_words(packed.valid[:, text], policy.config.reasoning)
        weights = jnp.take_along_axis(weights, said[..., None] - 1, 1)
    return Gaze(_of_image(weights, policy), weights[..., text], weights[..., :0])


def _of_image(weights: Float[Array, "B R S"], policy: Policy) -> Float[Array, "B R T"]:
    """The part that falls on the tokens of all views."""
    starts = np.cumsum([0, *(span.length for span in policy.prefix)])
    views = [
        weights[..., start : start + span.length]
        for start, span in zip(starts, policy.prefix, strict=False)
        if span.kind == "image"
    ]
    return jnp.concatenate(views, -1)


def _action_gaze(policy, observation, tokens, token_mask, key) -> Float[Array, "B C S"]:
    reading = policy.encode(observation["images"], tokens, token_mask)["posterior"]
    condition = policy.condition(reading, observation["state"])
    chunk, width = policy.config.chunk, len(policy.facts.action_low)
    # The same noise for every instruction, so that the words alone make the difference.
    noise = jnp.broadcast_to(jax.random.normal(key, (chunk, width)), (len(tokens), chunk, width))
    actions = policy.sample(condition, noise)
    time = jnp.broadcast_to(jnp.array(TIMES), (len(tokens), len(TIMES)))
    points = point(noise[:, None], actions[:, None], time)
    weights = expert_attention(policy.expert, points, time, policy.expert.read(condition))
    return weights.mean((0, 2, 3))[:, -chunk:]


def shown(
    places: Float[np.ndarray, "T 2"],
    reach: int,
    views: Sequence[str],
    things: dict[str, Int[np.ndarray, "H W"]],
    count: int,
) -> Float[np.ndarray, "T O"]:
    """The share of each image token's square that shows each thing.

    Args:
        places, reach: of the vision encoder; the tokens of all `views`, view after view.
        things: for each view, the number of the thing that a pixel shows, 0 .. count - 1, or -1.
        count: O.
    """
    shares = []
    for view, (column, row) in zip(np.repeat(views, len(places) // len(views)), places, strict=True):
        left, top = (round(float(middle) - reach / 2) for middle in (column, row))
        square = things[view][top : top + reach, left : left + reach]
        shares.append([(square == thing).mean() for thing in range(count)])
    return np.array(shares)
