"""The test cases on which a policy is judged.

    in_distribution    the training law, on other scenes
    swapped            the same scenes, but the target is one that the look does not name
    all_instructions   every valid command of a scene, scene after scene: a policy deaf to words is right once a target
    new_backgrounds    table colours that training never shows
    held_out_pairs     the target is a colour-shape pair that training never shows; the look names another object
    paraphrases        the scenes and commands of in_distribution in held-out wordings
    blank              the same with no words at all

One seed gives one list of scenes: in_distribution, swapped, paraphrases and blank share scenes case by case, so that
arms and splits can be compared in pairs, and the first cases stay the same when more are asked for. The keys are set
apart from those of any other use of the seed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.envs import language
from vla_jax.envs.bias import BiasConfig, cue_target
from vla_jax.envs.commands import valid_commands
from vla_jax.envs.sampling import DEFAULT_SCENE, SceneConfig, cue_command, sample_command, sample_episode, word
from vla_jax.envs.scene import Command, Scene, take
from vla_jax.envs.tasks import check_family
from vla_jax.errors import UserError
from vla_jax.schema import nearest

SPLITS = (
    "in_distribution",
    "swapped",
    "all_instructions",
    "new_backgrounds",
    "held_out_pairs",
    "paraphrases",
    "blank",
)

_DOMAIN = 0x7E57  # folded into the seed's key, so that test cases never meet the keys of demonstrations


@dataclasses.dataclass(frozen=True)
class Cases:
    """n test cases: scene, command and cue carry a leading axis [n], text holds n instructions."""

    scene: Scene
    command: Command
    cue: Command
    text: list[str]


def make_cases(
    split: str, task_name: str, bias: BiasConfig, seed: int, n: int, config: SceneConfig = DEFAULT_SCENE
) -> Cases:
    """The first n test cases of a split; the same arguments give the same cases.

    Raises:
        UserError: unknown split or family, or n < 1.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{nearest(split, SPLITS)}")
    check_family(task_name)
    if n < 1:
        raise UserError(f"a split needs at least one case, got n = {n}.")
    scene_key, word_key = _keys(seed)
    laws = split == "held_out_pairs", split == "new_backgrounds"
    scene, command, cue = _draw(task_name, bias, config, *laws, scene_key, jnp.arange(n))
    if split == "swapped":
        command, cue = _swap(task_name, bias, word_key, scene)
    elif split == "paraphrases":
        command = _paraphrase(task_name, word_key, scene, command)
    elif split == "all_instructions":
        commands, cues, valid = _every_command(task_name, bias, word_key, scene)
        rows, columns = (index[:n] for index in np.nonzero(np.asarray(valid)))
        scene, command, cue = take(scene, rows), take(commands, (rows, columns)), take(cues, (rows, columns))
    text = [""] * n if split == "blank" else language.instructions(task_name, scene, command)
    return Cases(scene, command, cue, text)


def make_alternatives(
    task_name: str, bias: BiasConfig, seed: int, n: int, config: SceneConfig = DEFAULT_SCENE
) -> tuple[Scene, Command]:
    """The first n scenes of in_distribution [n], each with one worded command a target [n, config.objects].

    Column k asks for the object in slot k; goal and relation are drawn evenly over those that the scene admits for it.

    Raises:
        UserError: unknown family, or n < 1.
    """
    scene = make_cases("in_distribution", task_name, bias, seed, n, config).scene
    return scene, _command_each_target(task_name, config.objects, _keys(seed)[1], scene)


def _keys(seed):
    """Of the scenes, and of the commands and words that a split gives them."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), _DOMAIN))


@functools.partial(jax.jit, static_argnums=range(5))
def _draw(task_name, bias, config, held_out, new_background, key, indices):
    def case(index):
        case_key = jax.random.fold_in(key, index)
        return sample_episode(case_key, task_name, bias, config, held_out=held_out, new_background=new_background)

    return jax.vmap(case)(indices)


def _numbers(key, scene, *shape):
    """Uniform numbers [n, *shape]: row i depends on the key and i alone."""

    def row(index):
        return jax.random.uniform(jax.random.fold_in(key, index), shape)

    return jax.vmap(row)(jnp.arange(len(scene.background)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _swap(task_name, bias, key, scene):
    """A command whose target the look does not name, and the cue: the same deed done to the object that it names.

    Commands whose goal and relation suit the cue's target as well come first, so that going by the look is a deed of
    its own that can be counted.
    """

    def case(uniform, scene):
        commands, valid = valid_commands(task_name, scene)
        named = cue_target(scene, bias)
        same_deed = (commands.goal[:, None] == commands.goal) & (commands.relation[:, None] == commands.relation)
        suits_cue = jnp.any(same_deed & (valid & (commands.target == named)), axis=-1)
        others = valid & (commands.target != named)
        paired = others & suits_cue
        weights = _evenly_by_target(commands, jnp.where(jnp.any(paired), paired, others))
        command = sample_command(uniform[:3], task_name, scene, commands, weights)
        return command, cue_command(uniform[3], task_name, scene, bias, command)

    return jax.vmap(case)(_numbers(key, scene, 4), scene)


@functools.partial(jax.jit, static_argnums=0)
def _paraphrase(task_name, key, scene, command):
    def case(uniform, scene, command):
        return word(uniform, task_name, scene, command, held_out=True)

    return jax.vmap(case)(_numbers(key, scene, 2), scene, command)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _every_command(task_name, bias, key, scene):
    """All M commands of each scene, worded, their cues, and which of them are valid."""
    commands, valid = valid_commands(task_name, scene)

    def case(uniform, scene, command):
        cue = cue_command(uniform[2], task_name, scene, bias, command)
        return word(uniform[:2], task_name, scene, command), cue

    each = jax.vmap(jax.vmap(case, in_axes=(0, None, 0)))
    return *each(_numbers(key, scene, valid.shape[-1], 3), scene, commands), valid


@functools.partial(jax.jit, static_argnums=(0, 1))
def _command_each_target(task_name, targets, key, scene):
    def case(uniform, target, scene):
        commands, valid = valid_commands(task_name, scene)
        return sample_command(uniform, task_name, scene, commands, valid & (commands.target == target))

    each = jax.vmap(jax.vmap(case, in_axes=(0, 0, None)), in_axes=(0, None, 0))
    return each(_numbers(key, scene, targets, 3), jnp.arange(targets), scene)


def _evenly_by_target(commands, chosen):
    """Weights [M]: the same share for each target with a chosen command, split evenly among those commands."""
    per_target = jnp.sum((commands.target[:, None] == commands.target) & chosen, axis=-1)
    return jnp.where(chosen, 1.0 / jnp.maximum(per_target, 1), 0.0)
