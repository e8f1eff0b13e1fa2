"""Curves of arms and seeds, from files to a table."""

import json

import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.evaluation.improvement import figure, load_arm, table


@pytest.fixture
def run_dir(tmp_path):
    """Two seeds; the second is one evaluation behind."""
    for seed, rates in enumerate(([0.4, 0.5, 0.9], [0.4, 0.7])):
        directory = tmp_path / "na" / f"seed{seed}"
        directory.mkdir(parents=True)
        lines = [
            {"kind": "evaluation", "split": "swapped", "step": 1000 * k, "time": 0, "rate": rate}
            for k, rate in enumerate(rates)
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {"before": [{"split": "swapped", "rate": 0.4}], "after": [], "steps": 2000}
    (tmp_path / "na" / "seed0" / "before_after.json").write_text(json.dumps(rows))
    return tmp_path / "na"


def test_seeds_are_compared_as_far_as_all_have_come(run_dir):
    arm = load_arm(run_dir, "swapped")
    assert arm.name == "na" and arm.before == 0.4
    np.testing.assert_array_equal(arm.steps, [0, 1000])
    np.testing.assert_array_equal(arm.rates, [[0.4, 0.5], [0.4, 0.7]])
    low, high = arm.band()
    np.testing.assert_allclose([low, high], [[0.4, 0.5], [0.4, 0.7]])
    assert "| na | 2 | 1,000 | 40.0 % | 60.0 % [50.0, 70.0] | 1,000 |" in table([arm])
    axis = figure([arm]).axes[0]
    assert [line.get_ydata()[-1] for line in axis.lines] == pytest.approx([0.5, 0.7, 0.6, 0.4])


def test_a_directory_without_that_curve_is_refused(run_dir):
    with pytest.raises(UserError, match="no seed that was judged on 'blank'"):
        load_arm(run_dir, "blank")
    with pytest.raises(UserError, match="no seed that was judged"):
        load_arm(run_dir.parent / "nothing", "swapped")
