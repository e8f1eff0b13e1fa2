"""docs/add_your_robot.md, done as it says: its Python file, its folder, its commands."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from experiments import convert, inspect, train
from vla_jax.data.dataset import open_dataset

PAGE = (Path(__file__).parents[1] / "docs/add_your_robot.md").read_text()
ROBOT = re.search(r"```python\n(import numpy.*?)```", PAGE, re.DOTALL)[1]
TASKS = ("pick up the red cup", "close the box")


def command(verb: str) -> list[str]:
    """The arguments of the page's command `verb`; a user stands where configs/ lies, so that has to be named."""
    line = re.search(rf"python -m experiments\.{verb} (.*?)```", PAGE, re.DOTALL)[1].replace("\\\n", " ")
    root = Path(__file__).parents[1]
    parts = [part.replace("--config=configs", f"--config={root}/configs") for part in shlex.split(line)]
    return [f"--config={root}/configs/convert.py", *parts] if verb == "convert" else parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a new user stands: my_robot.py and my_episodes/."""
    directory = tmp_path_factory.mktemp("user")
    (directory / "my_robot.py").write_text(ROBOT)
    (directory / "my_episodes").mkdir()
    for number in range(12):
        random = np.random.default_rng(number)
        steps = 20 + number
        target = np.cumsum(random.normal(size=(steps, 6)), axis=0)
        arrays = {
            "camera": random.integers(0, 256, (steps, 24, 32, 3), dtype=np.uint8),
            "joints": target - 0.5,
            "target": target,
            "grip": random.uniform(0, 1, steps),
            "grip_command": random.integers(0, 2, steps).astype(float),
            "task": TASKS[number % 2],
        }
        np.savez(directory / "my_episodes" / f"episode_{number:03d}.npz", **arrays)
    return directory


@pytest.fixture
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_convert_and_look(there, capsys):
    convert.main(command("convert"))
    printed = capsys.readouterr().out
    assert "action wrist_3" in printed and printed.splitlines()[-1] == "runs/data/my_episodes"
    dataset = open_dataset("runs/data/my_episodes")
    with np.load("my_episodes/episode_003.npz") as data:
        np.testing.assert_allclose(dataset.read(3).actions[:, :6], np.deg2rad(data["target"]), rtol=1e-5)
        np.testing.assert_allclose(dataset.read(3).actions[:, 6], data["grip_command"])
    assert dataset.episode_names[3] == "my_episodes/episode_003" and dataset.instructions[3] == TASKS[1]
    inspect.main(command("inspect"))
    assert capsys.readouterr().out.splitlines()[-1].endswith("runs/data/my_episodes.html")


@pytest.mark.slow
def test_train(there, capsys):
    if not (there / "runs/data/my_episodes").exists():
        convert.main(command("convert"))
    small = [
        "--config.steps=4",
        "--config.checkpoint_every=4",
        "--config.validate_every=2",
        "--config.log_every=2",
        "--config.optimizer.warmup_steps=1",
    ]
    train.main([*command("train"), *small, "--config.data.batch_size=8"])
    assert "my_arm" in capsys.readouterr().out
    assert (there / "runs/my_robot/contract.json").is_file()
