"""What a policy would do in one scene under one instruction and another.

Axis legend: K instructions, T control ticks, H x W picture (pixels), N object slots.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from vla_jax.data.contract import Contract
from vla_jax.envs import language
from vla_jax.envs.camera import Camera, project
from vla_jax.envs.commands import valid_commands
from vla_jax.envs.env import Tabletop
from vla_jax.envs.scene import COLORS, NUM_SLOTS, SHAPES, VIEWS, Command, Scene
from vla_jax.envs.splits import Cases, make_cases
from vla_jax.envs.views import cameras_of, observe_images
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import EvalConfig, World
from vla_jax.evaluation.rollout import Outcome, Recording, Trials, concatenate, in_batches, make_rollout, take_rows


@dataclasses.dataclass(frozen=True)
class Imagined:
    """One scene, seen from the front, and where the gripper went under each instruction."""

    picture: UInt8[np.ndarray, "H W 3"]
    texts: list[str]
    ended_at: list[str]  # the object that was nearest in the end
    cue: str  # the object that the look of the scene suggests
    path: Float[np.ndarray, "K T 3"]  # tool point, metres; stays where it is when the episode is over
    pixels: Float[np.ndarray, "K T 2"]  # the same in the picture: column, row


class Imagination:
    """Runs a policy of one contract in single scenes of a split."""

    def __init__(self, contract: Contract, config: EvalConfig | None = None, split: str = "in_distribution"):
        config = config or EvalConfig()
        self.contract, self.config, self.split = contract, config, split
        self.world = World.of(contract, config)
        self.env = Tabletop(self.world.env)
        ticks = self.env.max_ticks
        self._run = make_rollout(
            self.env, execute=config.execute, ticks=ticks, sampler_steps=config.sampler_steps, record=True
        )

    def case(self, number: int) -> Cases:
        """Test case `number` of the split, with a leading axis of 1.

        Raises:
            UserError: a negative number.
        """
        if number < 0:
            raise UserError(f"cases are numbered from 0, not {number}")
        world, count = self.world, max(self.config.scenes, number + 1)
        cases = make_cases(self.split, world.env.task, world.bias, self.config.seed, count, world.scene)
        row = slice(number, number + 1)
        parts = (take_rows(part, row) for part in (cases.scene, cases.command, cases.cue))
        return Cases(*parts, cases.text[row])

    def instructions(self, number: int) -> list[str]:
        """One valid instruction for each object of the case that can be commanded."""
        scene = self.case(number).scene
        commands, valid = valid_commands(self.world.env.task, scene)
        commands, valid = take_rows(commands, 0), np.asarray(valid)[0]
        _, first = np.unique(np.where(valid, commands.target, -1), return_index=True)
        chosen = [index for index in first if valid[index]]
        scenes = take_rows(scene, np.zeros(len(chosen), int))
        return language.instructions(self.world.env.task, scenes, take_rows(commands, np.array(chosen)))

    def __call__(self, policy: nnx.Module, number: int, texts: Sequence[str] = (), size: int = 256) -> Imagined:
        """Runs the case once under each text, with the same noise.

        Args:
            policy: of this contract.
            number: of the case.
            texts: instructions; by default `instructions(number)`.
            size: of the picture, pixels.

        Raises:
            UserError: a word that the policy does not know.
        """
        texts = list(texts) or self.instructions(number)
        case = self.case(number)
        outcome, recording = self._roll_out(policy, case, texts)
        path = hold_at_end(recording.path, outcome.ticks)
        picture, camera = self._look(case.scene, case.command, case.cue, size)
        pixels, _ = project(camera, path, height=size, width=size)
        return Imagined(
            picture=np.asarray(picture),
            texts=texts,
            ended_at=[object_name(case.scene, slot) for slot in outcome.nearest],
            cue=object_name(case.scene, case.cue.target[0]),
            path=path,
            pixels=np.asarray(pixels),
        )

    def _roll_out(self, policy: nnx.Module, case: Cases, texts: list[str]) -> tuple[Outcome, Recording]:
        tokens, mask = self.contract.encode(texts)
        same = np.zeros(len(texts), int)
        parts = (take_rows(part, same) for part in (case.scene, case.command, case.cue))
        trials = Trials(*parts, tokens, mask, same)
        graphdef, weights = nnx.split(policy)
        key = jax.random.key(self.config.seed)
        return concatenate(list(in_batches(self._run, graphdef, weights, trials, key, NUM_SLOTS, self.config.guidance)))

    @functools.partial(jax.jit, static_argnums=(0, 4))
    def _look(self, scene: Scene, command: Command, cue: Command, size: int) -> tuple[UInt8[Array, "H W 3"], Camera]:
        """The front picture at the start of a case, and the camera that took it."""
        start = self.env.reset(scene, command, cue)
        camera = jax.tree.map(
            lambda leaf: leaf[0, VIEWS.index("front")], cameras_of(self.env.model, start.bodies, scene)
        )
        return observe_images(self.env.model, start.bodies, scene, size)["front"][0], camera


def object_name(scene: Scene, slot: int) -> str:
    """Colour and shape of an object of a single scene, as "red cube"."""
    color, shape = int(np.asarray(scene.color)[0, slot]), int(np.asarray(scene.shape)[0, slot])
    return f"{list(COLORS)[color]} {SHAPES[shape]}"


def hold_at_end(path: Float[np.ndarray, "K T 3"], ticks: Int[np.ndarray, "K"]) -> Float[np.ndarray, "K T 3"]:
    """Paths that stop at the end of their episode."""
    last = np.minimum(np.arange(path.shape[1]), ticks[:, None] - 1)
    return np.take_along_axis(path, last[..., None], axis=1)
