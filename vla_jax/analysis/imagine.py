"""What a policy would do in one scene under one instruction and another.

Axis legend: K instructions, T control ticks, H x W picture (pixels), L instruction length, C chunk length, A action
width.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from vla_jax.data import tokenizer as tokenizers
from vla_jax.data.contract import Contract
from vla_jax.envs import language
from vla_jax.envs.camera import Camera, project
from vla_jax.envs.commands import valid_commands
from vla_jax.envs.demonstrate import demonstrate
from vla_jax.envs.env import Tabletop
from vla_jax.envs.scene import COLORS, NUM_SLOTS, SHAPES, VIEWS, ZONES, Command, Scene
from vla_jax.envs.splits import Cases, make_cases
from vla_jax.envs.views import cameras_of, observe_images, observe_pictures
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import EvalConfig, World
from vla_jax.evaluation.rollout import Outcome, Recording, Trials, concatenate, in_batches, make_rollout, take_rows
from vla_jax.models.policy import Policy
from vla_jax.models.reasoning import reasoned


@dataclasses.dataclass(frozen=True)
class Imagined:
    """One scene, seen from the front, and where the gripper went under each instruction."""

    picture: UInt8[np.ndarray, "H W 3"]
    texts: list[str]
    ended_at: list[str]  # the object that was nearest in the end
    cue: str  # the object that the look of the scene suggests
    path: Float[np.ndarray, "K T 3"]  # tool point, metres; stays where it is when the episode is over
    pixels: Float[np.ndarray, "K T 2"]  # the same in the picture: column, row


@dataclasses.dataclass(frozen=True)
class Start:
    """What the policy sees when a case begins, and what is to be seen there."""

    observation: dict[str, Any]  # as in `Policy.act`, B = 1
    names: list[str]  # of the things: objects, and goal zones where there are some
    things: dict[str, Int[np.ndarray, "H W"]]  # a view's pixels: number of the thing that they show, or -1
    cue: str  # the object that the look of the scene suggests


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
        return language.instructions(self.world.env.task, *self._commands(number))

    def demonstrated(self, number: int, chunk: int) -> Float[np.ndarray, "K C A"]:
        """The first actions of the scripted expert under each of `instructions(number)`; SI units."""
        scenes, commands = self._commands(number)
        done = demonstrate(self.env, scenes, commands, commands, jax.random.key(0), noise=0.0)
        return np.swapaxes(done.actions[:chunk], 0, 1)

    def _commands(self, number: int) -> tuple[Scene, Command]:
        """The plainest command for each object that can be commanded, and the scene as often."""
        scene = self.case(number).scene
        commands, valid = valid_commands(self.world.env.task, scene)
        commands, valid = take_rows(commands, 0), np.asarray(valid)[0]
        _, first = np.unique(np.where(valid, commands.target, -1), return_index=True)
        chosen = [index for index in first if valid[index]]
        scenes = take_rows(scene, np.zeros(len(chosen), int))
        return scenes, take_rows(commands, np.array(chosen))

    def start(self, number: int) -> Start:
        """The first moment of a case, as the policy sees it."""
        case = self.case(number)
        observation, segments = jax.device_get(self._observe(case.scene, case.command, case.cue))
        names = {
            f"object{slot}": object_name(case.scene, slot) for slot in np.flatnonzero(np.asarray(case.scene.present)[0])
        }
        names |= {f"zone{zone}": ZONES[zone] for zone in np.flatnonzero(np.asarray(case.scene.zone_present)[0])}
        numbers = np.full(self.env.model.ngeom + 1, -1)  # a segment is -1 in the sky
        for thing, geom in enumerate(names):
            numbers[self.env.model.geom(geom).id] = thing
        things = {view: numbers[segment] for view, segment in segments.items()}
        return Start(observation, list(names.values()), things, object_name(case.scene, case.cue.target[0]))

    def __call__(
        self,
        policy: nnx.Module,
        number: int,
        texts: Sequence[str] = (),
        size: int = 256,
        guidance: float | None = None,
    ) -> Imagined:
        """Runs the case once under each text, with the same noise.

        Args:
            policy: of this contract.
            number: of the case.
            texts: instructions; by default `instructions(number)`.
            size: of the picture, pixels.
            guidance: w of `Policy.act`: 0 is the prior branch, 1 the posterior. By default the policy acts as it is
                judged (`EvalConfig.guidance`).

        Raises:
            UserError: a word that the policy does not know.
        """
        texts = list(texts) or self.instructions(number)
        case = self.case(number)
        outcome, recording = self._roll_out(policy, case, texts, self.config.guidance if guidance is None else guidance)
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

    def _roll_out(
        self, policy: nnx.Module, case: Cases, texts: list[str], guidance: float | None
    ) -> tuple[Outcome, Recording]:
        same = np.zeros(len(texts), int)
        parts = (take_rows(part, same) for part in (case.scene, case.command, case.cue))
        trials = Trials(*parts, *self.contract.encode(texts), same)
        graphdef, weights = nnx.split(policy)
        key = jax.random.key(self.config.seed)
        return concatenate(list(in_batches(self._run, graphdef, weights, trials, key, NUM_SLOTS, guidance)))

    @functools.partial(jax.jit, static_argnums=0)
    def _observe(self, scene: Scene, command: Command, cue: Command) -> tuple[dict[str, Any], dict[str, Array]]:
        """The observation at the start of a case, and the geom that each pixel of each view shows."""
        start = self.env.reset(scene, command, cue)
        pictures = observe_pictures(self.env.model, start.bodies, scene, self.world.env.image_size)
        return self.env.observe(start), {view: picture.segment[0] for view, picture in pictures.items()}

    @functools.partial(jax.jit, static_argnums=(0, 4))
    def _look(self, scene: Scene, command: Command, cue: Command, size: int) -> tuple[UInt8[Array, "H W 3"], Camera]:
        """The front picture at the start of a case, and the camera that took it."""
        start = self.env.reset(scene, command, cue)
        camera = jax.tree.map(
            lambda leaf: leaf[0, VIEWS.index("front")], cameras_of(self.env.model, start.bodies, scene)
        )
        return observe_images(self.env.model, start.bodies, scene, size)["front"][0], camera


def with_reasoning(policy: Policy, contract: Contract, start: Start, texts: Sequence[str]) -> list[str]:
    """Each instruction and what the policy says to itself after it (`Policy.reason`), at the start of a case.

    Raises:
        UserError: a word that the policy does not know.
    """
    tokens, mask = contract.encode(texts)
    images = {view: np.repeat(image, len(texts), 0) for view, image in start.observation["images"].items()}
    tokens, mask = jax.device_get(reasoned(*nnx.split(policy), images, tokens, mask))
    tokenizer = tokenizers.from_json(contract.tokenizer)
    return [tokenizer.decode(row[there]) for row, there in zip(tokens, mask, strict=True)]


def guidances(policy: Policy, weight: float) -> dict[str, float | None]:
    """The ways in which a policy can act, by name, as `guidance` of `Imagination`: by its posterior branch, by its
    prior and from the one to the other and beyond, as far as `weight`; or, where it has one branch, by that."""
    if policy.queries is None:
        return {"the policy": None}
    return {"posterior branch": 1.0, "prior branch": 0.0, f"guided, w = {weight:g}": weight}


def object_name(scene: Scene, slot: int) -> str:
    """Colour and shape of an object of a single scene, as "red cube"."""
    color, shape = int(np.asarray(scene.color)[0, slot]), int(np.asarray(scene.shape)[0, slot])
    return f"{list(COLORS)[color]} {SHAPES[shape]}"


def hold_at_end(path: Float[np.ndarray, "K T 3"], ticks: Int[np.ndarray, "K"]) -> Float[np.ndarray, "K T 3"]:
    """Paths that stop at the end of their episode."""
    last = np.minimum(np.arange(path.shape[1]), ticks[:, None] - 1)
    return np.take_along_axis(path, last[..., None], axis=1)
