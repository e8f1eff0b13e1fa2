"""A language model of what is asked for in some demonstrations: with the picture, log p(l | v), and without, log p(l).

python -m experiments.balance --config.data.directory=DATA --config.init_from=runs/grounding --workdir=runs/balance
"""

from ml_collections import ConfigDict

from configs import grounding


def get_config() -> ConfigDict:
    """Settings of experiments.balance."""
    config = grounding.get_config()
    config.arm, config.steps = "balance", 500
    config.questions.batch_size = 0
    config.loss = {
        "flow": False,
        "prior_weight": 0.0,
        "llr_weight": 0.0,
        "language_weight": 1.0,
        "words_weight": 1.0,
    }
    config.optimizer = {"learning_rate": 1e-3, "warmup_steps": 50, "ema_decay": 0.99}
    return config
