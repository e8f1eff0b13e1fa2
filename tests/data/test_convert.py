"""Published layouts become step datasets: lossless, whole or not at all, and resumable."""

import copy
import dataclasses
import errno
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from tests.data.published import PUBLISHED, example, write_published, write_tfrecord_rlds
from vla_jax.data import convert as converting
from vla_jax.data.contract import compute_contract
from vla_jax.data.convert import ConvertConfig, convert
from vla_jax.data.dataset import open_dataset
from vla_jax.data.episode import decode_jpeg
from vla_jax.data.loader import BatchReader, DataConfig, data_contract, make_loader
from vla_jax.data.registry import LAYOUTS
from vla_jax.data.sources import RldsSource
from vla_jax.data.tfrecord import read_records
from vla_jax.errors import UserError

LENGTHS = [[3, 5], [4, 6, 2]]
CAMERAS = {
    "bridge": {"front": "observation/image_0"},
    "bridge_oxe": {"front": "observation/image"},
    "fractal": {"front": "observation/image"},
    "droid": {"front": "observation/exterior_image_1_left", "wrist": "observation/wrist_image_left"},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A dataset in each published layout, written once."""
    directory = tmp_path_factory.mktemp("published")
    return {kind: write_published(directory, kind, LENGTHS) for kind in PUBLISHED}


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    """And each of them converted."""
    directory = tmp_path_factory.mktemp("converted")
    return {kind: convert(ConvertConfig(str(path), kind), directory).dataset for kind, path in published.items()}


def stored(path):
    """The features of every episode, as they lie in the files."""
    records = itertools.chain.from_iterable(read_records(file) for file in sorted(path.glob("*tfrecord*")))
    return [tf_example_pb2.Example.FromString(record).features.feature for record in records]


def numbers(features, name):
    feature = features[f"steps/{name}"]
    values = np.array(getattr(feature, feature.WhichOneof("kind")).value)
    return values.reshape(len(features["steps/is_first"].int64_list.value), -1)


def expected_actions(kind, features):
    """What each publisher's text says that its action means, written out by hand."""
    if kind == "bridge":
        return numbers(features, "action")[1:]
    if kind == "droid":
        closed = numbers(features, "action_dict/gripper_position")
        return np.concatenate([numbers(features, "action_dict/joint_position"), 1 - closed], axis=1)
    move = [numbers(features, f"action/{name}") for name in ("world_vector", "rotation_delta")]
    if kind == "bridge_oxe":
        return np.concatenate([*move, numbers(features, "action/open_gripper")], axis=1)[1:]
    closing = numbers(features, "action/gripper_closedness_action")[:, 0]
    opening, held = np.empty(len(closing)), None
    for step, command in enumerate(closing):
        held = 0.0 if command > 0.1 else held
        opening[step] = 1.0 if held is None else held  # all commands are positive here: open until it first closes
    return np.concatenate([*move, opening[:, None]], axis=1)


def expected_state(kind, features):
    if kind in ("bridge", "bridge_oxe"):
        return numbers(features, "observation/state")[1:]
    if kind == "droid":
        closed = numbers(features, "observation/gripper_position")
        return np.concatenate([numbers(features, "observation/joint_position"), 1 - closed], axis=1)
    closed = numbers(features, "observation/gripper_closed")
    return np.concatenate([numbers(features, "observation/base_pose_tool_reached"), 1 - closed], axis=1)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_layouts(kind, published, converted):
    dataset, layout, episodes = converted[kind], LAYOUTS[kind], stored(published[kind])
    kept = slice(layout.drop_first, None)
    assert len(dataset) == 5
    assert dataset.lengths.tolist() == [length - layout.drop_first for shard in LENGTHS for length in shard]
    for number, features in enumerate(episodes):
        episode = dataset.read(number)
        np.testing.assert_allclose(episode.actions, expected_actions(kind, features), atol=1e-6)
        np.testing.assert_allclose(episode.state, expected_state(kind, features), atol=1e-6)
        assert set(episode.images) == set(CAMERAS[kind])
        for view, feature in CAMERAS[kind].items():
            assert list(episode.images[view]) == list(features[f"steps/{feature}"].bytes_list.value)[kept]
        assert episode.instruction == "put the cup away"
    interface = dataset.interface
    assert interface.control_hz == {"bridge": 5, "bridge_oxe": 5, "fractal": 3, "droid": 15}[kind]
    assert interface.action_names[-1] == interface.state_names[-1] == "gripper"


def test_names_of_episodes_are_those_of_their_files(converted):
    assert converted["bridge"].episode_names[2] == "bridge_dataset/file_path/2/2"
    assert converted["droid"].episode_names[3] == "droid/recording_folderpath/3/file_path/3"
    assert converted["fractal"].episode_names[4] == "fractal20220817_data/train/4"


def test_array_record_shards_are_read_too(dataset_path, episodes, tmp_path):
    """An RLDS dataset in ArrayRecord (of three shards), by a layout in a file of the user's."""
    robot = tmp_path / "floating.py"
    robot.write_text(
        "from vla_jax.data.layouts import Layout, Part\n"
        "ACTION = (Part('action', ('dx', 'dyaw', 'opening'), '1'),)\n"
        "STATE = (Part('observation/state', ('x', 'cos_yaw'), '1'),)\n"
        "LAYOUT = Layout('floating', 10.0, {'wrist': 'observation/image_wrist'}, ACTION, STATE, 'delta')\n"
    )
    original = open_dataset(dataset_path)
    dataset = convert(ConvertConfig(str(dataset_path), str(robot)), tmp_path).dataset
    assert dataset.lengths.tolist() == original.lengths.tolist()
    for number in (0, 16, 39):
        one, other = dataset.read(number), original.read(number)
        np.testing.assert_array_equal(one.actions, other.actions)
        assert list(one.images["wrist"]) == other.images["wrist"] and one.instruction == other.instruction
    shard = shutil.copytree(dataset_path, tmp_path / "copied") / "synthetic-train.array_record-00001"
    shard.write_bytes(shard.read_bytes()[:-4000])
    skipped = convert(ConvertConfig(str(tmp_path / "copied"), str(robot), faulty="skip", name="less"), tmp_path).skipped
    assert list(skipped) == ["damaged shard"] and 1 <= skipped["damaged shard"] <= 16


def test_alternative_instructions(tmp_path):
    spec = PUBLISHED["droid"][2]
    one = example("droid", 0, 2, "")
    for step in one["steps"]:
        step["language_instruction_2"] = "wipe the table"
    path = write_tfrecord_rlds(tmp_path, "droid", "1.0.0", spec, [[one]])
    assert convert(ConvertConfig(str(path), "droid"), tmp_path / "out").dataset.instructions == ("wipe the table",)


def test_statistics_touch_no_picture(converted, monkeypatch):
    dataset = converted["droid"]
    monkeypatch.setattr(dataset, "_records", None)
    statistics = compute_contract(dataset).action_statistics
    actions = np.concatenate(dataset._actions).astype(np.float64)
    np.testing.assert_allclose(statistics.mean, actions.mean(0), rtol=1e-9)
    assert statistics.count == dataset.lengths.sum()


def test_batches_of_a_converted_dataset(converted):
    dataset = converted["droid"]
    config = DataConfig(directory=str(dataset.directory), batch_size=4, chunk=3, image_size=20, held_out_fraction=0.0)
    contract = data_contract(config)
    assert contract.images == {"front": (20, 20), "wrist": (20, 20)}
    loader = make_loader(config, contract)
    batches = list(itertools.islice(loader, 10))
    loader.close()
    for batch in batches:
        for row, (number, step) in enumerate(zip(batch["episode"], batch["step"], strict=True)):
            episode = dataset.read(number)
            np.testing.assert_array_equal(batch["actions"][row, 0], episode.actions[step])
            np.testing.assert_array_equal(batch["state"][row], episode.state[step])
            wrist = batch["images"]["wrist"][row]  # 18 x 32 pixels shrink to 11 x 20, with black above and below
            assert not wrist[:4].any() and not wrist[16:].any() and wrist[5:15].any()
            shrunk = decode_jpeg(episode.images["wrist"][step])[::2, ::2].mean()
            assert wrist[4:15].mean() == pytest.approx(shrunk, abs=12)
    pairs = {(n, s) for b in batches for n, s in zip(b["episode"].tolist(), b["step"].tolist(), strict=True)}
    assert len(pairs) == dataset.lengths.sum() == 20


def test_reader_of_steps_travels_to_another_process(converted):
    dataset = converted["bridge"]
    config = DataConfig(directory=str(dataset.directory), chunk=2, held_out_fraction=0.0)
    reader = BatchReader(dataset, data_contract(config), config)
    one, other = reader(np.array([0, 7])), copy.copy(reader)(np.array([0, 7]))
    np.testing.assert_array_equal(one["images"]["front"], other["images"]["front"])
    np.testing.assert_array_equal(one["actions"], other["actions"])


def test_damaged_picture_is_named_when_it_is_met(converted, tmp_path):
    directory = tmp_path / "copied"
    subprocess.run(["cp", "-r", str(converted["bridge"].directory), str(directory)], check=True)
    path = directory / "part-00000" / "pictures.array_record"
    first = open_dataset(directory).read(0).images["front"][1]
    data = path.read_bytes()
    path.write_bytes(data.replace(first, bytes(len(first))))
    config = DataConfig(directory=str(directory), batch_size=1, held_out_fraction=0.0, threads=1)
    loader = make_loader(config, data_contract(config))
    with pytest.raises(UserError, match="view front of step 1 of bridge_dataset/file_path/0/0 in .*damaged"):
        list(itertools.islice(loader, 30))
    loader.close()


def damage(path, name):
    file = path / name
    file.write_bytes(file.read_bytes()[:-200])


def faulty(tmp_path):
    """Bridge with an episode without language, one with NaN actions, and a shard that is cut in its last record."""
    shards = [
        [example("bridge", number, 4, "put the cup away") for number in numbers] for numbers in ((0, 1, 2), (3, 4))
    ]
    for step in shards[0][1]["steps"]:
        step["language_instruction"] = ""
    shards[0][2]["steps"][2]["action"][3] = np.nan
    path = write_tfrecord_rlds(tmp_path, *PUBLISHED["bridge"][:2], PUBLISHED["bridge"][2], shards)
    damage(path, "bridge_dataset-train.tfrecord-00001-of-00002")
    return path


def test_faulty_episodes_are_counted_or_refused(tmp_path):
    config = ConvertConfig(str(faulty(tmp_path)), "bridge", faulty="skip")
    conversion = convert(config, tmp_path / "out")
    assert conversion.skipped == {"no instruction": 1, "not finite": 1, "damaged shard": 1}
    assert conversion.dataset.episode_names == ("bridge_dataset/file_path/0/0", "bridge_dataset/file_path/3/3")
    assert conversion.dataset.facts["skipped"] == conversion.skipped
    assert "left out: 1 episodes (damaged shard)" in conversion.summary()
    with pytest.raises(UserError, match="episode file_path/1/1 has no instruction.*faulty=skip"):
        convert(dataclasses.replace(config, faulty="error"), tmp_path / "strict")
    assert not (tmp_path / "strict" / "bridge_dataset").exists()


def test_lost_records_keep_the_numbers_of_the_others(tmp_path):
    path = write_published(tmp_path, "fractal", [[2, 2, 2], [2, 2]])
    first = path / "fractal20220817_data-train.tfrecord-00000-of-00002"
    data = first.read_bytes()
    first.write_bytes(data[: len(data) // 2])  # one of three records is whole
    source = RldsSource(path, LAYOUTS["fractal"])
    found = [getattr(one, "id", None) for one in source.episodes()]
    assert found == ["train/0", None, None, "train/3", "train/4"]
    assert [getattr(one, "id", None) for one in source.episodes(2)] == [None, "train/3", "train/4"]


def test_interrupted_conversion_goes_on(published, converted, tmp_path, monkeypatch):
    """A part an episode; the conversion dies in the fourth: three parts stay and are not read again."""
    config = ConvertConfig(str(published["droid"]), "droid", part_mb=1)
    monkeypatch.setattr(converting, "MIB", 1)
    assembled, original = [], converting.assemble

    def dying(raw, layout):
        assembled.append(raw.id)
        if len(assembled) == 4:
            raise KeyboardInterrupt
        return original(raw, layout)

    monkeypatch.setattr(converting, "assemble", dying)
    with pytest.raises(KeyboardInterrupt):
        convert(config, tmp_path)
    draft = tmp_path / "droid.incomplete"
    assert sorted(path.name for path in draft.glob("part*")) == ["part-00000", "part-00001", "part-00002"]
    (draft / "part-00003.draft").mkdir()  # what a killed process leaves
    assert not (tmp_path / "droid").exists()
    with pytest.raises(UserError, match="begun from another source or layout, or with other settings"):
        convert(dataclasses.replace(config, faulty="skip"), tmp_path)
    dataset = convert(config, tmp_path).dataset
    assert assembled[4:] == assembled[3:4] + ["recording_folderpath/4/file_path/4"] and not draft.exists()
    whole = converted["droid"]
    assert dataset.episode_names == whole.episode_names and len(dataset._parts) == 5
    for number in range(5):
        one, other = dataset.read(number), whole.read(number)
        np.testing.assert_array_equal(one.actions, other.actions)
        assert list(one.images["wrist"]) == list(other.images["wrist"])


def test_a_conversion_that_died_before_its_name_is_complete(published, tmp_path, monkeypatch):
    """Nothing is read again, whether it dies before it gets its name or at once after."""
    config = ConvertConfig(str(published["bridge"]), "bridge")
    for number, method in enumerate(("rename", "unlink")):
        out, original = tmp_path / method, getattr(Path, method)

        def dying(path, *arguments, original=original):
            if path.name in ("bridge_dataset.incomplete", converting.ORIGIN):
                raise KeyboardInterrupt
            return original(path, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(Path, method, dying)
            with pytest.raises(KeyboardInterrupt):
                convert(config, out)
        if number == 0:
            part = (out / "bridge_dataset.incomplete/part-00000/actions.npy").stat()
            convert(config, out)
            assert (out / "bridge_dataset/part-00000/actions.npy").stat() == part
        assert len(open_dataset(out / "bridge_dataset")) == 5


def test_a_layout_file_that_was_changed_meanwhile_is_refused(tmp_path):
    """The first version of `episodes` fails in its second episode; what it gave of the first is not kept unasked."""
    robot, folder = tmp_path / "robot.py", tmp_path / "recorded"
    folder.mkdir()
    robot.write_text(
        "import numpy as np\n"
        "from vla_jax.data.layouts import Layout, Part\n"
        "numbers = (Part('numbers', ('x',), 'm'),)\n"
        "LAYOUT = Layout('arm', 10.0, {'front': 'front'}, numbers, numbers, 'targets', ('text',))\n"
        "def episodes(directory):\n"
        "    for number in range(2):\n"
        "        picture = np.zeros((3, 8, 8, 3), np.uint8)\n"
        "        yield {'numbers': np.full((3, 1), 1.0 / (1 - number)), 'front': picture, 'text': 'go'}\n"
    )
    config = ConvertConfig(str(folder), str(robot))
    with pytest.raises(ZeroDivisionError):
        convert(config, tmp_path / "out")
    robot.write_text(robot.read_text().replace("(1 - number)", "(2 - number)"))
    with pytest.raises(UserError, match="begun from another source or layout"):
        convert(config, tmp_path / "out")
    assert len(convert(dataclasses.replace(config, name="again"), tmp_path / "out").dataset) == 2


def test_fingerprint_follows_content(published, converted, tmp_path):
    again = convert(ConvertConfig(str(published["bridge"]), "bridge"), tmp_path).dataset
    assert again.fingerprint == converted["bridge"].fingerprint
    less = convert(ConvertConfig(str(published["bridge"]), "bridge", max_episodes=3), tmp_path / "less").dataset
    assert len(less) == 3 and less.fingerprint != again.fingerprint


def test_nothing_is_overwritten(published, tmp_path):
    config = ConvertConfig(str(published["bridge"]), "bridge", name="mine")
    convert(config, tmp_path)
    with pytest.raises(UserError, match="mine already exists"):
        convert(config, tmp_path)


def test_wrong_source_is_named(published, tmp_path):
    cases = {
        "no directory": ConvertConfig(str(tmp_path / "nowhere"), "bridge"),
        f"did you mean {published['bridge']}": ConvertConfig(str(published["bridge"].parent), "bridge"),
        "expected dataset_info.json .RLDS. or meta/info.json": ConvertConfig(str(tmp_path), "bridge"),
        "has no split 'test': it has train": ConvertConfig(str(published["bridge"]), "bridge", split="test"),
        "names the feature 'observation/exterior_image_1_left'": ConvertConfig(str(published["bridge"]), "droid"),
    }
    for message, config in cases.items():
        with pytest.raises(UserError, match=message):
            convert(config, tmp_path / "out")


def test_nothing_usable_is_an_error(tmp_path):
    path = write_published(tmp_path, "bridge", [[1, 1]])  # of one step, which is dropped
    with pytest.raises(UserError, match="no episode of .* can be used: 2 with no steps"):
        convert(ConvertConfig(str(path), "bridge", faulty="skip"), tmp_path / "out")


def test_many_parts_are_many_open_files(converted, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    directory = converted["bridge"].directory
    open_dataset(directory)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    monkeypatch.setattr(np, "load", Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
    with pytest.raises(UserError, match="too many open files .*ulimit -n"):
        open_dataset(directory)


def test_damaged_dataset_is_named(converted, tmp_path):
    directory = tmp_path / "copied"
    subprocess.run(["cp", "-r", str(converted["bridge"].directory), str(directory)], check=True)
    actions = directory / "part-00000" / "actions.npy"
    np.save(actions, np.load(actions)[:-1])
    with pytest.raises(UserError, match="part-00000 does not hold its 15 steps"):
        open_dataset(directory)
    os.remove(actions)
    with pytest.raises(UserError, match="a part of .* is damaged"):
        open_dataset(directory)
    (directory / "dataset.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(UserError, match="has the format 'other'"):
        open_dataset(directory)


def test_no_tensorflow_is_needed(published, tmp_path):
    code = (
        "import sys; from vla_jax.data.convert import *;"
        f"convert(ConvertConfig({str(published['fractal'])!r}, 'fractal'), {str(tmp_path)!r});"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
