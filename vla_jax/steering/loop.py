"""The closed loop around the sampler: reward normalisation, adaptive strength, and when to change the stage.

VLS (arXiv 2602.03973), section 4. Where the paper and its code disagree, the sound reading is the default: the paper's
eq. 10 as printed lets the strength grow with progress, against its own text; the code's (here) lets it fall.

Axes: T poses of a path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.errors import UserError
from vla_jax.steering import program as programs
from vla_jax.steering.program import Program
from vla_jax.steering.terms import View

QUIET, GRIPPER, RISE, FALL = range(4)  # what may call the switcher: nothing, or one of these
TRIGGERS = ("nothing", "the gripper changed", "the reward rose", "the reward fell")
MEASURES = ("achieved", "predicted")
LIMIT = 1.2  # of the normalised reward
UNSET = 1e-6  # a base nearer to zero than this normalises nothing: 1 mm, squared
AWAY = -1e-3  # 3 cm, squared


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How strength and stages follow the reward.

    Attributes:
        measure: what decides about stages. "achieved": the reward of standing still where the hand is, against that
            at the stage's begin. "predicted" (the released code): that of the last chunk, against that of the stage's
            first chunk, which leaves a stage when its end is planned and not when it is reached.
        adaptive: strength sigmoid(-slope (r - offset)) of the normalised reward r; False: always 1.
        slope, offset: 25 and 0.75 in the released configuration.
        high, low: of the Schmitt trigger on r; 0.8 and 0.6 in the released code. For a reward that is a squared
            distance 0.8 is reached with 45 % of the way to go, 0.97 with 17 %: hence these defaults, and the offset.
    """

    measure: str = "achieved"
    adaptive: bool = True
    slope: float = 25.0
    offset: float = 0.95
    high: float = 0.97
    low: float = 0.9

    def __post_init__(self):
        if self.measure not in MEASURES:
            raise UserError(f"loop.measure must be one of {', '.join(MEASURES)}, got {self.measure!r}")
        if not 0 < self.low < self.high < LIMIT:
            raise UserError(f"the trigger needs 0 < low < high < {LIMIT}, got {self.low} and {self.high}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """What is remembered from chunk to chunk."""

    stage: Int[Array, ""]
    guided: Bool[Array, ""]
    base: Float[Array, ""]  # reward that counts as no progress; 0: not known yet
    progress: Float[Array, ""]  # the normalised reward at the last look
    predicted: Float[Array, ""]  # reward of the last chunk
    closed: Bool[Array, ""]  # the gripper was told to close
    calls: Int[Array, ""]  # of the switcher
    finite: Bool[Array, ""]  # no reward so far was infinite or not a number


def begin() -> LoopState:
    """Stage 0, guided, nothing known."""
    zero, integer = jnp.float32(0), jnp.int32(0)
    return LoopState(integer, jnp.bool_(True), zero, zero, zero, jnp.bool_(False), integer, jnp.bool_(True))


def normalize(reward: Float[Array, "*B"], base: Float[Array, ""]) -> Float[Array, "*B"]:
    """r = clip(1 - R / R_base, 0, 1.2); 0 while there is no base below zero."""
    known = base < -UNSET
    return jnp.where(known, jnp.clip(1 - reward / jnp.where(known, base, -1.0), 0.0, LIMIT), 0.0)


def _base(reward: Float[Array, ""]) -> Float[Array, ""]:
    """R_base of a stage that begins with this reward. One that begins at its goal is judged as if it had begun at AWAY,
    so that it has been reached. A reward of exactly 0 is none to measure by: its terms ask for nothing here."""
    return jnp.where((reward > -UNSET) & (reward < 0), AWAY, reward)


def strength(config: LoopConfig, state: LoopState) -> Callable[[Float[Array, "*B"]], Float[Array, "*B"]]:
    """The multiplier of the guidance, from the rewards of the samples that are being guided."""

    def of(reward):
        if not config.adaptive:
            return jnp.ones_like(reward) * state.guided
        return jax.nn.sigmoid(-config.slope * (normalize(reward, state.base) - config.offset)) * state.guided

    return of


Switcher = Callable[[Int[Array, ""], LoopState, int], tuple[Int[Array, ""], Bool[Array, ""]]]
"""(trigger, state, number of stages) -> (stage, guided)."""


def deterministic(trigger: Int[Array, ""], state: LoopState, stages: int) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """The next stage after what ends this one, a gripper change or a rise (eq. 11); in the last stage it ends the
    guidance, and a fall takes it up again."""
    last = state.stage >= stages - 1
    step = (trigger == GRIPPER) | (trigger == RISE)
    stage = jnp.where(step & ~last, state.stage + 1, state.stage)
    guided = jnp.where(step & last, False, jnp.where(trigger == QUIET, state.guided, True))
    return stage, guided


def look(
    config: LoopConfig,
    state: LoopState,
    program: Program,
    view: View,
    tcp: Float[Array, " 3"],
    closed: Bool[Array, ""],
    switcher: Switcher = deterministic,
) -> LoopState:
    """Before a chunk is sampled: measures progress, looks for a trigger, and asks the switcher when there is one. A
    rise or a gripper change that does not end the present stage triggers nothing; a fall always does.

    tcp: where the end effector is (metres). closed: what the gripper was last told.
    """

    def standing(stage):
        return program.reward(view, jnp.broadcast_to(tcp, (2, 3)), stage)

    reward = standing(state.stage) if config.measure == "achieved" else state.predicted
    if config.measure == "achieved":
        state = dataclasses.replace(state, base=jnp.where(state.base == 0, _base(reward), state.base))
    progress = normalize(reward, state.base)
    rise = (progress >= config.high) & (state.progress < config.high) & program.ends(state.stage, programs.REWARD)
    fall = (progress <= config.low) & (state.progress > config.low)
    grip = (closed != state.closed) & program.ends(state.stage, programs.GRIPPER)
    # After the last stage has ended there is nothing left that the gripper could end, only guidance to be taken up.
    over = (state.stage == len(program.stages) - 1) & ~state.guided
    trigger = jnp.where(grip & ~(fall & over), GRIPPER, jnp.where(rise, RISE, jnp.where(fall, FALL, QUIET)))
    stage, guided = switcher(trigger, state, len(program.stages))
    changed = stage != state.stage
    fresh = _base(standing(stage)) if config.measure == "achieved" else jnp.float32(0)
    return dataclasses.replace(
        state,
        stage=stage,
        guided=guided,
        base=jnp.where(changed, fresh, state.base),
        progress=jnp.where(changed, 0.0, progress),
        closed=closed,
        calls=state.calls + (trigger != QUIET),
        finite=state.finite & jnp.isfinite(reward),
    )


def remember(config: LoopConfig, state: LoopState, reward: Float[Array, ""]) -> LoopState:
    """After a chunk was sampled: its reward, which by "predicted" is the base if it is the stage's first."""
    base = jnp.where(state.base == 0, _base(reward), state.base) if config.measure == "predicted" else state.base
    return dataclasses.replace(state, base=base, predicted=reward, finite=state.finite & jnp.isfinite(reward))
