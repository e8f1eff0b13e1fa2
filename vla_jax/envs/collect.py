"""Collects demonstrations: draws episodes, lets the expert do them, draws the pictures, writes an RLDS dataset.

Failed demonstrations are left out and counted. An episode is a function of (config, seed, attempt number).
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from vla_jax.data import tokenizer as tokenizers
from vla_jax.data.contract import Contract, compute_contract
from vla_jax.data.episode import Episode
from vla_jax.data.interface import Interface
from vla_jax.data.rlds import dataset_path, refuse_existing, write_rlds
from vla_jax.envs import control, language, questions
from vla_jax.envs.bias import BiasConfig, command_distribution, entropy, target_entropy
from vla_jax.envs.demonstrate import Demonstrations, demonstrate
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.sampling import SceneConfig, sample_episode
from vla_jax.envs.scene import VIEWS, Command, Scene
from vla_jax.envs.views import LOOK, observe_images
from vla_jax.errors import UserError

FRAMES_PER_RENDER = 256  # one compiled shape; bounds the memory that pictures take
ACTION_REPRESENTATION = "end-effector translation and turn per tick in the world frame, gripper opening as a target"
_DOMAIN = 0xDE40  # folded into the seed's key, so that demonstrations never meet the keys of test cases
_NOISE = 0x4015E  # folded into a key of `_keys` for the executed noise; no scene is redrawn that often


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """What to collect.

    Attributes:
        episodes: successful demonstrations to keep.
        batch: scenes that the expert does at a time.
        noise: standard deviation of the executed noise, metres per tick (see `demonstrate`).
        seed: of scenes, commands and noise.
        name: of the dataset; empty composes task, embodiment and coupling.
    """

    env: EnvConfig = EnvConfig()
    bias: BiasConfig = BiasConfig()
    scene: SceneConfig = SceneConfig()
    episodes: int = 1000
    batch: int = 128
    noise: float = 0.005
    seed: int = 0
    name: str = ""

    def __post_init__(self):
        for field in ("episodes", "batch"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}: it must be at least 1")

    @property
    def dataset_name(self) -> str:
        """The dataset's name."""
        return self.name or f"{self.env.task}_{self.env.embodiment}_{self.bias.coupling}"


@dataclasses.dataclass
class Tally:
    """What a collection has done so far."""

    attempts: int = 0
    successes: int = 0  # of the attempts, also those beyond the episodes that were asked for
    kept: int = 0
    steps: int = 0
    entropies: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # nats, of the kept episodes


@dataclasses.dataclass(frozen=True)
class Collection:
    """A finished collection."""

    path: Path
    contract: Contract
    tally: Tally

    def summary(self) -> str:
        """What was collected, as text for the terminal."""
        tally, facts = self.tally, self.contract.facts
        failed = tally.attempts - tally.successes
        return "\n".join(
            [
                f"episodes   {tally.kept} ({tally.steps} steps)",
                f"expert     {tally.successes}/{tally.attempts} succeeded, {failed} left out",
                f"entropy    H(instruction | image) = {facts['entropy']:.3f} nats, of the target alone "
                f"{facts['target_entropy']:.3f} ({facts['coupling']} coupling, rho {facts['rho']:g})",
                f"contract   {self.contract.fingerprint[:12]}",
                self.contract.table(),
                f"dataset    {self.path}",
            ]
        )


def collect(config: CollectConfig, workdir: str | Path, progress: bool = True) -> Collection:
    """Writes `workdir/<dataset name>/1.0.0` and computes its contract.

    Raises:
        UserError: the dataset exists, an option is wrong, the expert fails nearly always, or the disk is full.
    """
    name = config.dataset_name
    refuse_existing(dataset_path(workdir, name))
    env = Tabletop(config.env)
    tally = Tally()
    facts: dict[str, Any] = {
        "task": config.env.task,
        "coupling": config.bias.coupling,
        "rho": config.bias.rho,
        "objects": config.scene.objects,
        "noise": config.noise,
        "seed": config.seed,
        "look": LOOK,
    }
    with tqdm(total=config.episodes, unit="episode", desc=name, disable=not progress) as bar:

        def episodes():
            for episode in _episodes(env, config, tally):
                yield episode
                bar.update()
            facts.update({key: float(np.mean(values)) for key, values in tally.entropies.items()})
            facts.update(expert_attempts=tally.attempts, expert_successes=tally.successes)

        path = write_rlds(workdir, name, episodes(), interface_of(config.env), facts)
    return Collection(path, compute_contract(path), tally)


def interface_of(env: EnvConfig) -> Interface:
    """Names, units and sizes of what a Tabletop shows and takes, with a tokenizer for everything that may be
    said, asked and answered."""
    return Interface(
        embodiment=env.embodiment,
        control_hz=float(control.CONTROL_HZ),
        images={view: (env.image_size, env.image_size) for view in VIEWS},
        action_names=control.ACTION_NAMES,
        action_units=control.ACTION_UNITS,
        action_representation=ACTION_REPRESENTATION,
        state_names=control.STATE_NAMES,
        state_units=control.STATE_UNITS,
        max_tokens=language.MAX_WORDS,
        tokenizer=tokenizers.to_json(tokenizers.train_tokenizer((*language.sentences(), *questions.sentences()))),
    )


def _episodes(env: Tabletop, config: CollectConfig, tally: Tally) -> Iterator[Episode]:
    render = functools.partial(_render, env.model, image_size=config.env.image_size)
    while tally.kept < config.episodes:
        first = tally.attempts
        keys = _keys(config.seed, first + np.arange(config.batch))
        scene, command, cue, entropies = _draw(keys, config.env.task, config.bias, config.scene)
        noise_key = jax.random.fold_in(keys[0], _NOISE)
        demonstrations = demonstrate(env, scene, command, cue, noise_key, config.noise)
        tally.attempts += config.batch
        tally.successes += int(demonstrations.success.sum())
        if tally.successes < 0.05 * tally.attempts:
            raise UserError(
                f"the expert succeeded in {tally.successes} of {tally.attempts} attempts at {config.env.task!r}: "
                "lower --config.noise or give it more time with --config.env.max_ticks"
            )
        kept = np.flatnonzero(demonstrations.success)[: config.episodes - tally.kept]
        texts = language.instructions(config.env.task, scene, command)
        scene, command, cue, entropies = jax.device_get((scene, command, cue, entropies))
        for row, images in zip(kept, _pictures(render, demonstrations, scene, kept), strict=True):
            length = int(demonstrations.length[row])
            tally.kept += 1
            tally.steps += length
            for key, values in entropies.items():
                tally.entropies.setdefault(key, []).append(float(values[row]))
            yield Episode(
                images=images,
                state=demonstrations.state[:length, row],
                actions=demonstrations.actions[:length, row],
                instruction=texts[row],
                success=True,
                metadata={
                    "task": config.env.task,
                    "seed": config.seed,
                    "attempt": first + int(row),
                    **_integers(_rows(command, row)),
                    **_integers(_rows(cue, row), "cue_"),
                    "background": int(scene.background[row]),
                    "entropy": float(entropies["entropy"][row]),
                },
            )


def _keys(seed: int, attempts):
    root = jax.random.fold_in(jax.random.key(seed), _DOMAIN)
    return jax.vmap(lambda attempt: jax.random.fold_in(root, attempt))(attempts)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(keys, task_name, bias, scene_config):
    scene, command, cue = jax.vmap(lambda key: sample_episode(key, task_name, bias, scene_config))(keys)
    entropies = {
        "entropy": jax.vmap(functools.partial(instruction_entropy, task_name, bias=bias))(scene),
        "command_entropy": entropy(task_name, scene, bias),
        "target_entropy": target_entropy(task_name, scene, bias),
    }
    return scene, command, cue, entropies


@functools.partial(jax.jit, static_argnames=("model", "image_size"))
def _render(model, bodies, scene, image_size):
    return observe_images(model, bodies, scene, image_size)


def instruction_entropy(task_name: str, scene: Scene, bias: BiasConfig) -> Float[Array, ""]:
    """H(sentence | scene) in nats of one scene: what is asked for, and how it is said on average over that."""
    commands, probability = command_distribution(task_name, scene, bias)
    wording = jax.vmap(lambda command: language.wording_entropy(task_name, scene, command))(commands)
    return entropy(task_name, scene, bias) + jnp.sum(jnp.where(probability > 0, probability * wording, 0.0))


def instruction_log_probability(task_name: str, scene: Scene, command: Command, bias: BiasConfig) -> Float[Array, ""]:
    """log p(sentence | scene) in nats of one worded command of one scene; minus infinity for what is never said."""
    commands, probability = command_distribution(task_name, scene, bias)
    same = (commands.target == command.target) & (commands.goal == command.goal)
    asked = jnp.sum(jnp.where(same & (commands.relation == command.relation), probability, 0.0))
    first, end = language.template_range(task_name)
    named = language.referent_distribution(scene)[command.target, command.referent]
    return jnp.log(asked) + jnp.log(named) - jnp.log(end - first)


def _pictures(render, demonstrations: Demonstrations, scene: Scene, kept) -> Iterator[dict[str, np.ndarray]]:
    """Pictures of one kept episode after another, uint8[T,H,W,3] a view; frames of many episodes are drawn together."""
    lengths = demonstrations.length[kept]
    tick = np.concatenate([np.arange(length) for length in lengths]) if len(kept) else np.zeros(0, int)
    row = np.repeat(kept, lengths)
    drawn: dict[str, list[np.ndarray]] = {}
    done, waiting = 0, 0
    for length in lengths:
        while waiting < length:
            frames = np.arange(done, done + FRAMES_PER_RENDER).clip(max=len(tick) - 1)
            bodies = jax.tree.map(lambda leaf, at=frames: leaf[tick[at], row[at]], demonstrations.bodies)
            images = jax.device_get(render(bodies=bodies, scene=_rows(scene, row[frames])))
            for view, picture in images.items():
                drawn.setdefault(view, []).append(picture[: len(tick) - done])
            waiting += min(FRAMES_PER_RENDER, len(tick) - done)
            done += FRAMES_PER_RENDER
        joined = {view: np.concatenate(parts) for view, parts in drawn.items()}
        yield {view: picture[:length] for view, picture in joined.items()}
        drawn = {view: [picture[length:]] for view, picture in joined.items()}
        waiting -= length


def _rows(tree, index):
    """Indexes the leading axis of every NumPy leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _integers(command: Command, prefix: str = "") -> dict[str, int]:
    return {f"{prefix}{field.name}": int(getattr(command, field.name)) for field in dataclasses.fields(command)}
