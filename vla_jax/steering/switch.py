"""A vision-language model decides when the stage changes: the switcher of VLS (arXiv 2602.03973), section 4.

It is asked only when something triggered (`loop.look`), at the border of two chunks. Inside a compiled rollout the
question goes through a host callback. Such a callback must not raise, so what goes wrong is kept: `raise_error` says it
when the rollout is over, and until then stage and guidance stay as they are.

Axes: H x W picture.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from vla_jax.errors import UserError
from vla_jax.steering.loop import QUIET, TRIGGERS, LoopState, Switcher
from vla_jax.steering.writer import Request, Writer, find_json


@dataclasses.dataclass(frozen=True)
class Decision:
    """stage: from 0. guided: whether to steer in it. evidence: what the model says it saw."""

    stage: int
    guided: bool
    evidence: str


class VlmSwitcher:
    """Asks `writer`, scene by scene.

    Args:
        writer: see `writer.Writer`.
        instructions: of each scene.
        stages: names of the stages of each scene's program.
        limit: questions an episode; after them nothing changes any more.
    """

    def __init__(self, writer: Writer, instructions: Sequence[str], stages: Sequence[Sequence[str]], limit: int = 10):
        self._writer, self._instructions, self._stages, self._limit = writer, instructions, stages, limit
        self._error: UserError | None = None

    def of(self, scene: Int[Array, ""], picture: UInt8[Array, "H W 3"]) -> Switcher:
        """The switcher of one scene (its number) that now looks like `picture`; traceable, also under vmap."""

        def switch(trigger, state: LoopState, stages: int):
            shapes = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.bool_))
            now = (trigger, state.stage, state.guided, state.calls, scene, picture)
            return jax.pure_callback(self._answer, shapes, *now, vmap_method="sequential")

        return switch

    def ask(self, scene: int, trigger: int, stage: int, picture: UInt8[np.ndarray, "H W 3"]) -> Decision:
        """One question.

        Raises:
            UserError: no reply, or one that is no decision.
        """
        stages = self._stages[scene]
        request = Request(_question(self._instructions[scene], stages, TRIGGERS[trigger], stage), _png(picture))
        return read_decision(self._writer(request), len(stages))

    def raise_error(self) -> None:
        """Raises the first thing that went wrong since the last call, if anything did."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _answer(self, trigger, stage, guided, calls, scene, picture):
        same = np.int32(stage), np.bool_(guided)
        if int(trigger) == QUIET or int(calls) >= self._limit or self._error is not None:
            return same
        try:
            decision = self.ask(int(scene), int(trigger), int(stage), np.asarray(picture))
        except UserError as error:
            self._error = error
            return same
        return np.int32(decision.stage), np.bool_(decision.guided)


def read_decision(reply: str, stages: int) -> Decision:
    """Parses {"stage": 1 .. stages, or 0 when all is done, "guidance": true or false, "evidence": "..."}.

    Raises:
        UserError: anything else.
    """
    value = json.loads(find_json(reply))
    stage, guided = value.get("stage"), value.get("guidance")
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage <= stages:
        raise UserError(f"the stage switcher must answer with a stage from 0 to {stages}, got {stage!r}")
    if not isinstance(guided, bool):
        raise UserError(f"the stage switcher must answer with guidance true or false, got {guided!r}")
    evidence = str(value.get("evidence", ""))
    return Decision(stages - 1, False, evidence) if stage == 0 else Decision(stage - 1, guided, evidence)


def _question(instruction: str, stages: Sequence[str], trigger: str, stage: int) -> str:
    listed = "\n".join(f"{number}: {name}" for number, name in enumerate(stages, 1))
    return f"""You watch a robot arm at a table. Instruction: {instruction}
Stages:
{listed}
It is in stage {stage + 1}. You are asked because {trigger}. Look at the picture: which stage is it in now?
Answer with one JSON object only: {{"stage": number (0: all is done), "guidance": true if the arm still needs to be \
steered in that stage, else false, "evidence": "what you see"}}"""


def _png(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    return data.getvalue()
