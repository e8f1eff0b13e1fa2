"""docs/add_your_robot.md, done as it says: its Python files, its folder, its commands."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from experiments import convert, inspect, train
from tests.data.published import write_published
from vla_jax.data import convert as conversion
from vla_jax.data.dataset import open_dataset
from vla_jax.data.episode import decode_jpeg, fit_picture
from vla_jax.data.loader import open_data
from vla_jax.training.checkpoints import load_policy

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


SMALL = (
    "--config.steps=2",
    "--config.checkpoint_every=2",
    "--config.validate_every=0",
    "--config.optimizer.warmup_steps=1",
    "--config.data.image_size=32",
    "--config.data.batch_size=8",
    "--config.data.chunk=4",
    "--config.policy.chunk=4",
    "--config.policy.queries=2",
    "--config.policy.encoder=keypoints",
    "--config.policy.keypoints.points=4",
    *(f"--config.policy.trunk.{size}" for size in ("width=16", "depth=1", "heads=1", "kv_heads=1", "head_width=16")),
    *(f"--config.policy.expert.{size}" for size in ("width=16", "depth=2", "heads=1", "hidden=16", "head=16")),
)


def test_train_on_a_mixture_and_drive_one_of_its_robots(there):
    if not (there / "runs/data/my_episodes").exists():
        convert.main(command("convert"))
    droid = write_published(there / "published", "droid", [[6, 5], [4, 6]], "open the drawer")
    conversion.convert(conversion.ConvertConfig(str(droid), "droid"), there / "runs/data")
    (there / "my_mixture.py").write_text(re.search(r"```python\n(from configs.*?)```", PAGE, re.DOTALL)[1])
    line = re.search(r"python -m experiments\.train (--config=my_mixture.*)\n", PAGE)[1]
    train.main([*shlex.split(line), *SMALL])

    snippet = re.search(r"```python\n(import jax\n.*?)```", PAGE, re.DOTALL)[1]
    episode = open_dataset("runs/data/my_episodes").read(3)
    scope = {"image": decode_jpeg(episode.images["front"][5]), "state": episode.state[5]}
    exec(snippet, scope)
    _, contract, config = load_policy("runs/my_mixture")
    assert (len(contract.action_names), scope["dimensions"].sum()) == (8, 7)
    seen = open_data(config.data, contract).read(3)  # as the training saw the same step
    np.testing.assert_allclose(scope["padded"][0], seen.state[5], atol=1e-6)
    np.testing.assert_array_equal(scope["images"]["front"][0], fit_picture(scope["image"], (32, 32)))
    assert scope["actions"].shape == (1, 4, 7) and np.isfinite(scope["actions"]).all()
    low, high = (np.array(bound) for bound in contract.robots["my_arm"].action_bounds())
    again = np.asarray(scope["chunk"])[0, :, :7]
    np.testing.assert_allclose(scope["actions"][0], low + (again + 1) / 2 * (high - low), rtol=1e-5)
    assert (np.asarray(scope["chunk"])[..., 7] == 0).all(), "my_arm has no eighth dimension"
