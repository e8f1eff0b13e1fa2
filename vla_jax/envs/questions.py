"""Questions about the table, with their answers: what a language model is taught before it acts, and must keep.

    describe                                → a red cube a green ball and a blue cylinder    (from left to right)
    where is the red cube                   → x12 y20                      (its place in the front picture)
    touch the red cube                      → x12 y20                      (the place of what the instruction is about)
    what is at x12 y20                      → a red cube
    is there a red cube                     → yes, no
    is the red cube left of the green ball  → yes, no

Scenes look as in demonstrations, but every object is asked about equally often: the answer follows from the words and
the picture together, never from the look alone. A batch is a function of (world, seed, number).

Axis legend: B questions, N object slots, R referents, L tokens, H x W picture.
"""

import dataclasses
import functools
import operator
import re
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from tokenizers import Tokenizer

from vla_jax.data import tokenizer as tokenizers
from vla_jax.data.contract import Contract
from vla_jax.data.loader import DataConfig, Loader
from vla_jax.envs import language
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.camera import project
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.sampling import SceneConfig, sample_episode
from vla_jax.envs.scene import COLORS, RELATION_VECTORS, RELATIONS, SHAPES, VIEWS, ZONES, Scene
from vla_jax.envs.views import cameras_of, observe_images
from vla_jax.errors import UserError
from vla_jax.schema import nearest

KINDS = ("describe", "where", "point", "what", "exists", "relation")
SHARES = (0.15, 0.2, 0.3, 0.15, 0.1, 0.1)  # of the kinds
PLACE_WORDS = 2  # that name a place
BINS = 32  # places along each side of the picture
RELATION_MARGIN = 0.03  # metres by which "left of" has to hold, or to fail
_DOMAIN = 0x9E57  # folded into the seed's key, so that questions never meet the scenes of demonstrations or tests


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked and what is answered, as words."""

    kind: str
    question: str
    answer: str


def name(color: int, shape: int) -> str:
    """ "a red cube" """
    return f"a {list(COLORS)[color]} {SHAPES[shape]}"


def place(pixel: Float[np.ndarray, "2"]) -> str:
    """The bin of a place in the picture, (column, row) from 0 to 1: "x12 y20"."""
    column, row = np.clip(np.asarray(pixel) * BINS, 0, BINS - 1).astype(int)
    return f"x{column} y{row}"


def middle(answer: str) -> Float[np.ndarray, "2"]:
    """The inverse of `place`: the middle of its bin, or not a number where the answer is no place."""
    found = re.fullmatch(r"x(\d+) y(\d+)", answer)
    return (np.array(found.groups(), float) + 0.5) / BINS if found else np.full(2, np.nan)


def check_places(tokenizer: Tokenizer) -> None:
    """Raises UserError unless every place is PLACE_WORDS tokens of the tokenizer, so that so many of them name one."""
    for number in range(BINS):
        text = f"x{number} y{number}"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) != PLACE_WORDS or tokenizer.decode(ids) != text:
            raise UserError(
                f"the place {text!r} is not {PLACE_WORDS} tokens of this run's words, so it cannot point: use a run "
                "whose words are those of a dataset of the table"
            )


@functools.cache
def sentences() -> tuple[str, ...]:
    """Sentences with every word of questions and answers."""
    names = " ".join(name(color, shape) for color in range(len(COLORS)) for shape in range(len(SHAPES)))
    places = " ".join(f"x{number} y{number}" for number in range(BINS))
    relations = " ".join(RELATIONS)
    return (f"describe {names} and", f"where is the {places}", "what is at", f"is there {relations} yes no")


def ask(
    kind: str,
    task_name: str,
    scene: Scene,
    fits: Bool[np.ndarray, "N R"],
    pixels: Float[np.ndarray, "N 2"],
    rng: np.random.Generator,
) -> Question:
    """One question of a kind about one scene of a task family (NumPy, no leading axis).

    fits: `language.fitting_referents`. pixels: (column, row) of the objects in the front picture, from 0 to 1.
    """
    objects = np.flatnonzero(scene.present)
    target = rng.choice(objects)
    color, shape = scene.color, scene.shape
    if kind == "describe":
        *most, last = (name(color[slot], shape[slot]) for slot in objects[np.argsort(-scene.position[objects, 1])])
        return Question(kind, "describe", f"{' '.join(most)} and {last}")
    if kind in ("where", "point"):
        weights = np.asarray(language.REFERENT_WEIGHTS) * fits[target]
        referent = rng.choice(len(weights), p=weights / weights.sum())
        phrase = language.object_phrase(color[target], shape[target], referent)
        asked = f"where is {phrase}" if kind == "where" else _instruct(task_name, scene, objects, target, phrase, rng)
        return Question(kind, asked, place(pixels[target]))
    if kind == "what":
        return Question(kind, f"what is at {place(pixels[target])}", name(color[target], shape[target]))
    if kind == "exists":
        return _ask_exists(scene, objects, target, rng)
    return _ask_relation(scene, objects, target, rng)


def _instruct(task_name, scene, objects, target, phrase, rng) -> str:
    """A sentence of the family about the target, in a training wording that leaves room for the answer."""
    others = objects[objects != target]
    goal = rng.choice(others) if task_name == "place_relative" else rng.integers(len(ZONES))
    relation = rng.integers(len(RELATIONS))
    reference = language.object_phrase(scene.color[goal], scene.shape[goal])
    wordings = [
        language.sentence(task_name, template, phrase, relation, goal, reference)
        for template in range(*language.template_range(task_name))
    ]
    return rng.choice([text for text in wordings if len(text.split()) + PLACE_WORDS <= language.MAX_WORDS])


def _ask_exists(scene, objects, target, rng) -> Question:
    """About an object that is there, or one that differs from it in colour or shape and is not.

    The latter may be of a held-out pair (`bias.HELD_OUT_PAIRS`), the former never is: "is there a red ball" always has
    the answer "no", and questions about such pairs are about 30 % of all with that answer.
    """
    present = {(int(scene.color[slot]), int(scene.shape[slot])) for slot in objects}
    pair = (int(scene.color[target]), int(scene.shape[target]))
    there = bool(rng.integers(2))
    if not there:
        near = [(color, pair[1]) for color in range(len(COLORS))] + [(pair[0], shape) for shape in range(len(SHAPES))]
        absent = [other for other in near if other not in present]
        pair = absent[rng.integers(len(absent))]
    return Question("exists", f"is there {name(*pair)}", "yes" if there else "no")


def _ask_relation(scene, objects, target, rng) -> Question:
    """About two objects of which the relation, or its opposite, clearly holds."""
    other = rng.choice(objects[objects != target])
    gap = scene.position[target] - scene.position[other]
    along = np.asarray(RELATION_VECTORS) @ gap
    clear = np.flatnonzero(np.abs(along) >= RELATION_MARGIN)
    relation = rng.choice(clear)
    first, second = (language.object_phrase(scene.color[slot], scene.shape[slot]) for slot in (target, other))
    return Question("relation", f"is {first} {RELATIONS[relation]} {second}", "yes" if along[relation] > 0 else "no")


@dataclasses.dataclass(frozen=True)
class QuestionConfig:
    """Questions that go with every batch.

    batch_size: how many (0: none), over all processes. kinds: of `KINDS`, those that are asked, by their `SHARES`.
    seed: of their stream.
    """

    batch_size: int = 0
    kinds: tuple[str, ...] = KINDS
    seed: int = 0

    def __post_init__(self):
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"questions.kinds: unknown kind '{kind}'{nearest(kind, KINDS)}")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise UserError(f"questions.kinds is {self.kinds}: name one kind or more, each once, of {', '.join(KINDS)}")
        for field in ("batch_size", "seed"):
            if getattr(self, field) < 0:
                raise UserError(f"questions.{field} is {getattr(self, field)}: it must not be negative")


class Questioner:
    """Batches of questions about the scenes of one world, in the words of one contract.

    held_out: of another stream, which no training with this seed meets. views: the pictures that are shown. kinds: of
    questions that are asked.
    """

    def __init__(
        self,
        contract: Contract,
        env: EnvConfig,
        bias: BiasConfig,
        scene: SceneConfig,
        seed: int = 0,
        held_out: bool = False,
        views: tuple[str, ...] = VIEWS,
        kinds: tuple[str, ...] = KINDS,
    ):
        self._world, self._views = (env, bias, scene), tuple(views)
        shares = np.array([share if kind in kinds else 0 for kind, share in zip(KINDS, SHARES, strict=True)])
        self._shares = shares / shares.sum()
        self._stream = (seed, int(held_out))
        self.stream = {"seed": seed, "held_out": held_out}  # names what is asked
        self._tokenizer, self._length = tokenizers.from_json(contract.tokenizer), contract.max_tokens

    def __call__(self, number: int, rows: Int[np.ndarray, "B"]) -> dict[str, Any]:
        """Some rows of batch `number`.

        Returns:
            images {view: uint8[B, H, W, 3]}, tokens int32[B, L] (question, then answer), token_mask bool[B, L],
            answer_mask bool[B, L] (True on the answer), kind int32[B] (index into KINDS).

        Raises:
            UserError: the contract's tokenizer does not know the words, or joins question and answer.
        """
        drawn = _draw(*self._world, self._views, np.array(self._stream), number, rows)
        images, pixels, scene, fits = jax.device_get(drawn)
        asked, whole, kinds = [], [], []
        for index, row in enumerate(rows):
            rng = np.random.default_rng((*self._stream, number, row))
            kinds.append(rng.choice(len(KINDS), p=self._shares))
            one = jax.tree.map(operator.itemgetter(index), scene)
            question = ask(KINDS[kinds[-1]], self._world[0].task, one, fits[index], pixels[index], rng)
            asked.append(question.question)
            whole.append(f"{question.question} {question.answer}")
        tokens, mask = tokenizers.encode(self._tokenizer, whole, self._length)
        answer = mask & ~self._begins(asked, whole, tokens)
        kind = np.array(kinds, np.int32)
        return {"images": images, "tokens": tokens, "token_mask": mask, "answer_mask": answer, "kind": kind}

    def _begins(self, asked: list[str], whole: list[str], tokens: Int[np.ndarray, "B L"]) -> Bool[np.ndarray, "B L"]:
        """Which tokens are the question's. A word may be several tokens, so words cannot be counted instead."""
        alone, question = tokenizers.encode(self._tokenizer, asked, self._length)
        for row in np.flatnonzero(((alone != tokens) & question).any(1)):
            raise UserError(
                f"the tokens of {whole[row]!r} do not begin with those of {asked[row]!r}, so the answer cannot be told "
                "from the question: use another tokenizer"
            )
        return question


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(
    config: EnvConfig,
    bias: BiasConfig,
    scene_config: SceneConfig,
    views: tuple[str, ...],
    stream: Int[Array, "2"],
    number: Int[Array, ""],
    rows: Int[Array, "B"],
) -> tuple[dict[str, UInt8[Array, "B H W 3"]], Float[Array, "B N 2"], Scene, Bool[Array, "B N R"]]:
    """Pictures, the objects' places in the front one (from 0 to 1), scenes, and the names that fit their objects."""
    env, root = Tabletop(config), jax.random.key(stream[0])
    for part in (_DOMAIN, stream[1], number):
        root = jax.random.fold_in(root, part)
    draw = functools.partial(sample_episode, task_name=config.task, bias=bias, config=scene_config)
    scene, command, cue = jax.vmap(lambda row: draw(jax.random.fold_in(root, row)))(rows)
    state = env.reset(scene, command, cue)
    cameras = cameras_of(env.model, state.bodies, scene)
    front = jax.tree.map(lambda leaf: leaf[:, VIEWS.index("front")], cameras)
    pixels, _ = jax.vmap(functools.partial(project, height=1, width=1))(front, state.bodies.object_position)
    images = observe_images(env.model, state.bodies, scene, config.image_size, views)
    return images, pixels, scene, language.fitting_referents(scene)


class QuestionStream:
    """A stream of batches with "questions" in them: those of `data` with questions added, or of questions alone.

    It has the interface of `data.loader.Loader`; without `data`, "episode" and "step" name batch and row.
    """

    def __init__(self, ask: Questioner, batch_size: int, data: Any = None, process_index: int = 0, processes: int = 1):
        rows = np.arange(batch_size)[process_index::processes]
        batches = grain.MapDataset.range(2**31 - 1).map(lambda number: {"number": number, **ask(number, rows)})
        stream = {"batch_size": batch_size, **ask.stream}
        self._questions, self._data = Loader(batches, DataConfig(threads=1, prefetch=2), stream), data

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, Any]:
        questions = next(self._questions)
        number, count = questions.pop("number"), len(questions["kind"])
        if self._data is None:
            return {"episode": np.full(count, number), "step": np.arange(count), "questions": questions}
        return {**next(self._data), "questions": questions}

    def get_state(self) -> dict[str, Any]:
        """The position, as a JSON-able dictionary."""
        return {"questions": self._questions.get_state(), "data": self._data and self._data.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position of `get_state`. Raises UserError if it belongs to another stream."""
        self._questions.set_state(state["questions"])
        if self._data is not None:
            self._data.set_state(state["data"])

    def close(self) -> None:
        """Stops reading ahead."""
        self._questions.close()
        if self._data is not None:
            self._data.close()
