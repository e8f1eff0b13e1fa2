"""All settings of a training run."""

import dataclasses

from vla_jax.data.loader import DataConfig
from vla_jax.envs.questions import QuestionConfig
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import EvalConfig
from vla_jax.losses.objective import LossConfig
from vla_jax.models.policy import PolicyConfig
from vla_jax.pretrained.backbone import PretrainedConfig
from vla_jax.training.augment import AugmentConfig
from vla_jax.training.mesh import MeshConfig
from vla_jax.training.optimizer import OptimizerConfig

# What may change when a run is resumed, because no weight depends on it (`steps` moves the end of the schedule), or
# because the data say themselves whether they are the same (`data.directory`, `data.mixture`).
FREE_ON_RESUME = (
    "steps", "arm", "eval.", "log_every", "validate_every", "validation_batches", "eval_every", "checkpoint_every",
    "keep_checkpoints", "data.directory", "data.mixture", "data.threads", "data.workers", "data.prefetch",
    "data.cache_mb", "pretrained.directory", "mesh.", "accumulate",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        data, augment, questions, policy, pretrained, loss, optimizer, eval, mesh: see there. `data.batch_size` is the
            global batch, over all devices and processes.
        init_from: a run from whose vision-language model (`models.policy.LANGUAGE_MODEL`) this one starts; empty: none.
        arm: name of the policy in tables.
        seed: of the first weights and of the noise; the order of the data has its own, `data.seed`.
        steps: updates.
        accumulate: parts of a batch that are computed one after the other, each with 1 / accumulate of the activations'
            memory; the gradient is that of the whole batch.
        log_every: steps between lines of metrics.
        validate_every: steps between held-out losses, each over `validation_batches` batches; 0 is never. A mixture has
            those of each dataset too, over as many.
        eval_every: steps between closed-loop evaluations, with one more after the last step; 0 is never.
        checkpoint_every: steps between checkpoints, with one more after the last step.
        keep_checkpoints: newest checkpoints that are kept.
    """

    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    questions: QuestionConfig = QuestionConfig()
    policy: PolicyConfig = PolicyConfig()
    pretrained: PretrainedConfig = PretrainedConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: str = ""
    arm: str = "policy"
    seed: int = 0
    steps: int = 2000
    accumulate: int = 1
    log_every: int = 50
    validate_every: int = 500
    validation_batches: int = 4
    eval_every: int = 1000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self):
        for name in ("steps", "accumulate", "log_every", "validation_batches", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("seed", "validate_every", "eval_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must not be negative")
        if bool(self.questions.batch_size) != bool(self.loss.question_weight):
            raise UserError("questions.batch_size and loss.question_weight go together: set both, or neither")
        if not self.loss.demonstrations and self.eval_every:
            raise UserError("a run without demonstrations learns no actions to judge: set eval_every = 0")
        if not self.loss.demonstrations and self.augment != AugmentConfig():
            raise UserError("augment changes the pictures of demonstrations: a run without them cannot use it")
        if self.data.chunk != self.policy.chunk:
            raise UserError(f"data.chunk is {self.data.chunk} and policy.chunk is {self.policy.chunk}: set both alike")

        if self.accumulate > 1 and self.loss.gate:
            raise UserError("loss.gate weighs samples by a mean over their batch: it needs accumulate = 1")
        if self.eval_every and self.eval.execute > self.policy.chunk:
            raise UserError(f"eval.execute is {self.eval.execute}, of chunks of {self.policy.chunk} (policy.chunk)")
        self.check_guidance(self.eval.guidance)

    def check_guidance(self, guidance: float | tuple[float, ...] | None) -> None:
        """Raises UserError where a policy so trained is to act by a branch that never learned to."""
        weight = self.loss.prior_weight if self.loss.demonstrations and self.loss.flow else None
        if guidance is None and weight == 1:
            raise UserError(
                f"the posterior branch never learned to act (arm '{self.arm}' has loss.prior_weight 1): set guidance "
                "to 0, the prior branch"
            )
        if guidance is not None and not self.loss.prior_weight:
            raise UserError(
                "guidance starts from the prior branch, which learns to act with loss.prior_weight above 0 alone "
                f"(arm '{self.arm}' has 0): leave it out"
            )

    @property
    def samples(self) -> int:
        """Demonstration steps and questions in a training step, over all processes."""
        return self.data.batch_size * self.loss.demonstrations + self.questions.batch_size


def must_match_on_resume(key: str) -> bool:
    """Whether a dotted key of the configuration has to be the same as when the run began."""
    return not any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_ON_RESUME)
