"""How a command is said: sentence templates, and the ways to name an object.

A sentence is a template of the family with three slots: {object} (the target), {relation} and {goal}. The first
templates of a family are the training ones, the paraphrases after them are held out; they use only words of the same
family's training templates. An object is named by one of REFERENTS, and only where that name fits no other object of
the scene; the place words need a margin. Left, right, near and far are the robot's.

Axis legend: N object slots, R referents. Functions on strings run on the host.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vla_jax.envs.bias import object_pair
from vla_jax.envs.scene import COLORS, RELATIONS, SHAPES, ZONES, Command, Scene
from vla_jax.envs.tasks import FAMILIES, check_family

REFERENTS = ("color and shape", "color", "shape", "leftmost", "rightmost", "nearest", "farthest")
REFERENT_WEIGHTS = (0.7, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05)  # before those that do not fit are struck out
PLACE_MARGIN = 0.03  # "the leftmost object" must lie at least this much further left than any other (metres)

TRAIN_TEMPLATES = {
    "reach": (
        "reach {object}",
        "touch {object}",
        "move the gripper to {object}",
        "go to {object} and touch it",
    ),
    "push": (
        "push {object} {relation}",
        "slide {object} {relation}",
        "move {object} {relation}",
        "use the gripper to push {object} {relation}",
    ),
    "pick": (
        "pick up {object}",
        "lift {object}",
        "grasp {object} and lift it",
        "take {object} off the table",
    ),
    "place_on": (
        "put {object} {goal}",
        "place {object} {goal}",
        "pick up {object} and put it {goal}",
        "take {object} and place it {goal}",
    ),
    "place_relative": (
        "put {object} {relation} {goal}",
        "place {object} {relation} {goal}",
        "pick up {object} and put it {relation} {goal}",
        "take {object} and place it {relation} {goal}",
    ),
}
PARAPHRASES = {
    "reach": ("go and reach {object}", "move to {object} and touch it"),
    "push": ("use the gripper to slide {object} {relation}", "move the gripper to push {object} {relation}"),
    "pick": ("take {object} and lift it off the table", "grasp and pick up {object}"),
    "place_on": ("pick up {object} and place it {goal}", "take {object} and put it {goal}"),
    "place_relative": ("pick up {object} and place it {relation} {goal}", "take {object} and put it {relation} {goal}"),
}

DIRECTIONS = ("to the left", "to the right", "towards the robot", "away from the robot")  # RELATIONS of a push
ZONE_PHRASES = tuple(f"{preposition} the {zone}" for preposition, zone in zip(("on", "in"), ZONES, strict=True))


def templates(task_name: str) -> tuple[str, ...]:
    """The family's sentences by template number: the training ones, then the held-out paraphrases."""
    check_family(task_name)
    return TRAIN_TEMPLATES[task_name] + PARAPHRASES[task_name]


def template_range(task_name: str, held_out: bool = False) -> tuple[int, int]:
    """First and one past the last template number of the training templates, or of the held-out paraphrases."""
    check_family(task_name)
    trained = len(TRAIN_TEMPLATES[task_name])
    return (trained, len(templates(task_name))) if held_out else (0, trained)


@jax.jit
def fitting_referents(scene: Scene) -> Bool[Array, "*B N R"]:
    """Which of REFERENTS name the object of each slot and no other object of the scene; False for empty slots."""
    if scene.background.ndim:
        return jax.vmap(fitting_referents)(scene)
    present = scene.present
    others = present[None, :] & ~jnp.eye(len(present), dtype=bool)

    def alone(values):  # no other object shares the value
        same = (values[:, None] == values[None, :]) & present[None, :]
        return jnp.sum(same, axis=-1) == 1

    def first(values):  # smallest by the margin
        gap = jnp.where(others, values[None, :] - values[:, None], jnp.inf)
        return jnp.min(gap, axis=-1) >= PLACE_MARGIN

    x, y = scene.position[:, 0], scene.position[:, 1]
    fits = [alone(object_pair(scene)), alone(scene.color), alone(scene.shape), first(-y), first(y), first(x), first(-x)]
    return jnp.stack(fits, axis=-1) & present[:, None]


def referent_distribution(scene: Scene) -> Float[Array, "*B N R"]:
    """p(referent | scene, target): REFERENT_WEIGHTS over those that fit; zero rows where none does."""
    weights = fitting_referents(scene) * jnp.asarray(REFERENT_WEIGHTS)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), min(REFERENT_WEIGHTS))


def wording_entropy(task_name: str, scene: Scene, command: Command) -> Float[Array, "*B"]:
    """H(sentence | scene, target, goal, relation) in nats over the training wordings.

    No two wordings make the same sentence, so H(sentence | scene) is `bias.entropy` plus the mean of this over
    commands.
    """
    by_target = jnp.sum(jax.scipy.special.entr(referent_distribution(scene)), axis=-1)  # [*B, N]
    first, end = template_range(task_name)
    return jnp.take_along_axis(by_target, command.target[..., None], axis=-1)[..., 0] + jnp.log(end - first)


def object_phrase(color: int, shape: int, referent: int = 0) -> str:
    """The name of an object, for instance "the red cube", "the red object", "the cube", "the leftmost object"."""
    name = REFERENTS[referent]
    color_word = f"{list(COLORS)[color]} " if "color" in name else ""
    if "shape" in name:
        return f"the {color_word}{SHAPES[shape]}"
    return f"the {color_word or name + ' '}object"


def sentence(task_name: str, template: int, target: str, relation: int, goal: int, reference: str) -> str:
    """A template with the name of its target, its relation, and its goal: a zone's number or the name of an object."""
    directions = DIRECTIONS if task_name == "push" else RELATIONS
    goal_phrase = ZONE_PHRASES[goal] if task_name == "place_on" else reference
    return templates(task_name)[template].format(object=target, relation=directions[relation], goal=goal_phrase)


def instructions(task_name: str, scene: Scene, command: Command) -> list[str]:
    """The sentences of a batch of scenes and commands (one leading axis).

    Raises:
        UserError: the family is unknown.
        ValueError: a command's referent does not fit its target, so the sentence would be ambiguous.
    """
    check_family(task_name)
    fits = np.asarray(fitting_referents(jax.tree.map(jnp.asarray, scene)))
    scene, command = jax.tree.map(np.asarray, (scene, command))
    sentences = []
    for row, (target, goal, relation, referent, template) in enumerate(
        zip(command.target, command.goal, command.relation, command.referent, command.template, strict=True)
    ):
        if not fits[row, target, referent]:
            raise ValueError(f"row {row}: the referent {REFERENTS[referent]!r} does not single out slot {target}")
        phrase = object_phrase(scene.color[row, target], scene.shape[row, target], referent)
        reference = object_phrase(scene.color[row, goal], scene.shape[row, goal])
        sentences.append(sentence(task_name, template, phrase, relation, goal, reference))
    return sentences


def instruction(task_name: str, scene: Scene, command: Command) -> str:
    """The sentence of one scene and command (no leading axis); see `instructions`."""
    return instructions(task_name, *jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (scene, command)))[0]


@functools.cache
def sentences(task_name: str | None = None) -> tuple[str, ...]:
    """Every sentence, paraphrases included, that the templates of one family, or of all, can make."""
    if task_name is None:
        return tuple(itertools.chain.from_iterable(sentences(family) for family in FAMILIES))
    objects = list(itertools.product(range(len(COLORS)), range(len(SHAPES))))
    names = [(object_phrase(*pair, referent), pair) for referent in range(len(REFERENTS)) for pair in objects]
    all_templates = templates(task_name)
    relations = range(len(RELATIONS)) if "{relation}" in all_templates[0] else (0,)
    goals = range(len(ZONES)) if task_name == "place_on" else (0,)
    references = objects if task_name == "place_relative" else [None]
    made = {}  # a dict keeps the order and drops repeats
    for template, (name, pair), relation, goal, reference in itertools.product(
        range(len(all_templates)), names, relations, goals, references
    ):
        if reference != pair:
            words = object_phrase(*reference) if reference else ""
            made[sentence(task_name, template, name, relation, goal, words)] = None
    return tuple(made)


@functools.cache
def max_words(task_name: str | None = None) -> int:
    """Words of the longest sentence of one family, or of all."""
    return max(len(sentence.split()) for sentence in sentences(task_name))


MAX_WORDS = 14  # words of the longest sentence of any family
