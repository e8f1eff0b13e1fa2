"""The dial: how far the look of a scene already tells what will be asked for.

A scene is drawn first and the command second, so that p(command | scene) is a known function of the scene. The look
names one object, the *cue's target*. With n objects that can be commanded and the dial rho in [0, 1],

    p(target | scene) = (1 - rho) [target is the cue's] + rho / n,

and goal and relation are uniform over those that the scene admits for the target: only the target follows from the
look. Every object can be commanded as long as rho > 0, so the target's entropy given the scene has the closed form

    H = -p ln p - (n - 1) q ln q,    q = rho / n,  p = 1 - rho + q,

which is also the ceiling of the information that the action can carry about the words once the picture is known
(BayesianVLA / LangForce, arXiv 2601.15197, Eq. 3).

Couplings (what the look names):
    background   the object whose colour and shape belong to the table's colour; it lies in every such scene.
    salience     the object that lies horizontally nearest to the gripper's start, by a clear margin.
    uniqueness   the one object in full colour; the others, the fixtures, are drawn darker. They are asked for with
                 probability rho / n each, so the mark is visual only and every scene keeps n valid targets.

Two kinds of scene stand outside the coupling:
    A table colour that training never shows says nothing under the background coupling: the target is uniform there.
    The cue's target is then the object that belongs to (background mod NUM_TRAIN_BACKGROUNDS), which such a scene
    holds as well, so the rate at which a policy goes to it is the chance level of going to one given object. A scene
    with a held-out pair asks for that object, whatever the look names (which is never that object).

Axis legend: N object slots, M commands of `commands.valid_commands`. A leading scene axis is mapped over.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.envs.commands import valid_commands
from vla_jax.envs.scene import COLORS, NUM_SLOTS, NUM_TRAIN_BACKGROUNDS, SHAPES, Command, Scene
from vla_jax.errors import UserError
from vla_jax.schema import nearest

COUPLINGS = ("background", "salience", "uniqueness")

# Pairs that no training scene shows. Each of their colours and shapes does occur in training, in other pairs.
HELD_OUT_PAIRS = (("red", "ball"), ("green", "cylinder"), ("blue", "cube"), ("yellow", "ball"))

# The object that belongs to each training background.
BACKGROUND_PAIRS = (
    ("red", "cube"),
    ("green", "ball"),
    ("blue", "cylinder"),
    ("yellow", "cube"),
    ("purple", "ball"),
    ("cyan", "cylinder"),
    ("red", "cylinder"),
    ("blue", "ball"),
)


def pair_index(pairs: tuple[tuple[str, str], ...]) -> Int[Array, "P"]:
    """(colour, shape) names as one number each: color * len(SHAPES) + shape."""
    colors = list(COLORS)
    return jnp.asarray([colors.index(color) * len(SHAPES) + SHAPES.index(shape) for color, shape in pairs], jnp.int32)


def object_pair(scene: Scene) -> Int[Array, "*B N"]:
    """The pair number of each slot's object, in the numbering of `pair_index`; -1 where the slot is empty."""
    return jnp.where(scene.present, jnp.asarray(scene.color) * len(SHAPES) + jnp.asarray(scene.shape), -1)


@dataclasses.dataclass(frozen=True)
class BiasConfig:
    """The coupling between look and target, and how often it is broken.

    Raises:
        UserError: the coupling is unknown, or rho lies outside [0, 1].
    """

    coupling: str = "background"
    rho: float = 0.1  # probability that the target is drawn without regard to the look

    def __post_init__(self):
        if self.coupling not in COUPLINGS:
            raise UserError(f"unknown coupling {self.coupling!r}{nearest(self.coupling, COUPLINGS)}")
        if not 0.0 <= self.rho <= 1.0:
            raise UserError(f"rho is a probability, got {self.rho}; give a number from 0 to 1.")


def held_out_objects(scene: Scene) -> Bool[Array, "*B N"]:
    """Which slots hold an object of a held-out pair."""
    return jnp.isin(object_pair(scene), pair_index(HELD_OUT_PAIRS))


def cue_target(scene: Scene, bias: BiasConfig) -> Int[Array, "*B"]:
    """The slot of the object that the look of the scene names."""
    if bias.coupling == "background":
        named = pair_index(BACKGROUND_PAIRS)[jnp.asarray(scene.background) % NUM_TRAIN_BACKGROUNDS]
        return jnp.argmax(object_pair(scene) == named[..., None], axis=-1)
    if bias.coupling == "salience":
        return jnp.argmin(gripper_distance(scene), axis=-1)
    return jnp.argmax(jnp.asarray(scene.movable) & jnp.asarray(scene.present), axis=-1)


def gripper_distance(scene: Scene) -> Float[Array, "*B N"]:
    """Horizontal distance from the gripper's start to each object (metres); infinite for empty slots."""
    offset = jnp.asarray(scene.position) - jnp.asarray(scene.tcp)[..., None, :2]
    return jnp.where(scene.present, jnp.linalg.norm(offset, axis=-1), jnp.inf)


def command_distribution(task_name: str, scene: Scene, bias: BiasConfig) -> tuple[Command, Float[Array, "*B M"]]:
    """The exact law p(target, goal, relation | scene) by which commands are drawn; see the module's text.

    Returns:
        The commands of `valid_commands` (plain wording) and their probabilities, which sum to 1 over M.
    """
    if jnp.ndim(scene.background):
        return jax.vmap(functools.partial(command_distribution, task_name, bias=bias))(scene)
    commands, valid = valid_commands(task_name, scene)
    count = jnp.zeros(NUM_SLOTS).at[commands.target].add(valid)
    target_probability = _target_law(scene, bias, count > 0)
    return commands, jnp.where(valid, (target_probability / jnp.maximum(count, 1))[commands.target], 0.0)


def _target_law(scene: Scene, bias: BiasConfig, targets: Bool[Array, "N"]) -> Float[Array, "N"]:
    uniform = targets / jnp.sum(targets)
    law = (1 - bias.rho) * jax.nn.one_hot(cue_target(scene, bias), NUM_SLOTS) + bias.rho * uniform
    if bias.coupling == "background":
        law = jnp.where(jnp.asarray(scene.background) < NUM_TRAIN_BACKGROUNDS, law, uniform)
    held_out = held_out_objects(scene)
    return jnp.where(jnp.any(held_out), held_out / jnp.maximum(jnp.sum(held_out), 1), law)


def target_entropy(task_name: str, scene: Scene, bias: BiasConfig) -> Float[Array, "*B"]:
    """H(target | scene) in nats, summed from the law; equals `closed_form_entropy` on training scenes."""
    if jnp.ndim(scene.background):
        return jax.vmap(functools.partial(target_entropy, task_name, bias=bias))(scene)
    commands, probability = command_distribution(task_name, scene, bias)
    return _entropy(jnp.zeros(NUM_SLOTS).at[commands.target].add(probability))


def entropy(task_name: str, scene: Scene, bias: BiasConfig) -> Float[Array, "*B"]:
    """H(target, goal, relation | scene) in nats: what is asked for. `language.wording_entropy` is how it is said."""
    return _entropy(command_distribution(task_name, scene, bias)[1])


def _entropy(probability: Float[Array, "*B M"]) -> Float[Array, "*B"]:
    return jnp.sum(jax.scipy.special.entr(probability), axis=-1)


def closed_form_entropy(n: int, rho: float) -> float:
    """H(target | scene) in nats with n objects that can be commanded: the formula in the module's text."""
    q = rho / n
    p = 1 - rho + q
    return -p * math.log(p) - ((n - 1) * q * math.log(q) if q > 0 else 0.0)
