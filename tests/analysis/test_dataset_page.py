"""The page of a dataset stands alone, shows what is there, and warns of what is wrong."""

import base64
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from experiments import inspect
from tests.data.published import PUBLISHED, example, write_lerobot, write_tfrecord_rlds
from vla_jax.analysis.dataset_page import survey, warnings
from vla_jax.data.convert import ConvertConfig, convert
from vla_jax.data.episode import encode_jpeg
from vla_jax.errors import UserError

TEXTS = ("open the <drawer>", "wipe the table", "open the <drawer>")
BLACK = encode_jpeg(np.zeros((18, 32, 3), np.uint8))


def episodes(spoil):
    found = [example("droid", number, 12, TEXTS[number % 3]) for number in range(5)]
    if spoil:
        found[3] = example("droid", 3, 80, "wipe the table")
        found[4] = example("droid", 4, 12, "")
        for one in found:
            for step in one["steps"]:
                step["action_dict"]["joint_position"][2] = 0.5
                step["observation"]["wrist_image_left"] = BLACK
        found[0]["steps"][5]["action_dict"]["joint_position"][0] = 3000.0  # degrees, once
        for step in found[3]["steps"][1:]:
            step["action_dict"] = found[3]["steps"][0]["action_dict"]
    return found


def dataset(directory, spoil):
    name, version, spec = PUBLISHED["droid"]
    path = write_tfrecord_rlds(directory / "source", name, version, spec, [episodes(spoil)])
    return convert(ConvertConfig(str(path), "droid", faulty="skip"), directory).dataset


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("good"), spoil=False)


def test_a_sound_dataset_gives_no_warning(good):
    assert warnings(survey(good)) == []


def test_every_warning_is_given_for_its_reason(tmp_path):
    said = "\n".join(warnings(survey(dataset(tmp_path, spoil=True))))
    for line in (
        "1 episodes were left out: no instruction",
        "action joint_3 is nearly constant",
        r"action joint_1 reaches \d+ times its usual range",
        r"\d+% of the actions repeat the one before",
        r"1 episodes are unusually long .median 12 steps.: droid/recording_folderpath/3",
        "view wrist is black in 4 of 4 episodes",
    ):
        assert re.search(line, said), line
    assert len(said.splitlines()) == 6


@pytest.fixture(scope="module")
def printed(good):
    """What the verb prints; it writes the page."""
    return inspect.describe_dataset(str(good.directory))


def test_page_stands_alone_and_shows_the_data(printed):
    text = Path(printed.splitlines()[-1]).read_text()
    assert "<p>None.</p>" in text
    assert "open the &lt;drawer&gt;" in text and "<drawer>" not in text
    assert "5 episodes, 60 steps, 0.0011 hours at 15 steps a second" in text
    assert not re.findall(r"(?:src|href)='(?!data:)", text) and "<script" not in text
    pictures = re.findall(r"data:image/jpeg;base64,([^']+)", text)
    assert len(pictures) == 4 * 2 * 6  # episodes, views, steps
    assert text.count("<svg") == 3 and "action joint_7" in text and "joint_7 (rad)" not in pictures
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(pictures[0]), np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == (18, 32, 3)


def test_the_verb_tells_a_dataset_from_a_checkpoint(good, printed, monkeypatch, capsys):
    assert printed.splitlines() == ["5 episodes, 60 steps", str(good.directory.parent / "droid.html")]
    monkeypatch.setattr(inspect, "describe_dataset", lambda directory: "the page of a dataset")
    inspect.main([str(good.directory)])
    assert capsys.readouterr().out == "the page of a dataset\n"


def test_other_directories_are_named(tmp_path):
    with pytest.raises(UserError, match="is a LeRobot dataset: python -m experiments.convert"):
        inspect.main([str(write_lerobot(tmp_path / "x", "v2.1", []))])
    with pytest.raises(UserError, match="give one directory, a dataset, a checkpoint or a run"):
        inspect.main([])
    with pytest.raises(UserError, match="config.json"):
        inspect.main([str(tmp_path)])
