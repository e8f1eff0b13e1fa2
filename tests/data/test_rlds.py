"""RLDS datasets are written whole or not at all, open with tfds alone, and say what is wrong with them."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from vla_jax.data import rlds
from vla_jax.data.contract import compute_contract
from vla_jax.data.episode import decode_into, decode_jpeg, encode_jpeg, fit_picture
from vla_jax.data.rlds import open_rlds, write_rlds
from vla_jax.errors import UserError

HERE = str(Path(__file__).parent)  # where the programs run by these tests find conftest.py


def test_tfds_alone_reads_what_was_written(dataset_path, episodes):
    builder = tfds.builder_from_directory(dataset_path)
    source = builder.as_data_source("train")
    assert len(source) == len(episodes)
    assert builder.info.splits["train"].num_shards == 3
    for number, (stored, episode) in enumerate(zip(source, episodes, strict=True)):
        steps = list(stored["steps"])
        length = len(episode.actions)
        assert len(steps) == length
        np.testing.assert_array_equal([step["action"] for step in steps], episode.actions)
        np.testing.assert_array_equal([step["observation"]["state"] for step in steps], episode.state)
        assert {step["language_instruction"].decode() for step in steps} == {episode.instruction}
        last = [False] * (length - 1) + [True]
        assert [step["is_first"] for step in steps] == last[::-1]
        assert [step["is_last"] for step in steps] == last
        terminal = [flag and episode.success for flag in last]
        assert [step["is_terminal"] for step in steps] == terminal
        assert [step["reward"] for step in steps] == terminal
        assert [step["discount"] for step in steps] == [not flag for flag in terminal]
        for view in ("front", "wrist"):
            pictures = np.stack([step["observation"][f"image_{view}"] for step in steps])
            assert np.abs(pictures.astype(int) - episode.images[view]).mean() < 3
        about = stored["episode_metadata"]
        assert about["episode_id"] == number and about["success"] == episode.success and about["seed"] == number
        assert about["task"] == b"reach" and about["weight"] == 0.5 and about["rare"] == (number == 3)


def test_no_tensorflow_and_no_device_are_needed(dataset_path):
    code = (
        "import sys; from vla_jax.data.rlds import open_rlds; from vla_jax.data import loader, contract;"
        f"contract = contract.compute_contract({str(dataset_path)!r});"
        f"next(loader.make_loader(loader.DataConfig(directory={str(dataset_path)!r}, batch_size=4), contract));"
        "from jax._src import xla_bridge; assert not xla_bridge._backends; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_read_back_equals(dataset_path, episodes):
    dataset = open_rlds(dataset_path)
    assert dataset.lengths.tolist() == [len(episode.actions) for episode in episodes]
    for number in (0, 17, 39):
        stored, episode = dataset.read(number), episodes[number]
        np.testing.assert_array_equal(stored.actions, episode.actions)
        np.testing.assert_array_equal(stored.state, episode.state)
        assert stored.instruction == episode.instruction
        assert stored.metadata == {"episode_id": number, "success": episode.success, **episode.metadata}
        assert [len(column) for column in stored.images.values()] == [len(episode.actions)] * 2
    assert dataset.facts == {"task": "reach", "coupling": "background", "rho": 0.1, "entropy": 1.25}


def test_interface_survives(dataset_path, interface):
    assert open_rlds(dataset_path).interface == interface()


def test_fingerprint_follows_content(tmp_path, dataset_path, episode, episodes, interface):
    again = write_rlds(tmp_path, "synthetic", iter(episodes), interface(), open_rlds(dataset_path).facts)
    assert open_rlds(again).fingerprint == open_rlds(dataset_path).fingerprint
    one = write_rlds(tmp_path / "a", "x", [episode(0)], interface(), {})
    changed = dataclasses.replace(episode(0), actions=episode(0).actions + np.float32(1e-6))
    other = write_rlds(tmp_path / "b", "x", [changed], interface(), {})
    assert open_rlds(one).fingerprint != open_rlds(other).fingerprint


def test_colours_survive_jpeg():
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0], red[4:8, 4:8] = 220, (20, 30, 210)
    difference = np.abs(decode_jpeg(encode_jpeg(red)).astype(int) - red)
    assert difference.max() < 40 and difference.mean() < 4


def test_a_broken_picture_is_an_error(episode):
    jpeg, place = encode_jpeg(episode(0).images["front"][0]), np.zeros_like(episode(0).images["front"][0])
    for broken in (b"not a picture", jpeg[: len(jpeg) // 2], jpeg[:12]):
        with pytest.raises(UserError, match="damaged"):
            decode_jpeg(broken)
        with pytest.raises(UserError, match="damaged"):
            decode_into(place, broken)


def test_pictures_are_decoded_into_their_place(episode):
    image = episode(0).images["front"][0]
    png = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
    for encoded, expected in ((encode_jpeg(image), decode_jpeg(encode_jpeg(image))), (png, image)):
        batch = np.zeros((2, *image.shape), np.uint8)
        decode_into(batch[1], encoded)
        np.testing.assert_array_equal(batch[1], expected)
        assert not batch[0].any()
        smaller = np.zeros((8, 8, 3), np.uint8)
        decode_into(smaller, encoded)
        np.testing.assert_array_equal(smaller, fit_picture(expected, (8, 8)))


def failing(episode, count):
    yield from (episode(number) for number in range(count))
    raise RuntimeError("the simulator broke")


def test_failure_leaves_nothing(tmp_path, episode, interface):
    with pytest.raises(RuntimeError, match="simulator broke"):
        write_rlds(tmp_path, "x", failing(episode, 20), interface(), {})
    assert not list((tmp_path / "x").iterdir())


def test_killed_collection_leaves_nothing_that_looks_complete(tmp_path, episode, interface):
    code = (
        f"import itertools, sys; sys.path.insert(0, {HERE!r}); import conftest;"
        "from vla_jax.data.rlds import write_rlds;"
        "endless = (conftest.make_episode(0) for _ in itertools.count());"
        f"write_rlds({str(tmp_path)!r}, 'x', endless, conftest.make_interface(), {{}}, episodes_per_shard=4)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    draft = tmp_path / "x" / "1.0.0.incomplete"
    deadline = time.monotonic() + 60
    while len(list(draft.glob("*array_record*"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert draft.exists()
    with pytest.raises(UserError, match="no dataset at"):
        open_rlds(tmp_path / "x" / "1.0.0")
    with pytest.raises(UserError, match="run python -m experiments.collect"):
        open_rlds(tmp_path)
    path = write_rlds(tmp_path, "x", [episode(0)], interface(), {})
    assert len(open_rlds(path)) == 1 and not draft.exists()


def write_with_small_files(directory, episode, interface):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    write_rlds(directory, "x", (episode(number) for number in range(200)), interface(), {})


def test_full_disk_is_a_user_error(tmp_path, episode, interface):
    code = (
        f"import sys; sys.path.insert(0, {HERE!r}); import conftest, test_rlds\n"
        "from vla_jax.errors import UserError\n"
        f"try: test_rlds.write_with_small_files({str(tmp_path)!r}, conftest.make_episode, conftest.make_interface)\n"
        "except UserError as error: print('told:', error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "told: no space left while writing" in done.stdout, done.stderr
    assert not list((tmp_path / "x").iterdir())


def test_existing_dataset_is_kept(tmp_path, episode, interface):
    path = write_rlds(tmp_path, "x", [episode(0)], interface(), {})
    before = open_rlds(path).fingerprint
    with pytest.raises(UserError, match="already exists"):
        write_rlds(tmp_path, "x", [episode(1)], interface(), {})
    assert open_rlds(path).fingerprint == before


def with_nan(values):
    values = values.copy()
    values[1, 0] = np.nan
    return values


FAULTS = {
    "no instruction": lambda episode: dataclasses.replace(episode, instruction=" "),
    "actions of step 1 are not finite": lambda episode: dataclasses.replace(episode, actions=with_nan(episode.actions)),
    "state of step 1 are not finite": lambda episode: dataclasses.replace(episode, state=with_nan(episode.state)),
    "actions have shape": lambda episode: dataclasses.replace(episode, actions=episode.actions[:, :2]),
    "has views": lambda episode: dataclasses.replace(episode, images={"front": episode.images["front"]}),
    "view wrist is": lambda episode: dataclasses.replace(
        episode, images=episode.images | {"wrist": episode.images["wrist"].swapaxes(1, 2)}
    ),
    "no steps": lambda episode: dataclasses.replace(episode, actions=episode.actions[:0]),
    "metadata": lambda episode: dataclasses.replace(episode, metadata={"seed": 1}),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faulty_episode_is_named(tmp_path, episode, interface, message):
    with pytest.raises(UserError, match=f"episode 1.*{message}"):
        write_rlds(tmp_path, "x", [episode(0), FAULTS[message](episode(1))], interface(), {})


def test_no_episode_is_an_error(tmp_path, interface):
    with pytest.raises(UserError, match="no episode to write"):
        write_rlds(tmp_path, "x", [], interface(), {})


def test_missing_dataset_suggests_one_nearby(dataset_path):
    with pytest.raises(UserError, match=f"did you mean {dataset_path}"):
        open_rlds(dataset_path.parent.parent)
    with pytest.raises(UserError, match="run python -m experiments.collect"):
        open_rlds(dataset_path / "nowhere")


def copied(dataset_path, tmp_path):
    return shutil.copytree(dataset_path, tmp_path / "synthetic" / "1.0.0")


def test_foreign_dataset_names_the_missing_feature(dataset_path, tmp_path):
    path = copied(dataset_path, tmp_path)
    features = json.loads((path / "features.json").read_text())
    steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps["natural_language"] = steps.pop("language_instruction")
    (path / "features.json").write_text(json.dumps(features))
    with pytest.raises(UserError, match="no feature steps/language_instruction"):
        open_rlds(path)


def test_dataset_without_units_is_refused(dataset_path, tmp_path):
    path = copied(dataset_path, tmp_path)
    metadata = json.loads((path / "metadata.json").read_text())
    del metadata["interface"]
    (path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="does not say its interface"):
        open_rlds(path)
    (path / "metadata.json").unlink()
    with pytest.raises(UserError, match="does not say its interface"):
        open_rlds(path)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "metadata.json"])
def test_damaged_description_is_a_user_error(dataset_path, tmp_path, name):
    path = copied(dataset_path, tmp_path)
    (path / name).write_text("{")
    with pytest.raises(UserError, match="not a readable RLDS dataset"):
        open_rlds(path)


def test_missing_shard_is_named(dataset_path, tmp_path):
    path = copied(dataset_path, tmp_path)
    (path / "synthetic-train.array_record-00001").unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 shards .synthetic-train.array_record-00001"):
        open_rlds(path)


def test_truncated_shard_is_a_user_error(dataset_path, tmp_path):
    path = copied(dataset_path, tmp_path)
    shard = path / "synthetic-train.array_record-00001"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(UserError, match="a shard of .* is damaged"):
        dataset = open_rlds(path)
        for number in range(len(dataset)):
            dataset.read(number)


@pytest.mark.parametrize("message", ["no instruction", "actions of step 1 are not finite"])
def test_faulty_record_is_named_on_reading(tmp_path, episode, interface, message, monkeypatch):
    """Records that another program wrote may hold what `write_rlds` refuses."""
    monkeypatch.setattr(rlds, "validate", lambda *arguments: None)
    path = write_rlds(tmp_path, "x", [episode(0), FAULTS[message](episode(1))], interface(), {})
    with pytest.raises(UserError, match=f"episode 1 of {path}"):
        compute_contract(path)


def test_incomplete_description_is_refused(dataset_path, tmp_path):
    path = copied(dataset_path, tmp_path)
    metadata = json.loads((path / "metadata.json").read_text())
    metadata["episode_lengths"].pop()
    (path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="holds 40 episodes, not 39"):
        open_rlds(path)
