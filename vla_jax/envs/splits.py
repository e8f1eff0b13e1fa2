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
import difflib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.envs import language
from vla_jax.envs.bias import BiasConfig, cue_target
from vla_jax.envs.commands import check_family, valid_commands
from vla_jax.envs.sampling import DEFAULT_SCENE, SceneConfig, cue_command, sample_command, sample_episode, word
from vla_jax.envs.scene import Command, Scene, take
from vla_jax.errors import UserError

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
        nearest = difflib.get_close_matches(str(split), SPLITS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown split {split!r}; did you mean {nearest!r}? Splits: {', '.join(SPLITS)}.")
    check_family(task_name)
    if n < 1:
        raise UserError(f"a split needs at least one case, got n = {n}.")
    if split == "all_instructions":
        scene, command, cue = _every_command(task_name, bias, seed, n, config)
    else:
        scene, command, cue = _draw(split, task_name, bias, config, _keys(seed, n))
    if split == "blank":
        return Cases(scene, command, cue, [""] * n)
    return Cases(scene, command, cue, language.instructions(task_name, scene, command))


def _keys(seed, n):
    key = jax.random.fold_in(jax.random.key(seed), _DOMAIN)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(n))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(split, task_name, bias, config, keys):
    draw = functools.partial(
        sample_episode,
        task_name=task_name,
        bias=bias,
        config=config,
        held_out=split == "held_out_pairs",
        new_background=split == "new_backgrounds",
    )

    def case(key):
        scene, command, cue = draw(key)
        other_key = jax.random.fold_in(key, 1)
        if split == "swapped":
            command, cue = _swap(other_key, task_name, scene, bias)
        elif split == "paraphrases":
            template = jax.random.randint(other_key, (), *language.template_range(task_name, held_out=True))
            command = dataclasses.replace(command, template=template)
        return scene, command, cue

    return jax.vmap(case)(keys)


def _swap(key, task_name, scene, bias):
    """A command whose target the look does not name, and the cue: the same deed done to the object that it names.

    Commands whose goal and relation suit the cue's target as well come first, so that going by the look is a deed of
    its own that can be counted.
    """
    commands, valid = valid_commands(task_name, scene)
    named = cue_target(scene, bias)
    same_deed = (commands.goal[:, None] == commands.goal) & (commands.relation[:, None] == commands.relation)
    suits_cue = jnp.any(same_deed & (valid & (commands.target == named)), axis=-1)
    others = valid & (commands.target != named)
    paired = others & suits_cue
    command_key, cue_key = jax.random.split(key)
    chosen = jnp.where(jnp.any(paired), paired, others)
    command = sample_command(command_key, task_name, scene, commands, _evenly_by_target(commands, chosen))
    return command, cue_command(cue_key, task_name, scene, bias, command)


def _evenly_by_target(commands, chosen):
    """Weights [M]: the same share for each target with a chosen command, split evenly among those commands."""
    per_target = jnp.sum((commands.target[:, None] == commands.target) & chosen, axis=-1)
    return jnp.where(chosen, 1.0 / jnp.maximum(per_target, 1), 0.0)


def _every_command(task_name, bias, seed, n, config):
    """The valid commands of one scene after another, n in all; every scene has at least two."""
    scenes, commands, cues, valid = _draw_every(task_name, bias, config, _keys(seed, (n + 1) // 2))
    rows, columns = (index[:n] for index in np.nonzero(np.asarray(valid)))
    return take(scenes, rows), take(commands, (rows, columns)), take(cues, (rows, columns))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw_every(task_name, bias, config, keys):
    def scene_cases(key):
        scene, _, _ = sample_episode(key, task_name, bias, config)
        commands, valid = valid_commands(task_name, scene)

        def case(index, command):
            word_key, cue_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), index))
            return (
                word(word_key, task_name, scene, command),
                cue_command(cue_key, task_name, scene, bias, command),
            )

        worded, cues = jax.vmap(case)(jnp.arange(len(valid)), commands)
        return scene, worded, cues, valid

    return jax.vmap(scene_cases)(keys)
