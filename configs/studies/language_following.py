"""Does it follow the words? Every arm on a small table, over rho and seeds, from a language model that knows the table.

python -m experiments.study --config=configs/studies/language_following.py --workdir=runs/language_following

The fast tier: one camera, 3000 steps of 32 samples. Stage 0, `configs/grounding.py`, comes first: without it there is
no language ability to keep or forget, and binding words to objects takes longer to learn than aiming does. Each of the
three seeds has one of its own: two of them differed by 30 points, where most arms differ by fewer than ten.

Expected signs, written before any run: on swapped instructions the baseline stays near 0 at rho <= .1 and climbs with
rho; `vision` is at 0 everywhere by construction; `unbiased` follows; `prior`, `llr` and `bayesianvla` lie between
`queries` and `unbiased` if the paper is right, and at `queries` if it is not; `balanced` comes near `unbiased` as long
as there are enough samples that break the tie (rho = .1: about 270 episodes of 4000; rho = .02: about 50).
Written before the `slow` and `frozen` arms ran, knowing that the others forget every answer of stage 0: they keep it,
follow 20 points more than their counterparts at rho = .1, and aim less well. Before those with another number of
queries (8), lambda (.3) or beta (.1) ran: none differs from `bayesianvla` by more than its seeds do.
Before `much_contrast` ran, knowing that `contrastive` (.1) follows 37.5 % of swapped instructions at rho = .1: 10
points more than that, and less than 2 lost in distribution.
(The word embeddings of the first `slow` and `frozen` cells learned at full rate, by a mistake in the pattern; of these
`frozen` alone ran again.)
Before `pointing` and `pointing_queries` ran, knowing that a co-trained language model points within one of 32 cells of
the named object in 82 % of held-out questions, and that `cotrained` follows 37.0 % of swapped instructions at rho = .1:
65 % on swapped instructions, within 2 points of the baseline in distribution. Before `slow_pointing` and
`frozen_pointing` ran, having seen that `pointing` forgets half of the answers in its first 500 steps, while the actions
begin to learn what to look at: more than `pointing` on swapped instructions; `frozen_pointing` less in distribution.
Before `pointing_only` ran, having seen 43.0 and 87.5 % of `pointing`, and that stage 0 points within one cell in 87 %
of in-distribution and 74 % of swapped instructions: 65 % on swapped instructions and 75 % in distribution.
Before some arms learned for 12 000 steps, having seen that after 3000 not even unbiased data lead to more than 51 %:
the baseline 97 % in distribution and 30 % on swapped instructions, as before; `contrastive` 97 and 50; `balanced` 90
and 60; `pointing` 93 and 55; `unbiased` 85 and 80.
Before the arms that came late ran at rho = .02 and .3, knowing their cells at .1: on swapped instructions `contrastive`
10 points above the baseline at .3 and within 5 of it at .02; `queries` and `llr` within 5 at both, `prior`, `no_detach`
and `language` at most 5 above. Before the salience coupling (the look names the object nearest to the hand; all are in
full colour, so that each is as easy to see as the others) ran at rho = .1: the baseline 93 % in distribution and 45 %
on swapped instructions, `bayesianvla` within 5 of both, `contrastive` 15 above on swapped instructions.
The first `pointing_only` saw the trunk's states at its two words, which have seen the picture; since then, the words as
they are. Before it ran so, knowing that a stage 0 of 20 000 steps points within a cell in 85 to 89 % of all
instructions wherever the hand is: 70 % in distribution and 58 on swapped instructions; in 12 000 steps from the better
stage 0, 90 and 82, and the baseline from there as from the other one, 96 and 40.
Before it ran at rho = .02 (12 000 steps): 88 % in distribution and 80 on swapped instructions; under the salience
coupling as under this one; and on the task "pick", where the two words do not tell how an object is turned: 60 and 55.
Before it ran from a stage 0 of 32 000 steps, which points within a cell in 94 to 96 %, having seen that of its misses
in distribution three in five had wrong words: 91 and 87.
Before the baseline ran from there: 96 and 42.
Before stage 0 went on from there for 16 000 steps with questions for places alone (of which it had half until then),
having seen that of 2048 such answers 93.1 % are within a cell, 1.9 % at another object and 4.1 at none: 97 % within a
cell, `pointing_only` 95 % in distribution and 94 on swapped instructions, the baseline 98 and 68.
Before the two main arms ran from a second stage 0 (seed 1) at rho = .05, .1 and 1, knowing 32.2 and 25.0 % of swapped
instructions from the first at .1: the baseline follows 18, 30 and 50 %, and `bayesianvla` no more than it does.
Before a third stage 0 (seed 2) and a first one trained anew on another machine (seed 0), knowing that the baseline
follows 32 and 2 % from the first two at rho = .1: 15 % from the third and 32 from the one trained anew, whose weights
and questions are those of the first; `bayesianvla` within 8 points of the baseline from both, `contrastive` 12 above.
"""

from ml_collections import ConfigDict

from configs import balance, grounding, quickstart, train
from vla_jax.config import nearest
from vla_jax.errors import UserError

UNBIASED = "unbiased"  # latent queries on demonstrations without a shortcut
SCRATCH = ("scratch", "scratch_bayesianvla")  # the baseline and the paper's method without stage 0
# The language model learns more slowly than the rest: ten times, as in the released code of BayesianVLA, or not at all.
SLOW, FROZEN = ({"optimizer.scales": train.language_model_rate(factor)} for factor in (0.1, 0.0))
# No questions: a frozen model learns nothing from them.
SILENT = {"questions.batch_size": 0, "loss.question_weight": 0.0}
# Arms beyond those of configs/train.py: the arm they differ from, and in what. They run when they are named.
VARIANTS = {
    "slow_baseline": ("baseline", SLOW),
    "slow_bayesianvla": ("bayesianvla", SLOW),
    "frozen": ("baseline", FROZEN),
    "frozen_queries": ("queries", FROZEN),
    "slow_pointing": ("pointing", SLOW),
    "frozen_pointing": ("pointing", FROZEN | SILENT),
    "few_queries": ("bayesianvla", {"policy.queries": 2}),
    "many_queries": ("bayesianvla", {"policy.queries": 32}),
    "little_prior": ("bayesianvla", {"loss.prior_weight": 0.1}),
    "much_prior": ("bayesianvla", {"loss.prior_weight": 0.7}),
    "little_llr": ("bayesianvla", {"loss.llr_weight": 0.02}),
    "much_llr": ("bayesianvla", {"loss.llr_weight": 0.5}),
    "much_contrast": ("contrastive", {"loss.contrastive_weight": 0.5}),
}
SPLITS = ("in_distribution", "swapped", "paraphrases", "held_out_pairs", "blank")


def fast(name: str) -> ConfigDict:
    """An arm that learns to reach within a few minutes on one core, starting from `configs.grounding`."""
    config = train.get_config(name)
    stage0 = grounding.get_config()
    config.policy.update(stage0.policy)
    config.steps = config.checkpoint_every = 3000
    config.eval_every = config.validate_every = 0
    config.data = {**config.get("data", {}), "batch_size": 32}
    config.loss.noise_draws = 2
    config.optimizer = {**config.get("optimizer", {}), "learning_rate": 3e-3, "ema_decay": 0.99}
    config.eval = {**config.get("eval", {}), "splits": SPLITS, "scenes": 200, "videos": 0}
    return config


def get_config(some: str = "") -> ConfigDict:
    """Settings of experiments.study. some: names of the arms that are to be run, as "baseline,frozen"; empty: all
    but the variants."""
    arms = {name: fast(name) for name in train.ARMS}
    arms[UNBIASED] = fast("queries")
    arms |= dict(zip(SCRATCH, (fast("baseline"), fast("bayesianvla")), strict=True))
    names = some.split(",") if some else list(arms)
    for name, (arm, difference) in VARIANTS.items():
        arms[name] = fast(arm)
        arms[name].update_from_flattened_dict(difference)
    for name in names:
        if name not in arms:
            raise UserError(f"unknown arm '{name}'{nearest(name, list(arms))}")
    arms = {name: arms[name] for name in arms if name in names}
    return ConfigDict(
        {
            "collect": quickstart.get_config().collect,
            "grounding": grounding.get_config(),
            "groundings": 3,
            "balance": balance.get_config(),
            "arms": arms,
            "reference": "baseline" if "baseline" in arms else "",
            "unbiased": tuple(name for name in (UNBIASED,) if name in arms),
            "scratch": tuple(name for name in SCRATCH if name in arms),
            "couplings": ("uniqueness",),
            "rhos": (0.02, 0.1, 0.3),
            "seeds": 3,
        }
    )
