"""The stream of batches: what it holds, that every step comes once an epoch, and that it resumes exactly."""

import copy
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from vla_jax.data import loader as loading
from vla_jax.data.contract import compute_contract
from vla_jax.data.episode import decode_jpeg, encode_jpeg
from vla_jax.data.loader import DataConfig, EpisodeCache, held_out_episodes, make_loader
from vla_jax.data.rlds import open_rlds, write_rlds
from vla_jax.errors import UserError


@pytest.fixture
def config(dataset_path):
    return DataConfig(directory=str(dataset_path), batch_size=6, chunk=4, held_out_fraction=0.2, threads=2)


@pytest.fixture
def open_loader(contract):
    """Opens loaders and closes them after the test."""
    opened = []

    def open_one(config, *process, **more):
        opened.append(make_loader(config, contract, *process, **more))
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


def take(loader, count):
    return list(itertools.islice(loader, count))


def assert_same(one, other):
    flat, other_flat = flatten(one), flatten(other)
    assert flat.keys() == other_flat.keys()
    for name, value in flat.items():
        np.testing.assert_array_equal(value, other_flat[name], err_msg=name)


def flatten(batch):
    images = {f"images.{view}": pictures for view, pictures in batch["images"].items()}
    return images | {name: value for name, value in batch.items() if name != "images"}


def samples(batches):
    return [pair for batch in batches for pair in zip(batch["episode"].tolist(), batch["step"].tolist(), strict=True)]


def test_shapes_and_types(open_loader, config):
    batch = next(open_loader(config))
    described = {name: (value.shape, value.dtype.name) for name, value in flatten(batch).items()}
    assert described == {
        "images.front": ((6, 32, 24, 3), "uint8"),
        "images.wrist": ((6, 32, 24, 3), "uint8"),
        "state": ((6, 2), "float32"),
        "tokens": ((6, 10), "int32"),
        "token_mask": ((6, 10), "bool"),
        "actions": ((6, 4, 3), "float32"),
        "action_mask": ((6, 4, 3), "bool"),
        "episode": ((6,), "int32"),
        "step": ((6,), "int32"),
    }


def test_content(open_loader, config, episodes, contract):
    from vla_jax.data import tokenizer as tokenizers

    tokenizer = tokenizers.from_json(contract.tokenizer)
    for batch in take(open_loader(config), 20):
        for row in range(6):
            episode, step = episodes[batch["episode"][row]], batch["step"][row]
            np.testing.assert_array_equal(batch["state"][row], episode.state[step])
            tokens, mask = tokenizers.encode(tokenizer, [episode.instruction], 10)
            np.testing.assert_array_equal(batch["tokens"][row], tokens[0])
            np.testing.assert_array_equal(batch["token_mask"][row], mask[0])
            for view in ("front", "wrist"):
                expected = decode_jpeg(encode_jpeg(episode.images[view][step]))
                np.testing.assert_array_equal(batch["images"][view][row], expected)
            left = len(episode.actions) - step
            for ahead in range(4):
                inside = ahead < left
                np.testing.assert_array_equal(batch["action_mask"][row, ahead], inside)
                expected = episode.actions[step + ahead] if inside else episode.actions[-1]
                np.testing.assert_array_equal(batch["actions"][row, ahead], expected)


def test_only_the_views_that_are_asked_for_are_read(open_loader, config):
    every, batch = next(open_loader(config)), next(open_loader(config, views=("wrist",)))
    assert list(batch["images"]) == ["wrist"]
    np.testing.assert_array_equal(batch["images"]["wrist"], every["images"]["wrist"])
    with pytest.raises(UserError, match="no view 'top': they have front, wrist"):
        open_loader(config, views=("top",))


def test_padding_occurs_at_the_end_only(open_loader, config):
    batches = take(open_loader(config), 20)
    masks = np.concatenate([batch["action_mask"] for batch in batches])
    assert masks[:, 0].all() and not masks.all()
    assert (np.diff(masks.astype(int), axis=1) <= 0).all()


def expected_steps(config, episodes):
    held_out = held_out_episodes([f"synthetic/{number}" for number in range(len(episodes))], config.held_out_fraction)
    chosen = np.flatnonzero(held_out if config.split == "held_out" else ~held_out)
    return {(int(number), step) for number in chosen for step in range(len(episodes[number].actions))}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_step_once_an_epoch(open_loader, config, episodes, split):
    config = dataclasses.replace(config, batch_size=1, split=split)
    expected = expected_steps(config, episodes)
    loader = open_loader(config)
    first, second = samples(take(loader, len(expected))), samples(take(loader, len(expected)))
    assert len(set(first)) == len(first) and set(first) == set(second) == expected
    assert first != second and first != sorted(first)


def test_splits_are_disjoint_and_stable():
    names, others = ([f"{name}/{number}" for number in range(5000)] for name in "xy")
    held_out = held_out_episodes(names, 0.02)
    assert 60 < held_out.sum() < 140
    np.testing.assert_array_equal(held_out[:100], held_out_episodes(names[:100], 0.02))
    assert (held_out_episodes(names, 0.1) >= held_out).all()
    assert (held_out_episodes(others, 0.02) != held_out).any()


def test_seed_decides_the_order(open_loader, config):
    first = samples(take(open_loader(config), 5))
    assert samples(take(open_loader(config), 5)) == first
    assert samples(take(open_loader(dataclasses.replace(config, seed=1)), 5)) != first


@pytest.mark.parametrize("changes", [{"threads": 1}, {"threads": 4, "prefetch": 1}, {"cache_mb": 0}, {"workers": 1}])
def test_readers_change_nothing(open_loader, config, changes):
    for one, other in zip(
        take(open_loader(config), 12), take(open_loader(dataclasses.replace(config, **changes)), 12), strict=True
    ):
        assert_same(one, other)


def test_resumes_exactly(open_loader, config):
    loader = open_loader(config)
    take(loader, 45)  # more than an epoch
    state = loader.get_state()
    following = take(loader, 30)
    resumed = open_loader(dataclasses.replace(config, threads=3))
    resumed.set_state(state)
    for one, other in zip(following, take(resumed, 30), strict=True):
        assert_same(one, other)
    loader.set_state(state)  # back in the same loader
    assert_same(next(loader), following[0])


def test_resumes_with_other_workers(open_loader, config):
    loader = open_loader(config)
    take(loader, 7)
    resumed = open_loader(dataclasses.replace(config, workers=1))
    resumed.set_state(loader.get_state())
    for one, other in zip(take(loader, 4), take(resumed, 4), strict=True):
        assert_same(one, other)


def test_orbax_saves_and_restores_the_position(open_loader, config, tmp_path):
    loader = open_loader(config)
    take(loader, 9)
    ocp.save_checkpointables(tmp_path / "step", {"data": loader})
    following = take(loader, 3)
    restored = open_loader(config)
    ocp.load_checkpointables(tmp_path / "step", {"data": restored})
    assert restored.get_state()["batches"] == 9
    for one, other in zip(following, take(restored, 3), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("change", [{"seed": 3}, {"batch_size": 5}, {"split": "held_out"}, {"held_out_fraction": 0.5}])
def test_position_of_another_stream_is_refused(open_loader, config, change):
    state = open_loader(config).get_state()
    with pytest.raises(UserError, match=f"cannot resume.*{next(iter(change))} was"):
        open_loader(dataclasses.replace(config, **change)).set_state(state)


def test_processes_share_every_batch(open_loader, config):
    whole = take(open_loader(config), 10)
    parts = [take(open_loader(config, index, 2), 10) for index in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert len(first["step"]) == len(second["step"]) == 3
        assert set(samples([first])).isdisjoint(samples([second]))
        assert sorted(samples([first, second])) == sorted(samples([batch]))
    with pytest.raises(UserError, match="cannot be divided among 4 processes"):
        open_loader(config, 0, 4)


def test_cache_is_bounded_and_used(dataset_path, monkeypatch):
    dataset = open_rlds(dataset_path)
    limit = 3 * dataset.read(0).nbytes
    cache = EpisodeCache(dataset, limit)
    for number in range(len(dataset)):
        np.testing.assert_array_equal(cache[number].actions, dataset.read(number).actions)
        assert cache.nbytes <= limit
    assert cache.nbytes == sum(episode.nbytes for episode, _ in cache._episodes.values()) > 0
    monkeypatch.setattr(dataset, "read", None)  # the last one must come from memory
    assert len(cache[len(dataset) - 1].actions) == dataset.lengths[-1]
    with pytest.raises(TypeError):
        cache[0]  # dropped long ago


def test_cache_drops_what_was_used_longest_ago(dataset_path):
    dataset = open_rlds(dataset_path)
    cache = EpisodeCache(dataset, sum(dataset.read(number).nbytes for number in range(3)))
    for number in (0, 1, 2, 0):
        cache[number]
    cache[39]
    assert 0 in cache._episodes and 39 in cache._episodes and 1 not in cache._episodes


def test_reader_travels_to_another_process(dataset_path, contract, config):
    reader = loading.BatchReader(open_rlds(dataset_path), contract, config)
    steps = np.array([0, len(reader) - 1, 5])
    assert_same(copy.copy(reader)(steps), reader(steps))


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 0}, {"chunk": 0}, {"threads": 0}, {"workers": -1}, {"held_out_fraction": 1.0}, {"split": "test"}],
)
def test_wrong_option_is_named(change):
    with pytest.raises(UserError, match=next(iter(change))):
        DataConfig(**change)


def test_unset_directory(contract):
    with pytest.raises(UserError, match="data.directory is not set"):
        make_loader(DataConfig(), contract)


def test_empty_split_is_an_error(open_loader, config):
    with pytest.raises(UserError, match="none of the 40 episodes"):
        open_loader(dataclasses.replace(config, split="held_out", held_out_fraction=0.0))


def test_contract_of_other_data_is_refused(open_loader, config, tmp_path, interface, episodes):
    path = write_rlds(tmp_path, "synthetic", episodes[:1], interface(control_hz=20.0, embodiment="panda"), {})
    with pytest.raises(
        UserError, match="does not fit the contract: embodiment: expected floating, found panda; control"
    ):
        open_loader(dataclasses.replace(config, directory=str(path)))


@pytest.mark.parametrize("workers", [0, 1])
def test_unknown_word_reaches_the_user(tmp_path, interface, episode, workers):
    said = dataclasses.replace(episode(0), instruction="reach the mauve cube")
    path = write_rlds(tmp_path, "x", [said], interface(), {})
    config = DataConfig(directory=str(path), batch_size=1, workers=workers, held_out_fraction=0.0)
    loader = make_loader(config, compute_contract(path))
    with pytest.raises(UserError, match="mauve"):
        next(loader)
    loader.close()


def test_nothing_of_the_paths_is_in_the_state(open_loader, config):
    assert str(Path(config.directory)) not in str(open_loader(config).get_state())


def test_the_loader_draws_whole_episodes_by_weight(config, open_loader, dataset_path, tmp_path):
    """Weight on two training episodes alone: nothing else is ever read, and a resumed stream goes on."""
    dataset, reader = open_rlds(dataset_path), open_loader(config)
    usual = {int(number) for _ in range(8) for number in next(reader)["episode"]}
    chosen = sorted(usual)[:2]
    information = np.where(np.isin(np.arange(len(dataset)), chosen), -1000.0, 1000.0)
    path = tmp_path / "information.json"
    path.write_text(json.dumps({"fingerprint": dataset.fingerprint, "information": information.tolist()}))
    config = dataclasses.replace(config, weights=str(path), balance=2.0)  # e^16 apart
    loader = open_loader(config)
    batches = [next(loader) for _ in range(6)]
    assert {int(number) for batch in batches for number in batch["episode"]} == set(chosen)
    other = open_loader(config)
    other.set_state({**loader.get_state(), "batches": 3})
    np.testing.assert_array_equal(next(other)["step"], batches[3]["step"])
    path.write_text(json.dumps({"fingerprint": dataset.fingerprint, "information": (-information).tolist()}))
    with pytest.raises(UserError, match="weights was .*, is"):
        open_loader(config).set_state(loader.get_state())
    with pytest.raises(UserError, match="balance was 2.0, is 1.0"):
        open_loader(dataclasses.replace(config, balance=1.0)).set_state(loader.get_state())
    with pytest.raises(UserError, match="data.balance needs data.weights"):
        open_loader(dataclasses.replace(config, weights=""))
