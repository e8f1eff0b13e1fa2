"""Answers to questions about the picture: the language model's own job, before and beside acting.

Axes: B questions, L tokens.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.losses.language import mean_over_tokens, token_log_likelihood
from vla_jax.losses.term import Term, term
from vla_jax.models.policy import Policy


def answer_likelihood(policy: Policy, questions: dict[str, Any]) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """log p(answer | picture, question), a mean over the answer's tokens, and whether the greedy answer is right.

    questions: images, tokens int32[B, L] (question, then answer), token_mask bool[B, L], answer_mask bool[B, L].
    """
    tokens, answer = questions["tokens"], questions["answer_mask"]
    reading = policy.read(questions["images"], tokens, questions["token_mask"])["posterior"]
    logits = policy.word_logits(reading.predictors)
    # If every token of the answer is the most likely one after those before it, greedy decoding says the answer.
    right = ((logits.argmax(-1) == tokens) | ~answer).all(-1)
    return mean_over_tokens(token_log_likelihood(logits, tokens), answer), right


def question_terms(policy: Policy, questions: dict[str, Any], weight: float) -> dict[str, Term]:
    """The loss of the answers, and the share of questions that are answered rightly."""
    likelihood, right = answer_likelihood(policy, questions)
    answered = questions["answer_mask"].any(-1)
    return {
        "questions": term(-likelihood, answered, weight),
        "questions_right": term(right.astype(jnp.float32), answered),
    }
