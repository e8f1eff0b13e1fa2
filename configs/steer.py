"""Steering frozen policies on shifted scenes: every arm on the same scenes.

python -m experiments.steer --config=configs/steer.py --policy=RUN[,RUN2,…] --workdir=runs/steer

RUN is the --workdir of a training on the task "reach" (that of configs/steering/reach.json). Expected, written before
any run: on swapped instructions, where the policy goes by the look, the gradient lifts success by 30 points or more
over the base and lies above best-of-N, since hardly any of the policy's own samples goes to the named object; a random
direction of the same norm changes nothing; a wrong target takes the hand there; on unseen places the gradient helps
less, as the policy knows no way there.

Of `reward_only`, which came later, expected before its first run: success within 10 points of the gradient's on swapped
instructions and not below it on moved targets, since the reward of a reach says all there is to say; a policy adds only
what its reward leaves out, and that is nothing here.
A look at eight scenes then showed that without the policy unit steps of 20 / 10 swing across the target, chunk after
chunk. So its weight is chosen as the gradient's was, among 2, 5, 10 and 20 on 40 swapped scenes of seed 1000, and what
is expected above is expected of that weight; of 20 less than half of the gradient's success.

Of the shift "obstacle", which came later, expected before its first run; a success counts where nothing was touched.
Without `avoid` (configs/steering/reach.json) no arm gets past the post: base and gradient below 10 %, though the
gradient reaches its target in 80 % or more, post or no post. With `avoid` (configs/steering/reach_around.json, radius
and weight chosen on 40 scenes of seed 1000) the gradient gains 40 points or more over the gradient without; best-of-N
stays below 20 %, since hardly any of the policy's own samples goes round; `full` lies above one guided particle, which
can get stuck before the post, where the way left and the way right are equally good. Random and wrong target: none.

Of a pointer, which came later, expected before its first run, with a policy that follows 32 % of swapped instructions
(the study's `baseline`, rho = .1) and its own stage 0, which points within one cell in 87 % of in-distribution and 74 %
of swapped instructions: the gradient reaches 65 % on swapped instructions and 5 points less than the policy alone in
distribution, where it follows the pointer to a wrong object. Of a pointer that learned for 12 000 steps more and points
within one cell in 87 %, after that: within 2 points in distribution; with repulsion and selection among 16 particles,
the best of 6 settings on 100 scenes of seed 1000, 3 points more than one particle on either split.
Of the same on two other policies, the study's `baseline` with seed 1 and with rho = .02 (seed 0): on swapped
instructions 75 % or more and 40 points or more over the base, in distribution within 4 points of it.

Of picking, expected before its first run, with a policy of front and wrist camera, no stage 0, rho = .1, that picks
nothing on swapped instructions: with a program that holds the hand over the object and leaves the way down and the
grasp to the policy, half as many scenes with the simulator's masks as the policy picks in distribution; best-of-N below
a quarter of that; without the policy none, since no term closes the hand.
A look at 40 scenes of seed 1000 then showed (policy after 4000 of 12 000 steps; 4 scenes) that this policy does not go
down where it would not have gone by itself. So configs/steering/pick.json guides the hand down too, until the policy
closes it, with lambda 10 and a look after every action: the best of some 15 settings on 60 scenes of seed 1000, the
trained policy's 49 in distribution and 0 swapped becoming 45 and 40, by a pointer (6000 steps more on questions about
picking) 41 and 38. Expected of 300 other scenes: 65 % on swapped instructions with masks and 60 % with the pointer, 5
and 13 points lost in distribution; random, wrong target and without the policy none; best-of-N below 10 %.

Other settings: `vla_jax.steering.study.SteerStudyConfig`, as --config.study.scenes=100.
"""

from ml_collections import ConfigDict

from vla_jax.config import nearest
from vla_jax.errors import UserError

KINDS = ("composed", "pointing", "picking")


def get_config(kind: str = "") -> ConfigDict:
    """Settings of experiments.steer. kind: "composed" chains prior/posterior extrapolation and real-time chunking
    before the steering, for policies trained with loss.prior_weight above 0; "pointing" is what `--pointer=RUN` is
    for; "picking" is for policies of the task "pick", with or without it."""
    config = ConfigDict({"writer": {"kind": "stored", "path": "configs/steering/reach.json"}, "study": {"steer": {}}})
    if kind not in ("", *KINDS):
        raise UserError(f"unknown kind '{kind}'{nearest(kind, list(KINDS))}")
    if kind == "composed":
        config.study.execute = 2  # some of a chunk must be left to continue
        config.study.arms = ("base", "gradient", "full")
        config.study.steer = {"extrapolate": 2.0, "continued": True}
    if kind == "pointing":
        config.study.shifts = ("in_distribution", "swapped")
        config.study.arms = ("base", "best_of_n", "gradient", "gradient_repel")
    if kind == "picking":
        config.writer.path = "configs/steering/pick.json"
        config.study.shifts = ("in_distribution", "swapped")
        config.study.arms = ("base", "gradient")
        config.study.guide = 10.0
        config.study.execute = 1
        config.study.steer = {"loop": {"high": 0.99}}
    return config
