"""How likely recorded actions are under a policy, and the guidance that makes them most likely.

Axes: B batch, C chunk length, A action width, W weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vla_jax.evaluation.listening import acting_field
from vla_jax.flow.density import log_density
from vla_jax.models.policy import Policy


def action_log_likelihood(
    policy: Policy, batch: dict[str, Any], guidance: Float[Array, ""] | float | None = None, steps: int = 16
) -> Float[Array, " B"]:
    """log pi(a | v, l) of each sample's chunk in nats, exact for the flow; actions in model units.

    Args:
        batch: as `data.loader.make_loader` gives it. Chunks that reach past their episode's end count as they are, with
            the last action repeated.
        guidance: as in `Policy.act`: None is the posterior branch, 0 the prior branch, that is log p(a | v). The law of
            a guided flow is that of its own velocity field, which is a proper density for every w.
        steps: of the integrator.
    """
    branches = ("posterior",) if guidance is None else ("prior", "posterior")
    readings = policy.encode(batch["images"], batch["tokens"], batch["token_mask"], branches)
    velocity = acting_field(policy, readings, batch["state"], guidance)
    return log_density(velocity, policy.normalizer.normalize_action(batch["actions"]), steps=steps)


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

    names = ("images", "state", "tokens", "token_mask", "actions")
    batches = [{name: batch[name] for name in names} for batch in batches]
    curve = np.array([np.mean([mean(state, batch, jnp.float32(w)) for batch in batches]) for w in weights])
    return float(weights[int(curve.argmax())]), curve
