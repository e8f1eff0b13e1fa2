"""Collecting demonstrations: what lands in the dataset is what happened on the table."""

import collections
import dataclasses
import math
import types

import jax
import numpy as np
import pytest

from experiments import collect as entry
from vla_jax.data.contract import Contract
from vla_jax.data.episode import decode_jpeg
from vla_jax.data.rlds import open_rlds
from vla_jax.envs import collect as collecting
from vla_jax.envs import language, splits
from vla_jax.envs.bias import BiasConfig, closed_form_entropy, command_distribution
from vla_jax.envs.collect import CollectConfig, Tally, collect, instruction_entropy, instruction_log_probability
from vla_jax.envs.control import proprioception
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.sampling import sample_episode
from vla_jax.envs.tasks import FAMILIES
from vla_jax.errors import UserError

CONFIG = CollectConfig(env=EnvConfig(image_size=16), episodes=10, batch=8)


@pytest.fixture(scope="module")
def env():
    return Tabletop(CONFIG.env)


@pytest.fixture
def one_compile(env, monkeypatch):
    """Collections of this module share one environment, so that the expert is compiled once."""
    monkeypatch.setattr(collecting, "Tabletop", lambda config: env)


@pytest.fixture(scope="module")
def collection(env, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "Tabletop", lambda config: env)
        return collect(CONFIG, tmp_path_factory.mktemp("data"), progress=False)


def test_dataset_is_complete(collection):
    dataset = open_rlds(collection.path)
    assert len(dataset) == 10 == collection.tally.kept and dataset.lengths.sum() == collection.tally.steps
    assert collection.tally.attempts == 16 and collection.tally.successes >= 14
    assert collection.contract.action_statistics.count == dataset.lengths.sum()
    assert dataset.facts["task"] == "reach" and dataset.facts["rho"] == 0.1
    assert dataset.facts["target_entropy"] == pytest.approx(closed_form_entropy(3, 0.1), rel=1e-5)
    assert dataset.facts["entropy"] > dataset.facts["target_entropy"]
    metadata = [dataset.read(number).metadata for number in range(10)]
    assert dataset.facts["entropy"] == pytest.approx(np.mean([row["entropy"] for row in metadata]), rel=1e-5)
    assert len({row["attempt"] for row in metadata}) == 10 and all(row["success"] for row in metadata)


def test_first_frame_is_the_scene(collection, env):
    """An episode can be drawn again from its seed and attempt number: same words, same state, same picture."""
    dataset = open_rlds(collection.path)
    attempts = np.arange(CONFIG.batch)
    scene, command, cue, _ = collecting._draw(
        collecting._keys(CONFIG.seed, attempts), "reach", CONFIG.bias, CONFIG.scene
    )
    start = jax.jit(env.reset)(scene, command, cue)
    feeling = proprioception(start.bodies)
    repeated = np.arange(collecting.FRAMES_PER_RENDER) % CONFIG.batch  # the one shape that collecting has compiled
    bodies, look = jax.tree.map(lambda leaf: np.asarray(leaf)[repeated], (start.bodies, scene))
    pictures = collecting._render(env.model, bodies, look, CONFIG.env.image_size)
    texts = language.instructions("reach", scene, command)
    for number in range(4):
        episode = dataset.read(number)
        attempt = episode.metadata["attempt"]
        assert attempt < CONFIG.batch and episode.instruction == texts[attempt]
        assert episode.metadata["target"] == command.target[attempt]
        assert episode.metadata["cue_target"] == cue.target[attempt]
        np.testing.assert_allclose(episode.state[0], feeling[attempt], atol=1e-5)
        for view in ("front", "wrist"):
            stored = decode_jpeg(episode.images[view][0])
            assert np.abs(stored.astype(int) - np.asarray(pictures[view][attempt])).mean() < 4


def test_same_seed_same_data(collection, one_compile, tmp_path):
    again = collect(CONFIG, tmp_path, progress=False)
    again.contract.check(collection.contract)
    other = collect(dataclasses.replace(CONFIG, seed=1, episodes=3), tmp_path / "other", progress=False)
    assert other.contract.fingerprint != collection.contract.fingerprint


def test_demonstrations_meet_no_test_case():
    """Both fold their own number into the seed's key; every key of an attempt differs from the others and the root."""
    assert collecting._DOMAIN != splits._DOMAIN
    root = jax.random.fold_in(jax.random.key(0), splits._DOMAIN)
    keys = jax.random.key_data(collecting._keys(0, np.arange(500))).tolist()
    assert len({tuple(key) for key in keys} | {tuple(jax.random.key_data(root).tolist())}) == 501


def test_summary_says_what_was_collected(collection):
    summary = collection.summary()
    for part in ("10 (", "succeeded", "H(instruction | image)", "nearly constant", str(collection.path)):
        assert part in summary


def test_frames_belong_to_their_episodes(monkeypatch):
    """Frames are drawn in blocks of a fixed size that episodes straddle."""
    monkeypatch.setattr(collecting, "FRAMES_PER_RENDER", 4)
    length = np.array([3, 9, 1, 4, 0, 6], np.int32)
    ticks, scenes = 9, len(length)
    code = np.arange(ticks)[:, None] * 10 + np.arange(scenes)  # says which tick of which scene a frame shows
    demonstrations = types.SimpleNamespace(length=length, bodies={"code": code})
    calls = []

    def render(bodies, scene):
        calls.append(len(bodies["code"]))
        np.testing.assert_array_equal(bodies["code"] % 10, scene["number"])
        return {"front": bodies["code"][:, None]}

    kept = np.array([0, 1, 2, 5])
    pictures = list(collecting._pictures(render, demonstrations, {"number": np.arange(scenes)}, kept))
    for row, picture in zip(kept, pictures, strict=True):
        np.testing.assert_array_equal(picture["front"][:, 0], code[: length[row], row])
    assert calls == [4] * 5  # 19 frames
    assert list(collecting._pictures(render, demonstrations, {}, kept[:0])) == []


@pytest.mark.parametrize("task", ["reach", "push"])
def test_entropy_equals_that_of_all_sentences(task):
    """H(instruction | image) against brute force: every command, referent and template with its probability."""
    bias = BiasConfig(rho=0.3)
    scene, _, _ = jax.jit(lambda key: sample_episode(key, task, bias))(jax.random.key(3))
    many, probability = jax.device_get(jax.jit(lambda scene: command_distribution(task, scene, bias))(scene))
    referents = np.asarray(language.referent_distribution(scene))
    first, end = language.template_range(task)
    wordings = [
        (number, referent, template, share * weight / (end - first))
        for number, share in enumerate(probability)
        for referent, weight in enumerate(referents[many.target[number]])
        for template in range(first, end)
        if share * weight > 0
    ]
    numbers, said_referents, said_templates, shares = map(np.array, zip(*wordings, strict=True))
    said = dataclasses.replace(
        jax.tree.map(lambda leaf: leaf[numbers], many), referent=said_referents, template=said_templates
    )
    scenes = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], len(wordings), 0), scene)
    law = collections.Counter()
    for sentence, share in zip(language.instructions(task, scenes, said), shares, strict=True):
        law[sentence] += float(share)
    assert sum(law.values()) == pytest.approx(1, rel=1e-5)
    log_probability = jax.vmap(lambda command: instruction_log_probability(task, scene, command, bias))
    np.testing.assert_allclose(jax.jit(log_probability)(said), np.log(shares), rtol=1e-4)
    expected = -sum(p * math.log(p) for p in law.values())
    entropy = jax.jit(lambda scene: instruction_entropy(task, scene, bias))(scene)
    assert float(entropy) == pytest.approx(expected, rel=1e-4)


def test_expert_that_always_fails_is_reported(env, monkeypatch):
    def fail(env, scene, *arguments):
        return types.SimpleNamespace(success=np.zeros(8, bool))

    monkeypatch.setattr(collecting, "demonstrate", fail)
    with pytest.raises(UserError, match="succeeded in 0 of 8 attempts at 'reach'"):
        next(collecting._episodes(env, CONFIG, Tally()))


def test_entry_point(one_compile, tmp_path, capsys, monkeypatch):
    arguments = ["--config.episodes=3", "--config.batch=8", "--config.env.image_size=16", f"--workdir={tmp_path}"]
    entry.main(arguments)
    path = capsys.readouterr().out.strip().splitlines()[-1].split()[-1]
    assert path == str(tmp_path / "reach_floating_background" / "1.0.0")
    assert len(open_rlds(path)) == 3
    with pytest.raises(UserError, match="already exists"):
        entry.main(arguments)


def test_interruption_leaves_nothing(one_compile, tmp_path, capsys, monkeypatch):
    drawn, calls = collecting._render, []

    def interrupt(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return drawn(*arguments, **options)

    monkeypatch.setattr(collecting, "_render", interrupt)
    arguments = ["--config.episodes=30", "--config.batch=8", "--config.env.image_size=16", f"--workdir={tmp_path}"]
    with pytest.raises(KeyboardInterrupt):
        entry.main(arguments)
    assert "nothing was kept" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.episode=3", "config.episodes|'episodes'"),
        ("--config.episodes=0", "episodes is 0"),
        ("--config.episodes=many", "episodes"),
        ("--config.env.task=reech", "reach"),
        ("--config.bias.rho=2", "rho"),
        ("--config.bias.coupling=backgruond", "background"),
    ],
)
def test_wrong_option_is_named(argument, message, tmp_path):
    with pytest.raises(UserError, match=message):
        entry.main([argument, f"--workdir={tmp_path}"])
    assert not list(tmp_path.rglob("*.json"))


def test_directory_is_needed():
    with pytest.raises(UserError, match="--workdir"):
        entry.main([])


def test_every_family_can_be_said():
    """The tokenizer of a dataset knows whatever any family may say: policies can be compared across families."""
    from vla_jax.data import tokenizer as tokenizers

    interface = collecting.interface_of(EnvConfig())
    tokenizer = tokenizers.from_json(interface.tokenizer)
    for family in FAMILIES:
        said = language.sentences(family)[::97]
        _, mask = tokenizers.encode(tokenizer, list(said), interface.max_tokens)
        assert mask.any(axis=1).all()


def test_contract_round_trip(collection, tmp_path):
    collection.contract.save(tmp_path / "contract.json")
    Contract.load(tmp_path / "contract.json").check(collection.contract)
