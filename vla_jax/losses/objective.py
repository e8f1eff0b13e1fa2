"""The BayesianVLA objective and its arms.

(1 - lambda) FM(posterior) + lambda FM(prior) - beta LLR + gamma (-log p(l | v)): BayesianVLA / LangForce (arXiv
2601.15197), Eq. 9, plus the auxiliary language loss of its Tab. 10.

| arm | policy.conditioning | prior_weight | llr_weight |
|---|---|---|---|
| all-token baseline | "tokens" | 0 | 0 |
| queries only | "queries" | 0 | 0 |
| + prior flow matching | "queries" | 0.3 | 0 |
| + LLR | "queries" | 0 | 0.1 |
| full | "queries" | 0.3 | 0.1 |

Beyond the paper: the information between action and instruction that its Eq. 4 is about (`losses.information`), and
the action's preference for its own instruction (`losses.contrastive`); and questions about the picture
(`losses.questions`).

Axes: B batch, R noise draws of one sample, L instruction length, C chunk length, A action width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key, PRNGKeyArray

from vla_jax.errors import UserError
from vla_jax.losses.contrastive import contrast, negatives
from vla_jax.losses.flow_matching import Draw, draw, flow_matching
from vla_jax.losses.information import likelihoods, predicted_chunk, read_back, recorded_chunk
from vla_jax.losses.language import mean_over_tokens
from vla_jax.losses.llr import GateState, log_likelihood_ratio
from vla_jax.losses.questions import question_terms
from vla_jax.losses.term import Term, term
from vla_jax.models.expert import Condition
from vla_jax.models.policy import Policy, Reading


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and options of the terms; one that is 0 leaves its term out.

    demonstrations: learn from them; False leaves the questions alone. flow: learn their actions.
    prior_weight: lambda. llr_weight: beta. language_weight: gamma, of -log p(l | v) in the posterior ordering.
    detach_prior: keep the gradient of FM(prior) inside the expert. hard_tokens, gate: see `log_likelihood_ratio`.
    reader_weight: of -log p(l | a, v), which teaches the trunk to read the instruction off recorded actions (see
        `losses.information`; the policy needs `read_actions`). reader_noise: at points x_t of the flow, not clean.
    pmi_weight: of log p(l | a, v) - log p(l | v) of the actions at which the policy aims, a mean over tokens.
    words_weight: of -log p(l), the instruction without the picture.
    question_weight: of -log p(answer | picture, question) of the batch's questions, a mean over tokens.
    contrastive_weight: of the action's preference for its own instruction over another one (`losses.contrastive`).
    noise_draws: R, noise and time draws of each sample.
    """

    demonstrations: bool = True
    flow: bool = True
    prior_weight: float = 0.3
    llr_weight: float = 0.1
    language_weight: float = 0.0
    detach_prior: bool = True
    hard_tokens: int = 0
    gate: bool = False
    reader_weight: float = 0.0
    reader_noise: bool = False
    pmi_weight: float = 0.0
    words_weight: float = 0.0
    question_weight: float = 0.0
    contrastive_weight: float = 0.0
    noise_draws: int = 4

    def __post_init__(self):
        if not 0 <= self.prior_weight <= 1:
            raise UserError(f"loss.prior_weight must lie in [0, 1], got {self.prior_weight}")
        if self.noise_draws < 1 or self.hard_tokens < 0:
            raise UserError("loss.noise_draws must be at least 1 and loss.hard_tokens at least 0")
        if self.reader_weight and not self.language_weight:
            raise UserError("loss.reader_weight needs loss.language_weight: log p(l | v) has to be learned as well")
        if self.contrastive_weight and not self.flow:
            raise UserError("loss.contrastive_weight compares errors of the flow: it needs loss.flow")
        if not self.demonstrations and not self.question_weight:
            raise UserError("loss.demonstrations is off and loss.question_weight is 0: there is nothing to learn")
        if self.pmi_weight and not self.reader_weight:
            raise UserError("loss.pmi_weight needs loss.reader_weight: somebody has to learn to read actions")

    @property
    def likelihoods(self) -> tuple[str, ...]:
        """The branches in which the likelihood of the instruction is learned, besides those of the LLR."""
        wanted = {"posterior": self.language_weight, "action": self.reader_weight, "words": self.words_weight}
        return tuple(name for name, weight in wanted.items() if weight)

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that this objective has to read."""
        wanted = {
            "prior": self.flow and self.prior_weight or self.llr_weight,
            "posterior": True,
            "action": self.reader_weight,
            "words": self.words_weight,
            "negative": self.contrastive_weight,
        }
        return tuple(name for name, weight in wanted.items() if weight)


def objective(
    policy: Policy, batch: dict[str, Any], key: PRNGKeyArray, config: LossConfig, gate_state: GateState
) -> tuple[Float[Array, ""], tuple[dict[str, Term], GateState]]:
    """The scalar to minimise, every term of it, and the new gate state.

    batch: images uint8[B, H, W, 3] by view, state float32[B, F] and actions float32[B, C, A] in SI units, action_mask
    bool[B, C, A] (the action is one of the episode, and the dimension one of the robot), tokens int32[B, L], token_mask
    bool[B, L], and, where they have a weight, "questions" (see `losses.questions`). row int32[B], where given: the
    places of the samples in a larger batch of which this is a part; a sample's noise depends on it and on the key
    alone. The loss is the sum of weight x value over the terms.
    """
    terms: dict[str, Term] = {}
    if config.demonstrations:
        terms, gate_state = _demonstration_terms(policy, batch, key, config, gate_state)
    if config.question_weight:
        terms |= question_terms(policy, batch["questions"], config.question_weight)
    loss = sum(part.weight * part.value for part in terms.values() if part.weight)
    return loss, (terms, gate_state)


def _demonstration_terms(
    policy: Policy, batch: dict[str, Any], key: PRNGKeyArray, config: LossConfig, gate_state: GateState
) -> tuple[dict[str, Term], GateState]:
    """Every term that demonstrations carry, and the new gate state."""
    tokens, mask = batch["tokens"], batch["token_mask"]
    actions = policy.normalizer.normalize_action(batch["actions"])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.get("row", jnp.arange(len(actions))))
    *flow_keys, reader_keys, aim_keys = jax.vmap(lambda key: jax.random.split(key, 5), out_axes=1)(keys)
    dimensions = batch["action_mask"].any(1)
    chunk = recorded_chunk(actions, dimensions, reader_keys, config.reader_noise) if config.reader_weight else None
    other, differs = negatives(tokens, mask) if config.contrastive_weight else (None, None)
    readings = policy.encode(batch["images"], tokens, mask, config.branches, chunk, other)
    log_p = {name: likelihoods(policy, readings[name], tokens) for name in config.likelihoods}
    terms = _flow_terms(policy, readings, batch, actions, differs, flow_keys, config) if config.flow else {}
    if config.llr_weight:
        prior, posterior = (policy.word_logits(readings[name].predictors) for name in ("prior", "posterior"))
        llr, gate_state = log_likelihood_ratio(
            prior, posterior, tokens, mask, gate_state, hard_tokens=config.hard_tokens, gate=config.gate
        )
        terms["llr"] = term(llr.ratio, llr.carried, -config.llr_weight)
        terms["llr_prior"] = term(llr.prior, llr.carried)
        terms["llr_posterior"] = term(llr.posterior, llr.carried)
        terms["llr_gate"] = term(llr.gate, llr.carried)
    for branch, name, weight in (
        ("posterior", "language", config.language_weight),
        ("words", "words", config.words_weight),
        ("action", "reader", config.reader_weight),
    ):
        if branch in log_p:
            terms[name] = term(-mean_over_tokens(log_p[branch], mask), mask.any(-1), weight)
    if config.reader_weight:
        gained = jnp.where(mask, log_p["action"] - log_p["posterior"], 0.0).sum(-1)
        terms["information"] = term(gained, mask.any(-1))  # nats an instruction
    if config.pmi_weight:
        condition = policy.condition(readings["posterior"], batch["state"], dimensions)
        aimed = read_back(policy, predicted_chunk(policy, condition, actions, aim_keys), batch, mask)
        ratio = mean_over_tokens(aimed - lax.stop_gradient(log_p["posterior"]), mask)
        terms["pmi"] = term(ratio, mask.any(-1), -config.pmi_weight)
    return terms, gate_state


def _flow_terms(
    policy: Policy,
    readings: dict[str, Reading],
    batch: dict[str, Any],
    actions: Float[Array, "B C A"],
    differs: Bool[Array, " B"] | None,
    keys: list[Key[Array, " B"]],
    config: LossConfig,
) -> dict[str, Term]:
    """The terms of the action side. differs: whether the negative is another instruction, where there are negatives."""
    errors, acts = _flow_errors(policy, readings, batch, actions, keys, config), batch["action_mask"].any((-2, -1))
    terms = {"fm_posterior": term(errors["posterior"], acts, 1 - config.prior_weight)}
    if config.prior_weight:
        terms["fm_prior"] = term(errors["prior"], acts, config.prior_weight)
    if config.contrastive_weight:
        contrasts = contrast(errors["posterior"], errors["negative"])
        terms["contrastive"] = term(contrasts, acts & differs, config.contrastive_weight)
    return terms


def _flow_errors(
    policy: Policy,
    readings: dict[str, Reading],
    batch: dict[str, Any],
    actions: Float[Array, "B C A"],
    keys: list[Key[Array, " B"]],
    config: LossConfig,
) -> dict[str, Float[Array, " B"]]:
    """The flow-matching error of each sample under each branch that the terms need: one call of the expert for all.

    actions: in model units. keys: of the posterior's noise, the prior's, and dropout, for each sample.
    """
    posterior_keys, prior_keys, dropout_keys = keys
    shape = (config.noise_draws, *actions.shape[1:])
    draws = {"posterior": draw(posterior_keys, shape)}
    if config.prior_weight:
        draws["prior"] = draw(prior_keys, shape)
    if config.contrastive_weight:
        draws["negative"] = draws["posterior"]  # only the words differ
    seen = batch["state"], batch["action_mask"].any(1)
    conditions = {name: policy.condition(readings[name], *seen) for name in draws}
    if config.prior_weight and config.detach_prior:
        prior = conditions["prior"]
        conditions["prior"] = prior._replace(context=lax.stop_gradient(prior.context))
    condition: Condition = jax.tree.map(lambda *parts: jnp.concatenate(parts), *conditions.values())
    drawn: Draw = jax.tree.map(lambda *parts: jnp.concatenate(parts), *draws.values())
    dropout = jax.vmap(lambda key: jax.random.split(key, len(draws)), out_axes=1)(dropout_keys).reshape(-1)
    errors = flow_matching(
        lambda x, t: policy.velocity(x, t, condition, dropout),
        jnp.concatenate([actions] * len(draws)),
        jnp.concatenate([batch["action_mask"]] * len(draws)),
        drawn,
    )
    return dict(zip(draws, jnp.split(errors, len(draws)), strict=True))
