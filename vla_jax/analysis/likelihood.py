"""How likely actions and instructions are under a policy, and the guidance that makes recorded actions most likely.

Axes: B batch, C chunk length, A action width, W weights, I chunks, K instructions, L instruction length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from tqdm import tqdm

from vla_jax.evaluation.listening import acting_field
from vla_jax.flow.density import log_density
from vla_jax.losses.information import likelihoods
from vla_jax.models.expert import present
from vla_jax.models.policy import Policy


def action_log_likelihood(
    policy: Policy, batch: dict[str, Any], guidance: Float[Array, ""] | float | None = None, steps: int = 16
) -> Float[Array, " B"]:
    """log pi(a | v, l) of each sample's chunk in nats, exact for the flow; actions in model units.

    Args:
        batch: as `data.loader.make_loader` gives it. Chunks that reach past their episode's end count as they are, with
            the last action repeated; dimensions that a robot lacks do not (without an `action_mask` it has all).
        guidance: as in `Policy.act`: None is the posterior branch, 0 the prior branch, that is log p(a | v). The law of
            a guided flow is that of its own velocity field, which is a proper density for every w.
        steps: of the integrator.
    """
    dimensions = batch["action_mask"].any(1) if "action_mask" in batch else None
    observation = {"images": batch["images"], "state": batch["state"], "dimensions": dimensions}
    conditions = policy.conditions(observation, batch["tokens"], batch["token_mask"], guidance)
    velocity = acting_field(policy, conditions, guidance)
    chunks = present(policy.normalizer.normalize_action(batch["actions"]), dimensions)
    return log_density(velocity, chunks, dimensions, steps=steps)


def guidance_curve(
    policy: Policy, batches: Iterable[dict[str, Any]], weights: Sequence[float], steps: int = 16
) -> tuple[float, Float[np.ndarray, " W"]]:
    """The w under which held-out demonstrations are most likely, and their mean log-likelihood under each w (nats).

    Never choose w by success on test scenes; this needs none.

    Args:
        batches: held-out data (`make_loader` with split="held_out").
        weights: candidates.
    """
    graphdef, state = nnx.split(policy)

    @jax.jit
    def mean(state, batch, weight):
        return action_log_likelihood(nnx.merge(graphdef, state), batch, weight, steps).mean()

    names = ("images", "state", "tokens", "token_mask", "actions", "action_mask")
    batches = [{name: batch[name] for name in names} for batch in batches]
    pairs = tqdm([(weight, batch) for weight in weights for batch in batches], desc="likelihood", unit="batch")
    nats = np.array([mean(state, batch, jnp.float32(weight)) for weight, batch in pairs])
    curve = nats.reshape(len(weights), len(batches)).mean(axis=1)
    return float(weights[int(curve.argmax())]), curve


def repeat_scene(observation: dict[str, Any], times: int) -> dict[str, Any]:
    """The observation of one scene (leading axis 1), `times` times."""
    return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), times, 0), observation)


@jax.jit
def first_chunks(
    policy: Policy,
    observation: dict[str, Any],
    tokens: Int[Array, "K L"],
    token_mask: Bool[Array, "K L"],
    key: PRNGKeyArray,
) -> Float[Array, "K C A"]:
    """What the policy does in one scene under each instruction, with the same noise; SI units.

    observation: as in `Policy.act`, of the one scene (B = 1).
    """
    act = jax.vmap(lambda words, mask: policy.act(observation, words[None], mask[None], key)[0])
    return act(tokens, token_mask)


@functools.partial(jax.jit, static_argnames="steps")
def explain(
    policy: Policy,
    observation: dict[str, Any],
    chunks: Float[Array, "I C A"],
    tokens: Int[Array, "K L"],
    token_mask: Bool[Array, "K L"],
    steps: int = 16,
) -> Float[Array, "I K"]:
    """log pi(a_i | v, l_j) in nats: how well each instruction explains each chunk of actions in one scene.

    By Bayes' rule its softmax over the instructions is p(l_j | a_i, v), where all of them are equally likely before.

    Args:
        observation: of the one scene (B = 1).
        chunks: SI units.
        steps: of the integrator.
    """
    words, mask = (jnp.tile(part, (len(chunks), 1)) for part in (tokens, token_mask))
    scene, actions = repeat_scene(observation, len(words)), jnp.repeat(chunks, len(tokens), 0)
    batch = {**scene, "tokens": words, "token_mask": mask, "actions": actions}
    return action_log_likelihood(policy, batch, steps=steps).reshape(len(chunks), len(tokens))


@functools.partial(jax.jit, static_argnames="branch")
def instruction_log_likelihood(
    policy: Policy,
    observation: dict[str, Any],
    tokens: Int[Array, "K L"],
    token_mask: Bool[Array, "K L"],
    branch: str = "posterior",
) -> Float[Array, " K"]:
    """log p(l | v) of each instruction in one scene by the language head, in nats, a sum over the words.

    branch: "posterior" reads [v, l]; "prior" reads [v, Q, l], the ordering that the LLR trains.
    """
    images = repeat_scene(observation, len(tokens))["images"]
    reading = policy.encode(images, tokens, token_mask, (branch,))[branch]
    return jnp.where(token_mask, likelihoods(policy, reading, tokens), 0.0).sum(-1)
