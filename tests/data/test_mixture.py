"""Several datasets in one stream: weights, units of each robot, exact resumption, and what does not go together."""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.data.published import write_published
from vla_jax.data import steps as stored
from vla_jax.data.contract import Contract, compute_contract
from vla_jax.data.convert import ConvertConfig, convert
from vla_jax.data.dataset import open_dataset
from vla_jax.data.loader import BatchReader, DataConfig, data_contract, describe_data, make_loader, members, open_data
from vla_jax.data.rlds import write_rlds
from vla_jax.errors import UserError


@pytest.fixture(scope="module")
def robots(tmp_path_factory):
    """Bridge (7 actions) and DROID (8, and a wrist view)."""
    directory = tmp_path_factory.mktemp("robots")
    paths = {}
    for kind, text in (("bridge", "put the cup away"), ("droid", "open the drawer of the desk")):
        source = write_published(directory / "published", kind, [[6, 5, 7, 6], [4, 6]], text)
        paths[kind] = str(convert(ConvertConfig(str(source), kind), directory).dataset.directory)
    return paths


@pytest.fixture
def config(robots):
    mixture = ((robots["bridge"], 3.0), (robots["droid"], 1.0))
    return DataConfig(mixture=mixture, image_size=16, batch_size=8, chunk=3, held_out_fraction=0.0)


def take(config, count, contract=None, state=None):
    loader = make_loader(config, contract or data_contract(config))
    if state:
        loader.set_state(state)
    batches = list(itertools.islice(loader, count))
    state = loader.get_state()
    loader.close()
    return batches, state


def test_each_robot_keeps_its_units(config, robots):
    contract = data_contract(config)
    assert list(contract.robots) == ["widowx", "droid_franka"]
    assert contract.images == {"front": (16, 16)}  # the view that both have
    datasets = [open_dataset(path) for path in robots.values()]
    for batch in take(config, 8, contract)[0]:
        assert batch["actions"].shape == (8, 3, 8) and batch["state"].shape == (8, 8)
        for row, (number, step) in enumerate(zip(batch["episode"], batch["step"], strict=True)):
            droid = int(number >= len(datasets[0]))
            episode = datasets[droid].read(number - len(datasets[0]) * droid)
            robot = contract.robots["droid_franka" if droid else "widowx"]
            width = len(robot.action_names)
            back = robot.denormalize_action(batch["actions"][row, 0, :width])
            np.testing.assert_allclose(back, episode.actions[step], atol=1e-5)
            np.testing.assert_array_equal(batch["actions"][row, :, width:], 0)
            left = np.arange(3) < len(episode.actions) - step
            np.testing.assert_array_equal(batch["action_mask"][row], left[:, None] & (np.arange(8) < width))
            back = robot.denormalize_state(batch["state"][row, : len(robot.state_names)])
            np.testing.assert_allclose(back, episode.state[step], atol=1e-5)


def test_a_step_of_a_converted_member_costs_its_own_picture(robots, dataset_path, monkeypatch):
    """Beside a collected member, whose episodes are kept whole."""
    mixture = ((str(dataset_path), 1.0), (robots["droid"], 1.0))
    config = DataConfig(mixture=mixture, image_size=16, batch_size=8, chunk=3, held_out_fraction=0.0)
    contract = data_contract(config)
    reader = BatchReader(open_data(config, contract), contract, config, views=("front",))
    first, read, original = len(open_dataset(dataset_path)), [], stored._Column.__getitem__
    monkeypatch.setattr(stored._Column, "__getitem__", lambda self, step: read.append(step) or original(self, step))
    batch = reader(np.linspace(0, len(reader) - 1, 40).astype(int))
    converted = batch["episode"] >= first
    assert 0 < converted.sum() < 40 and read == batch["step"][converted].tolist()


def test_a_robot_is_asked_for_by_its_name(config):
    contract = data_contract(config)
    np.testing.assert_array_equal(contract.dimensions("widowx"), np.arange(8) < 7)
    assert contract.dimensions("droid_franka").all()
    with pytest.raises(UserError, match="knows no robot 'widow': choose one of widowx, droid_franka"):
        contract.dimensions("widow")


def test_members_alone(config, robots):
    alone = members(config)
    assert list(alone) == ["bridge_dataset", "droid"]
    contract = data_contract(config)
    (batch,), _ = take(alone["bridge_dataset"], 1, contract)
    assert batch["actions"].shape[-1] == 8 and not batch["action_mask"][..., 7].any()
    twice = dataclasses.replace(config, mixture=config.mixture + config.mixture[:1])
    assert list(members(twice)) == ["bridge_dataset", "droid", "bridge_dataset_3"]
    assert members(dataclasses.replace(config, split="held_out")) == {}  # no episode is
    assert members(dataclasses.replace(config, mixture=(), directory=robots["droid"])) == {}


def test_statistics_of_a_robot_are_those_of_its_dataset(config, robots):
    contract = data_contract(config)
    alone = compute_contract(robots["bridge"])
    assert contract.robots["widowx"].action_statistics == alone.action_statistics
    low, high = contract.action_bounds()
    np.testing.assert_array_equal(low, -1), np.testing.assert_array_equal(high, 1)
    text = contract.table()
    assert "widowx\n" in text and "action dx" in text and "action joint_7" in text


def test_weights_and_rounds(config, robots):
    batches, _ = take(config, 60)
    first = len(open_dataset(robots["bridge"]))
    numbers = np.concatenate([batch["episode"] for batch in batches])
    assert (numbers < first).mean() == pytest.approx(0.75, abs=0.02)
    pairs = [p for b in batches for p in zip(b["episode"].tolist(), b["step"].tolist(), strict=True) if p[0] < first]
    steps = int(open_dataset(robots["bridge"]).lengths.sum())
    assert len(set(pairs[:steps])) == steps == len(set(pairs[steps : 2 * steps]))  # every step once a round
    assert pairs[:steps] != pairs[steps : 2 * steps]


def test_a_run_is_told_how_often_it_sees_its_data(config, robots):
    lines = describe_data(config, data_contract(config), 1000).splitlines()
    steps = open_dataset(robots["bridge"]).lengths.sum()
    assert lines[1].split() == ["bridge_dataset", "widowx", "6", str(steps), "75.0%", f"{750 / steps:.2f}"]
    assert len(lines) == 3  # nothing stands still here


@pytest.mark.parametrize("changes", [{}, {"threads": 3, "prefetch": 1}, {"workers": 1}])
def test_resumes_exactly(config, changes):
    contract = data_contract(config)
    batches, _ = take(config, 14, contract)
    _, state = take(config, 9, contract)
    following, _ = take(dataclasses.replace(config, **changes), 5, contract, state)
    for one, other in zip(batches[9:], following, strict=True):
        for name in ("episode", "step", "actions", "state", "tokens"):
            np.testing.assert_array_equal(one[name], other[name])
        np.testing.assert_array_equal(one["images"]["front"], other["images"]["front"])


def test_other_weights_are_another_stream(config):
    contract = data_contract(config)
    _, state = take(config, 2, contract)
    other = dataclasses.replace(config, mixture=tuple((path, 1.0) for path, _ in config.mixture))
    with pytest.raises(UserError, match="cannot resume the data.*dataset was"):
        take(other, 1, contract, state)


def test_held_out_episodes_are_those_of_each_dataset_alone(config, robots):
    def chosen(config):
        contract = data_contract(config)
        return BatchReader(open_data(config, contract), contract, config).episodes

    for split in ("train", "held_out"):
        config = dataclasses.replace(config, held_out_fraction=0.5, split=split)
        alone = [chosen(dataclasses.replace(config, mixture=(), directory=path)) for path in robots.values()]
        counted_on = np.concatenate([alone[0], alone[1] + len(open_dataset(robots["bridge"]))])
        np.testing.assert_array_equal(chosen(config), counted_on)


def test_sealed_contract_survives_its_file(config, tmp_path):
    contract = data_contract(config)
    contract.save(tmp_path / "contract.json")
    loaded = Contract.load(tmp_path / "contract.json")
    assert loaded == contract and loaded.robots["widowx"].action_bounds()[0].shape == (7,)
    take(config, 1, loaded)


def test_a_dataset_of_another_robot_is_refused(config, robots, tmp_path, interface, episode):
    contract = data_contract(config)
    other = write_rlds(tmp_path, "x", [episode(0)], interface(images={"front": (32, 24), "wrist": (32, 24)}), {})
    with pytest.raises(UserError, match="is of none of the robots of the contract .widowx, droid_franka"):
        take(dataclasses.replace(config, mixture=((str(other), 1.0),)), 1, contract)


def test_datasets_of_one_robot_keep_physical_units(tmp_path, interface, episodes):
    facts = {"task": "reach", "rho": 0.1}
    one = write_rlds(tmp_path, "one", episodes[:6], interface(), facts)
    two = write_rlds(tmp_path, "two", episodes[6:12], interface(), facts | {"rho": 0.5})
    config = DataConfig(mixture=((str(one), 1.0), (str(two), 1.0)), batch_size=4, held_out_fraction=0.0)
    contract = data_contract(config)
    assert not contract.robots and contract.facts == {"task": "reach"} and contract.action_names[0] == "dx"
    rows = np.concatenate([episode.actions for episode in episodes[:12]]).astype(np.float64)
    np.testing.assert_allclose(contract.action_statistics.q99, np.quantile(rows, 0.99, axis=0), rtol=1e-6)
    for batch in take(config, 5, contract)[0]:
        for row, (number, step) in enumerate(zip(batch["episode"], batch["step"], strict=True)):
            np.testing.assert_array_equal(batch["actions"][row, 0], episodes[number].actions[step])


def test_what_does_not_go_together_is_named(config, robots, tmp_path, interface, episode):
    with pytest.raises(UserError, match="view front is .32, 32. in bridge_dataset and .18, 32. in droid"):
        data_contract(dataclasses.replace(config, image_size=0))
    single = dataclasses.replace(episode(0), images={"side": episode(0).images["front"]})
    path = write_rlds(tmp_path, "x", [single], interface(images={"side": (32, 24)}), {})
    with pytest.raises(UserError, match="no view in common: bridge_dataset has front; x has side"):
        data_contract(dataclasses.replace(config, mixture=((robots["bridge"], 1.0), (str(path), 1.0))))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"directory": "x"}, "takes the place of data.directory"),
        ({"balance": 1.0}, "data.balance cannot be used"),
        ({"mixture": (("x", 0.0),)}, "every weight must be above 0"),
    ],
)
def test_wrong_settings(config, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **changes)
