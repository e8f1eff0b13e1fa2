"""One policy on one dataset. The argument is the arm: what conditions the actions and which losses are on.

python -m experiments.train --config=configs/train.py:bayesianvla --config.data.directory=DATA --workdir=runs/x

DATA is the path that `python -m experiments.collect` prints. All settings: `vla_jax.training.train_config.TrainConfig`.
"""

from ml_collections import ConfigDict

from vla_jax.config import nearest
from vla_jax.envs.questions import PLACE_WORDS
from vla_jax.errors import UserError
from vla_jax.models.policy import LANGUAGE_MODEL


def _loss(prior_weight: float, llr_weight: float, **more) -> dict:
    return {"loss": {"prior_weight": prior_weight, "llr_weight": llr_weight, **more}}


def language_model_rate(factor: float) -> tuple:
    """optimizer.scales under which the language model learns at `factor` of the rate of the rest; 0 freezes it."""
    return ((f"^({'|'.join(LANGUAGE_MODEL)})(/|$)", factor),)


_COTRAINED = {"questions": {"batch_size": 32}, **_loss(0.0, 0.0, question_weight=0.2)}

# An arm is its difference to the defaults. Weights are the paper's: lambda 0.3, beta 0.1.
ARMS = {
    # the expert attends to every trunk token; there are no latent queries
    "baseline": {"policy": {"conditioning": "tokens"}, **_loss(0.0, 0.0)},
    # latent queries alone
    "queries": _loss(0.0, 0.0),
    # + flow matching on the prior branch; what the released code amounts to, since its LLR was zero
    "prior": _loss(0.3, 0.0),
    # + the log-likelihood ratio
    "llr": _loss(0.0, 0.1),
    # the full objective
    "bayesianvla": _loss(0.3, 0.1),
    # the full objective, the prior's gradient let through to the trunk, as in the first release
    "no_detach": _loss(0.3, 0.1, detach_prior=False),
    # the full objective with the options of the released code of February 2026
    "hard_gated": _loss(0.3, 0.1, hard_tokens=16, gate=True),
    # queries, and the control of Tab. 10: an auxiliary language loss log p(l | v)
    "language": _loss(0.0, 0.0, language_weight=0.1),
    # beyond the paper: the policy's actions are to tell the instruction (losses/information.py)
    "information": {
        "policy": {"read_actions": True},
        **_loss(0.3, 0.0, language_weight=0.1, reader_weight=0.1, pmi_weight=0.1),
    },
    # beyond the paper: episodes drawn by p(l) / p(l | v), so that the look tells nothing (vla_jax/data/balance.py);
    # data.weights names the file of experiments.balance
    "balanced": {"data": {"balance": 1.0}, **_loss(0.0, 0.0)},
    # the same with all-token conditioning: are the queries needed?
    "balanced_tokens": {"policy": {"conditioning": "tokens"}, "data": {"balance": 1.0}, **_loss(0.0, 0.0)},
    # the language model goes on answering questions about the table while it learns to act (envs/questions.py)
    "cotrained": {"policy": {"conditioning": "tokens"}, **_COTRAINED},
    # and says where the object is ("x12 y20") after each instruction, before it acts on both: 2 words
    "pointing": {
        "policy": {"conditioning": "tokens", "reasoning": PLACE_WORDS},
        **_COTRAINED,
    },
    # the same through latent queries
    "pointing_queries": {"policy": {"reasoning": PLACE_WORDS}, **_COTRAINED},
    # the actions are conditioned on the two words alone; the language model is frozen, as they have nothing to teach it
    "pointing_only": {
        "policy": {"conditioning": "reasoning", "reasoning": PLACE_WORDS},
        "optimizer": {"scales": language_model_rate(0.0)},
        **_loss(0.0, 0.0),
    },
    # questions and balanced draws
    "balanced_cotrained": {
        "policy": {"conditioning": "tokens"},
        "data": {"balance": 1.0},
        **_COTRAINED,
    },
    # beyond the paper: the action's preference for its own instruction over a swapped one (losses/contrastive.py)
    "contrastive": _loss(0.0, 0.0, contrastive_weight=0.1),
    # never sees the words: trained and driven by the prior branch
    "vision": {**_loss(1.0, 0.0, detach_prior=False), "eval": {"guidance": 0.0}},
}


def get_config(arm: str = "bayesianvla") -> ConfigDict:
    """Settings of experiments.train."""
    if arm not in ARMS:
        raise UserError(f"unknown arm '{arm}'{nearest(arm, list(ARMS))}")
    return ConfigDict({"arm": arm, "steps": 2000, "policy": {}, "loss": {}, **ARMS[arm]})
