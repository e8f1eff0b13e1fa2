"""How much an instruction tells about the actions, measured on the action side.

Axes: B batch, R noise draws of one sample, C chunk length, A action width.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from vla_jax.losses.flow_matching import Draw, flow_matching
from vla_jax.models.expert import Condition
from vla_jax.models.policy import Policy


def action_information(
    policy: Policy, prior: Condition, posterior: Condition, actions: Float[Array, "B C A"],
    action_mask: Bool[Array, "B C"], draws: Draw,
) -> Float[Array, " B"]:
    """FM(prior) - FM(posterior) of each sample under the same noise and times: 0 when the instruction says nothing about the
    actions that the image did not say.

    It stands in for log pi(a | v, l) - log p(a | v). For exact fields its mean is E|v_posterior - v_prior|^2 under the drawn times.
    actions in model units.
    """
    return (flow_matching(policy, prior, actions, action_mask, draws)
            - flow_matching(policy, posterior, actions, action_mask, draws))
