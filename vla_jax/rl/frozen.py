"""A frozen flow policy as a black box (observation, noise) -> chunk, and what may choose the noise.

The trunk reads an observation once; the result is kept with the transition, so that a later question to the policy
costs the action expert only.

Axes: B batch, F features, D numbers of one noise, C chunk length, A action width, S condition tokens, N candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vla_jax.errors import UserError
from vla_jax.flow.solve import identity
from vla_jax.flow.transforms import Weight, extrapolate
from vla_jax.models.expert import Condition
from vla_jax.models.policy import Policy
from vla_jax.rl.networks import Critics, NoiseActor, merge

SUMMARIES = ("flat", "pooled")


class Flow(NamedTuple):
    """A policy as an agent sees it. `weights` is any pytree, an argument so that compiled code serves all weights.

    read(weights, observation, tokens, token_mask) -> what the policy made of an observation (pytree).
    features(read) -> [B, F]: what critics and actors see of it.
    decode(weights, read, noise [B, C, A]) -> chunk [B, C, A] in model units, deterministic.
    to_robot(weights, chunk) -> actions [B, C, A] in SI units.
    shape: (C, A).
    """

    read: Callable[..., Any]
    features: Callable[[Any], Float[Array, "B F"]]
    decode: Callable[..., Float[Array, "B C A"]]
    to_robot: Callable[..., Float[Array, "B C A"]]
    shape: tuple[int, int]

    def noise_width(self, repeat: bool) -> int:
        """D: the whole chunk's numbers or, repeated, those of one action."""
        return self.shape[1] if repeat else self.shape[0] * self.shape[1]

    def spread(self, noise: Float[Array, "B D"]) -> Float[Array, "B C A"]:
        """The noise as the sampler takes it, see `spread`."""
        return spread(noise, self.shape)


def spread(noise: Float[Array, "B D"], shape: tuple[int, int]) -> Float[Array, "B C A"]:
    """The noise as a sampler of chunks of this shape takes it: cut into actions or, as long as one, repeated."""
    C, A = shape
    if noise.shape[-1] == A and C > 1:
        return jnp.broadcast_to(noise[:, None], (len(noise), C, A))
    return noise.reshape(-1, C, A)


def flow_of(graphdef: nnx.GraphDef, shape: tuple[int, int], steps: int, guidance: Weight | None, summary: str) -> Flow:
    """The flow of a `Policy`; its weights are flat: {"expert/...": array}.

    graphdef: of `networks.split(policy)`. steps, guidance: of the sampler, see `Policy.act`.
    summary: how the trunk's output becomes features, see `summarize`.
    """

    def read(weights, observation, tokens, token_mask):
        return merge(graphdef, weights).conditions(observation, tokens, token_mask, guidance)

    def decode(weights, conditions, noise):
        return decode_policy(merge(graphdef, weights), conditions, noise, steps, guidance)

    def to_robot(weights, chunk):
        return merge(graphdef, weights).normalizer.denormalize_action(chunk)

    return Flow(read, lambda conditions: summarize(conditions["posterior"], summary), decode, to_robot, shape)


def decode_policy(policy: Policy, conditions: dict[str, Condition], noise, steps, guidance) -> Float[Array, "B C A"]:
    """The chunk, in model units."""
    transform = identity if guidance is None else extrapolate(policy.field(conditions["prior"]), guidance)
    return policy.sample(conditions["posterior"], noise, steps=steps, transform=transform)


def summarize(condition: Condition, summary: str) -> Float[Array, "B F"]:
    """Features of a condition, with the proprioception beside them.

    "flat": all hidden states in a row (for a few latent queries). "pooled": their mean over what counts, and the last
    that counts, which has seen everything before it (for conditions of any length).
    """
    if summary not in SUMMARIES:
        raise UserError(f"summary must be one of {', '.join(SUMMARIES)}, got {summary!r}")
    context, valid = condition.context.astype(jnp.float32), condition.valid
    if summary == "flat":
        if valid is not None:
            raise UserError("summary = 'flat' is for a fixed number of latent queries: set summary = 'pooled'")
        return jnp.concatenate([context.reshape(len(context), -1), condition.state], -1)
    counts = jnp.ones(context.shape[:2], bool) if valid is None else valid
    mean = jnp.einsum("BSD,BS->BD", context, counts) / counts.sum(1, keepdims=True)
    last = jnp.max(jnp.where(counts, jnp.arange(counts.shape[1]), 0), 1)
    last = jnp.take_along_axis(context, last[:, None, None], 1)[:, 0]
    return jnp.concatenate([mean, last, condition.state], -1)


class Prior(nnx.Module):
    """N(0, I): what the policy was trained with."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, features: Float[Array, "B F"], key: PRNGKeyArray) -> Float[Array, "B D"]:
        return jax.random.normal(key, (len(features), self.width))


class Fixed(nnx.Module):
    """The same noise always."""

    def __init__(self, noise: Float[Array, " D"]):
        self.noise = nnx.Param(noise)

    def __call__(self, features: Float[Array, "B F"], key: PRNGKeyArray) -> Float[Array, "B D"]:
        return jnp.broadcast_to(self.noise[...], (len(features), *self.noise.shape))


class Acted(nnx.Module):
    """What a noise actor chooses. greedy: its mode, else a draw; an array, so that one program does both."""

    def __init__(self, actor: NoiseActor, greedy: bool = False):
        self.actor, self.greedy = actor, nnx.Variable(jnp.asarray(greedy))

    def __call__(self, features: Float[Array, "B F"], key: PRNGKeyArray) -> Float[Array, "B D"]:
        return jnp.where(self.greedy[...], self.actor.mode(features), self.actor(features, key)[0])


class BestOf(nnx.Module):
    """The one of N draws of the prior that the critics, at their most doubtful, like best."""

    def __init__(self, critics: Critics, candidates: int, width: int):
        self.critics, self.candidates, self.width = critics, candidates, width

    def __call__(self, features: Float[Array, "B F"], key: PRNGKeyArray) -> Float[Array, "B D"]:
        noises = jax.random.normal(key, (len(features), self.candidates, self.width))
        best = jnp.argmax(self.critics(features, noises).min(0), -1)
        return jnp.take_along_axis(noises, best[:, None, None], 1)[:, 0]


class SteeredPolicy(nnx.Module):
    """A policy that starts from a chosen noise; it acts as any `Policy` does, so whatever judges those judges it.

    source: (features, key) -> noise [B, D]. steered: False leaves the noise to the prior; an array, so that one program
    shows the policy with and without.
    """

    def __init__(self, policy: Policy, source: nnx.Module, summary: str, steered: bool = True):
        self.policy, self.source, self.summary = policy, source, summary
        self.steered = nnx.Variable(jnp.asarray(steered))

    def act(self, observation, tokens, token_mask, key, steps=4, guidance=None) -> Float[Array, "B C A"]:
        """A chunk of actions in SI units; see `Policy.act`."""
        conditions = self.policy.conditions(observation, tokens, token_mask, guidance)
        chosen = self.noise(conditions["posterior"], key)
        noise = jnp.where(self.steered[...], chosen, jax.random.normal(key, chosen.shape))
        chunk = decode_policy(self.policy, conditions, noise, steps, guidance)
        return self.policy.normalizer.denormalize_action(chunk)

    def noise(self, condition: Condition, key: PRNGKeyArray) -> Float[Array, "B C A"]:
        """The noise that the source chooses for what the policy read."""
        shape = self.policy.config.chunk, len(self.policy.facts.action_low)
        return spread(self.source(summarize(condition, self.summary), key), shape)
