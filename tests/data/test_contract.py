"""The contract inverts exactly, survives idle dimensions, and says what differs."""

import dataclasses
import json
import os

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from vla_jax.data.contract import FLOORS, Contract, bounds, compute_contract, denormalize, normalize
from vla_jax.data.rlds import write_rlds
from vla_jax.data.statistics import RunningStatistics
from vla_jax.errors import UserError


def test_one_pass_equals_numpy(contract, episodes):
    for statistics, arrays in (
        (contract.action_statistics, [episode.actions for episode in episodes]),
        (contract.state_statistics, [episode.state for episode in episodes]),
    ):
        rows = np.concatenate(arrays).astype(np.float64)
        assert statistics.count == len(rows)
        np.testing.assert_allclose(statistics.minimum, rows.min(0))
        np.testing.assert_allclose(statistics.maximum, rows.max(0))
        np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=1e-9)
        np.testing.assert_allclose(statistics.std, rows.std(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(statistics.q01, np.quantile(rows, 0.01, axis=0), rtol=1e-9)
        np.testing.assert_allclose(statistics.q99, np.quantile(rows, 0.99, axis=0), rtol=1e-9)


def test_quantiles_of_a_stream_larger_than_memory():
    rows = np.linspace(0, 1, 200_000, dtype=np.float32)[:, None]  # in order: late rows must not crowd out early ones
    running = RunningStatistics(1, max_rows=20_000)
    for block in np.array_split(rows, 37):
        running.update(block)
    result = running.result()
    assert result.q01[0] == pytest.approx(0.01, abs=0.003) and result.q99[0] == pytest.approx(0.99, abs=0.003)
    assert result.mean[0] == pytest.approx(0.5, rel=1e-6) and result.count == 200_000


def test_no_picture_is_decoded(dataset_path, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", None)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    assert compute_contract(dataset_path).action_statistics.count > 0


@given(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3))
def test_normalisation_inverts(contract, values):
    action = np.array(values, np.float32)
    back = contract.denormalize_action(contract.normalize_action(action))
    np.testing.assert_allclose(back, action, rtol=1e-5, atol=1e-6)
    state = action[:2]
    np.testing.assert_allclose(contract.denormalize_state(contract.normalize_state(state)), state, rtol=1e-5, atol=1e-6)


def test_quantiles_become_one(contract):
    low, high = contract.action_bounds()
    np.testing.assert_allclose(contract.normalize_action(low), -1, atol=1e-6)
    np.testing.assert_allclose(contract.normalize_action(high), 1, atol=1e-6)
    assert low.dtype == high.dtype == np.float32
    assert low[0] == np.float32(contract.action_statistics.q01[0])


def test_numpy_and_jax_agree(contract, episodes):
    actions = episodes[0].actions
    ours, theirs = contract.normalize_action(actions), contract.normalize_action(jnp.asarray(actions))
    assert isinstance(theirs, jnp.ndarray) and theirs.dtype == jnp.float32 and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-5)  # the idle dimension divides 1e-9 by 1e-3


def test_idle_dimension_is_zero_and_inverts(contract):
    assert contract.action_statistics.std[2] < 1e-8  # the opening never moves in the synthetic data
    idle = np.array([0.0, 0.0, 0.08], np.float32)
    assert abs(contract.normalize_action(idle)[2]) < 1e-4
    assert contract.denormalize_action(contract.normalize_action(idle))[2] == pytest.approx(0.08, abs=1e-7)
    low, high = contract.action_bounds()
    assert high[2] - low[2] == pytest.approx(FLOORS["m"], rel=1e-4)


def test_rare_movement_of_an_idle_dimension_stays_bounded():
    rows = np.zeros((1000, 1), np.float32)
    rows[5] = 0.01  # one centimetre, once: less than one per cent of the data
    running = RunningStatistics(1)
    running.update(rows)
    low, high = bounds(running.result(), ("m",))
    assert np.abs(normalize(rows, low, high)).max() == pytest.approx(0.01 / (FLOORS["m"] / 2))
    np.testing.assert_allclose(denormalize(normalize(rows, low, high), low, high), rows, atol=1e-7)


def test_table_names_the_idle_dimension(contract):
    lines = contract.table().splitlines()
    assert [line.split()[1] for line in lines[1:]] == [*contract.action_names, *contract.state_names]
    assert [("nearly constant" in line) for line in lines[1:]] == [False, False, True, False, False]


def test_file_round_trip(contract, tmp_path):
    contract.save(tmp_path / "contract.json")
    assert Contract.load(tmp_path / "contract.json") == contract
    assert os.listdir(tmp_path) == ["contract.json"]


def test_changed_file_is_refused(contract, tmp_path):
    path = tmp_path / "contract.json"
    contract.save(path)
    path.write_text(path.read_text().replace('"control_hz": 10.0', '"control_hz": 20.0'))
    with pytest.raises(UserError, match="changed after it was sealed"):
        Contract.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seal": "x"}', json.dumps({"contract": {}, "seal": []})])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "contract.json"
    path.write_text(text)
    with pytest.raises(UserError, match="contract"):
        Contract.load(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no contract at .*nowhere.json"):
        Contract.load(tmp_path / "nowhere.json")


def test_failed_save_keeps_the_old_file(contract, tmp_path, monkeypatch):
    path = tmp_path / "contract.json"
    contract.save(path)

    def refuse(*arguments):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError):
        dataclasses.replace(contract, control_hz=5.0).save(path)
    assert Contract.load(path) == contract


def test_check_names_every_difference_in_one_line(contract):
    contract.check(contract)
    other = dataclasses.replace(
        contract, control_hz=20.0, action_units=("m", "rad", "rad"), facts=contract.facts | {"rho": 0.5}, tokenizer="{}"
    )
    with pytest.raises(UserError) as raised:
        contract.check(other)
    message = str(raised.value)
    assert "\n" not in message
    for part in (
        "control_hz: expected 10.0, found 20.0",
        "action_units",
        "facts.rho: expected 0.1, found 0.5",
        "tokenizer",
    ):
        assert part in message
    assert "state" not in message and len(message) < 500


def test_every_field_matters(contract):
    changes = {
        "embodiment": "panda",
        "images": {"front": (64, 64)},
        "action_names": ("a", "b", "c"),
        "action_representation": "absolute",
        "prompt_format": "do: {instruction}",
        "max_tokens": 3,
        "fingerprint": "0",
        "state_statistics": dataclasses.replace(contract.state_statistics, q01=(0.0, 0.0)),
    }
    for name, value in changes.items():
        with pytest.raises(UserError, match=name):
            contract.check(dataclasses.replace(contract, **{name: value}))


def test_unknown_unit_is_refused(tmp_path, interface, episode):
    path = write_rlds(tmp_path, "x", [episode(0)], interface(state_units=("inch", "1")), {})
    with pytest.raises(UserError, match="unknown unit 'inch'"):
        compute_contract(path)


def test_same_data_gives_the_same_contract(contract, tmp_path, interface, episodes):
    again = write_rlds(tmp_path, "synthetic", iter(episodes), interface(), contract.facts)
    contract.check(compute_contract(again))
