"""Steering frozen policies on shifted scenes: every arm on the same scenes.

python -m experiments.steer --config=configs/steer.py --policy=RUN[,RUN2,…] --workdir=runs/steer

RUN is the --workdir of a training on the task "reach" (that of configs/steering/reach.json). Expected, written before
any run: on swapped instructions, where the policy goes by the look, the gradient lifts success by 30 points or more
over the base and lies above best-of-N, since hardly any of the policy's own samples goes to the named object; a random
direction of the same norm changes nothing; a wrong target takes the hand there; on unseen places the gradient helps
less, as the policy knows no way there.

Other settings: `vla_jax.steering.study.SteerStudyConfig`, as --config.study.scenes=100.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Settings of experiments.steer. arg: "composed" chains prior/posterior extrapolation and real-time chunking
    before the steering, for policies with latent queries."""
    config = ConfigDict({"writer": {"kind": "stored", "path": "configs/steering/reach.json"}, "study": {"steer": {}}})
    if arg == "composed":
        config.study.execute = 2  # some of a chunk must be left to continue
        config.study.arms = ("base", "gradient", "full")
        config.study.steer = {"extrapolate": 2.0, "continued": True}
    return config
