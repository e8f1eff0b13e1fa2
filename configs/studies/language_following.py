"""Does it follow the words? Every arm on the quickstart's table, over rho and seeds.

python -m experiments.study --config=configs/studies/language_following.py --workdir=runs/language_following

Expected signs, written before any run: on swapped instructions the baseline stays near 0 at rho <= .1 and climbs with
rho; `vision` is at 0 everywhere by construction; `unbiased` follows; `prior`, `llr` and `bayesianvla` lie between
`queries` and `unbiased` if the paper is right, and at `queries` if it is not.
"""

from ml_collections import ConfigDict

from configs import quickstart, train

UNBIASED = "unbiased"  # latent queries on demonstrations without a shortcut


def get_config() -> ConfigDict:
    """Settings of experiments.study."""
    arms = {name: quickstart.arm(name) for name in train.ARMS}
    arms[UNBIASED] = quickstart.arm("queries")
    for arm in arms.values():
        arm.steps = 6000
        arm.optimizer.warmup_steps = 300
    return ConfigDict(
        {
            "collect": quickstart.get_config().collect,
            "arms": arms,
            "unbiased": (UNBIASED,),
            "couplings": ("uniqueness",),
            "rhos": (0.02, 0.1, 0.3),
            "seeds": 3,
        }
    )
