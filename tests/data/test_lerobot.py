"""LeRobot directories of both versions give the episodes that were written, and damage costs one episode."""

import dataclasses
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.published import CAMERAS, LEROBOT_JOINTS, LEROBOT_RATE, lerobot_episode, write_lerobot
from vla_jax.data.convert import ConvertConfig, convert
from vla_jax.data.episode import decode_jpeg
from vla_jax.data.layouts import Fault, Layout, Part, assemble
from vla_jax.data.lerobot import LerobotSource
from vla_jax.errors import UserError

EPISODES = [lerobot_episode(number, length) for number, length in enumerate((7, 5, 9))]
LAYOUT = Layout(
    embodiment="so101",
    control_hz=LEROBOT_RATE,
    images={"front": CAMERAS[0], "wrist": CAMERAS[1]},
    action=(
        Part("action", LEROBOT_JOINTS[:5], "deg", (0, 1, 2, 3, 4)),
        Part("action", ("gripper",), "%", (5,)),
    ),
    state=(Part("observation.state", LEROBOT_JOINTS[:5], "deg", (0, 1, 2, 3, 4)),),
    action_representation="commanded joint angles",
    instruction=("task",),
)


@pytest.fixture(scope="module", params=["v2.1", "v3.0"])
def dataset(request, tmp_path_factory):
    return write_lerobot(tmp_path_factory.mktemp(request.param) / "towels", request.param, EPISODES)


def copied(dataset, tmp_path):
    version = json.loads((dataset / "meta/info.json").read_text())["codebase_version"]
    return write_lerobot(tmp_path / "towels", version, EPISODES)


def test_columns_and_frames(dataset):
    source = LerobotSource(dataset, LAYOUT)
    assert (source.name, source.count) == ("towels", 3)
    for raw, episode in zip(source.episodes(), EPISODES, strict=True):
        np.testing.assert_array_equal(raw.columns["action"], episode["action"])
        np.testing.assert_array_equal(raw.columns["observation.state"], episode["state"])
        assert set(raw.columns["task"]) == {episode["task"]}
        for name in CAMERAS:
            frames = np.stack([decode_jpeg(picture) for picture in raw.columns[name]])
            assert frames.shape == episode["frames"][name].shape
            # the green of neighbouring frames differs by 20
            difference = np.abs(frames.astype(int) - episode["frames"][name])
            assert difference.max() < 9


def test_any_start(dataset):
    source = LerobotSource(dataset, LAYOUT)
    assert [raw.id for raw in source.episodes(1)] == ["1", "2"]
    frames = [decode_jpeg(picture) for picture in next(source.episodes(2)).columns[CAMERAS[0]]]
    np.testing.assert_allclose(frames[0][0, 0], EPISODES[2]["frames"][CAMERAS[0]][0, 0, 0], atol=8)


def test_only_the_views_of_the_layout_are_decoded(dataset):
    layout = dataclasses.replace(LAYOUT, images={"front": CAMERAS[0]})
    assert CAMERAS[1] not in next(LerobotSource(dataset, layout).episodes()).columns


def test_conversion(dataset, tmp_path):
    robot = tmp_path / "so101.py"
    robot.write_text("from tests.data.test_lerobot import LAYOUT\n")
    converted = convert(ConvertConfig(str(dataset), str(robot)), tmp_path / "out").dataset
    assert converted.lengths.tolist() == [7, 5, 9]
    assert converted.interface.action_units == ("rad",) * 5 + ("1",)
    episode = converted.read(1)
    np.testing.assert_allclose(episode.actions[:, :5], np.deg2rad(EPISODES[1]["action"][:, :5]), rtol=1e-5)
    np.testing.assert_allclose(episode.actions[:, 5], EPISODES[1]["action"][:, 5] / 100, rtol=1e-5)
    assert episode.instruction == "fold towel number 1" and converted.facts["layout"] == "so101"


def videos(directory):
    return sorted(directory.rglob("*.mp4"))


def test_truncated_video(dataset, tmp_path):
    directory = copied(dataset, tmp_path)
    path = videos(directory)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # the index lies at its end
    found = list(LerobotSource(directory, LAYOUT).episodes())
    packed = len(videos(directory)) == 2
    assert [isinstance(one, Fault) for one in found] == ([True] * 3 if packed else [True, False, False])
    assert found[0].kind == "damaged file" and "episode 0" in str(found[0]) and "copy it again" in str(found[0])


def test_video_with_too_few_frames(dataset, tmp_path):
    directory = copied(dataset, tmp_path)
    longer = [lerobot_episode(number, length) for number, length in enumerate((7, 5, 11))]
    other = write_lerobot(
        tmp_path / "longer", json.loads((directory / "meta/info.json").read_text())["codebase_version"], longer
    )
    for path in videos(other):  # numbers of 11 steps, frames of 9
        path.write_bytes((directory / path.relative_to(other)).read_bytes())
    found = list(LerobotSource(other, LAYOUT).episodes())
    assert found[2].kind == "damaged video" and "has 9 of the 11 frames" in str(found[2])
    assert not isinstance(found[1], Fault)


def test_missing_and_damaged_tables(dataset, tmp_path):
    directory = copied(dataset, tmp_path)
    first, *_, last = sorted((directory / "data").rglob("*.parquet"))
    last.unlink()
    first.write_bytes(first.read_bytes()[:100])
    found = list(LerobotSource(directory, LAYOUT).episodes())
    assert (found[0].kind, found[2].kind) == ("damaged file", "missing file")


def test_pictures_in_the_table_keep_their_bytes(tmp_path):
    directory = write_lerobot(tmp_path / "towels", "v2.1", EPISODES[:1])
    path = next((directory / "data").rglob("*.parquet"))
    pictures = [{"bytes": f"picture {step}".encode(), "path": None} for step in range(7)]
    table = pq.read_table(path)
    pq.write_table(table.append_column("observation.images.top", [pictures]), path)
    info = json.loads((directory / "meta/info.json").read_text())
    info["features"]["observation.images.top"]["dtype"] = "image"
    (directory / "meta/info.json").write_text(json.dumps(info))
    layout = dataclasses.replace(LAYOUT, images={"front": CAMERAS[0]})
    raw = next(LerobotSource(directory, layout).episodes())
    assert raw.columns[CAMERAS[0]] == [picture["bytes"] for picture in pictures]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_texts_in_the_table_are_instructions(tmp_path, kind):
    directory = write_lerobot(tmp_path / "towels", "v2.1", EPISODES[:1])
    path = next((directory / "data").rglob("*.parquet"))
    texts = [None, "", *["fold it"] * 5]
    table = pq.read_table(path)
    pq.write_table(table.append_column("language_instruction", pa.array(texts, kind)), path)
    features = json.loads((directory / "meta/info.json").read_text())["features"]
    features["language_instruction"] = {"dtype": "string", "shape": [1], "names": None}
    changed_info(directory, features=features)
    layout = dataclasses.replace(LAYOUT, instruction=Layout.instruction)
    raw = next(LerobotSource(directory, layout).episodes())
    assert raw.columns["language_instruction"] == ["", *texts[1:]]
    assert assemble(raw, layout).instruction == "fold it"


def changed_info(directory, **changes):
    path = directory / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_wrong_dataset_is_named(dataset, tmp_path):
    directory = copied(dataset, tmp_path)
    with pytest.raises(UserError, match="has no column 'observation.images.side': it has action"):
        LerobotSource(directory, dataclasses.replace(LAYOUT, images={"front": "observation.images.side"}))
    with pytest.raises(UserError, match="runs at 30 steps/s, its layout at 10.0: correct control_hz"):
        LerobotSource(directory, dataclasses.replace(LAYOUT, control_hz=10.0))
    changed_info(directory, codebase_version="v1.6")
    with pytest.raises(UserError, match="LeRobot version v1.6: known are v2.0, v2.1, v3.0"):
        LerobotSource(directory, LAYOUT)
    (directory / "meta/info.json").write_text("{")
    with pytest.raises(UserError, match="info.json is damaged"):
        LerobotSource(directory, LAYOUT)


def test_missing_library_is_named(dataset, tmp_path, monkeypatch):
    robot = tmp_path / "so101.py"
    robot.write_text("from tests.data.test_lerobot import LAYOUT\n")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "vla_jax.data.lerobot")
    with pytest.raises(UserError, match="LeRobot data need pyarrow: install it by pip install 'vla_jax.lerobot.'"):
        convert(ConvertConfig(str(dataset), str(robot)), tmp_path / "out")
