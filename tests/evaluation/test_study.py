"""The table of a study from the outcomes of its cells."""

import json

import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.evaluation.results import Results
from vla_jax.evaluation.study import Cell, comparisons, figure, load_cells, markdown, measure_table, save_cell, table

SCENES = 40


def save(directory, arm, seed, rates, mark="same", rho=0.1):
    """A cell whose first scenes succeed; all other scenes of `swapped` are stuck."""
    scenes = {}
    for split, rate in rates.items():
        success = np.arange(SCENES) < rate * SCENES
        scenes[split] = {
            "success": success.tolist(),
            "stuck": (~success).tolist(),
            "conflict": [split == "swapped"] * SCENES,
        }
    results = Results(arm, 10, {}, [], scenes, dict.fromkeys(rates, mark), 1.0)
    measures = {"identification": 0.5 + seed / 10, "pmi": 0.1, "target_entropy": 0.29, "calibration_gap": 2.0}
    measures |= {"sensitivity": 0.4, "sensitivity_se": 0.01}
    save_cell(directory, Cell("uniqueness", rho, arm, seed), results, {"commit": "c0ffee"}, measures)


@pytest.fixture
def cells(tmp_path):
    for seed, (base, full) in enumerate([(0.1, 0.5), (0.2, 0.7), (0.15, 0.6)]):
        save(tmp_path, "baseline", seed, {"in_distribution": 0.9, "swapped": base})
        save(tmp_path, "full", seed, {"in_distribution": 0.9, "swapped": full})
    return tmp_path


def test_rows_are_means_over_seeds(cells):
    rows = {(row["arm"], row["split"]): row for row in table(load_cells(cells))}
    row = rows["full", "swapped"]
    assert row["by_seed"] == [0.5, 0.7, 0.6] and row["seeds"] == 3
    assert row["rate"] == pytest.approx(0.6) and row["deviation"] == pytest.approx(0.1)
    assert row["stick"] == pytest.approx(0.4) and rows["full", "in_distribution"]["stick"] is None


def test_differences_are_paired_by_seed_and_corrected(cells):
    save(cells, "full", 3, {"in_distribution": 0.0, "swapped": 0.0})  # a seed that the reference has not run yet
    rows = {row["split"]: row for row in comparisons(load_cells(cells), "baseline")}
    gap = rows["swapped"]
    assert gap["difference"] == pytest.approx(0.45) and gap["by_seed"] == pytest.approx((0.4, 0.5, 0.45))
    assert gap["seeds"] == 3 and 0.25 < gap["low"] < 0.45 < gap["high"] < 0.65
    assert gap["p_holm"] == gap["p"] < 0.01, "one arm on this split"
    assert rows["in_distribution"]["difference"] == 0 and rows["in_distribution"]["p_holm"] == 1
    assert comparisons(load_cells(cells), "baseline", ["swapped"]) == [gap], "the same, without the work for the others"


def test_correction_is_for_the_arms_of_one_setting_and_split(cells):
    for seed in range(3):
        save(cells, "third", seed, {"swapped": 0.16})
        save(cells, "full", seed, {"swapped": 0.5}, rho=0.3)
    rows = comparisons(load_cells(cells), "baseline")
    corrected = {row["arm"]: row for row in rows if row["split"] == "swapped"}
    assert corrected["full"]["p_holm"] == pytest.approx(2 * corrected["full"]["p"])
    assert len(rows) == 3, "a seed or rho without the reference, or a split that one of them lacks, is left out"


def test_nothing_is_called_sure_from_one_or_two_seeds(tmp_path):
    for seed in range(3):
        assert "\\*" not in markdown(load_cells(tmp_path), "baseline").replace("\\* where", "")
        save(tmp_path, "baseline", seed, {"swapped": 0.1})
        save(tmp_path, "full", seed, {"swapped": 0.9})
    assert markdown(load_cells(tmp_path), "baseline").replace("\\* where", "").count("\\*") == 1


def test_other_scenes_are_not_compared(cells):
    save(cells, "full", 0, {"swapped": 0.5}, mark="other")
    with pytest.raises(UserError, match="full and baseline met other scenes of 'swapped'"):
        comparisons(load_cells(cells), "baseline")


def test_markdown_holds_every_number(cells):
    save(cells, "baseline", 0, {"swapped": 0.25}, rho=0.3)
    text = markdown(load_cells(cells), "baseline")
    assert "### uniqueness, ρ = 0.1" in text and "### uniqueness, ρ = 0.3" in text
    assert "60.0 ± 10.0 [40]<br>+45.0 [" in text and "| baseline | 1 | 25.0 [75] |" in text
    full = next(line for line in text.splitlines() if line.startswith("| full"))
    assert full.count("\\*") == 1, "only the swapped split differs for sure"
    assert "| full | 0.1 | 3 | 60.0 ± 10.0 | 0.100 ± 0.000 | 0.290 ± 0.000 | 2.000 ± 0.000 | 0.400 ± 0.000 |" in text
    assert "| baseline | 0.3 | 1 | 50.0 | 0.100 | 0.290 | 2.000 | 0.400 |" in text


def test_measures_are_means_over_seeds(cells):
    rows = {(row["arm"], row["measure"]): row for row in measure_table(load_cells(cells))}
    row = rows["full", "identification"]
    assert row["mean"] == pytest.approx(0.6) and row["deviation"] == pytest.approx(0.1) and row["seeds"] == 3
    assert row["by_seed"] == pytest.approx([0.5, 0.6, 0.7]) and rows["full", "sensitivity_se"]["mean"] == 0.01


def test_files_from_before_the_measures_load(cells):
    for path in cells.glob("*.json"):
        values = json.loads(path.read_text())
        del values["measures"]
        path.write_text(json.dumps(values))
    results = load_cells(cells)
    assert all(result.measures == {} for result in results) and len(table(results)) == 4
    assert measure_table(results) == [] and "Listening" not in markdown(results, "baseline")


def test_the_figure_shows_each_arm_at_its_rates(cells):
    panels = figure(load_cells(cells)).axes
    assert [axis.get_title() for axis in panels] == ["in distribution (uniqueness)", "swapped (uniqueness)"]
    (means,) = (line for line in panels[1].get_lines() if line.get_label() == "ρ = 0.1")
    labels = [text.get_text() for text in panels[0].get_yticklabels()]
    names = dict(zip(panels[0].get_yticks(), labels, strict=True))
    shown = {names[place]: rate for rate, place in zip(*means.get_data(), strict=True)}
    assert shown == pytest.approx({"full": 0.6, "baseline": 0.15})


def test_a_damaged_file_is_named(cells):
    path = next(cells.glob("*.json"))
    path.write_text(json.dumps({"cell": {"coupling": "uniqueness"}}))
    with pytest.raises(UserError, match=f"{path.name} does not hold the result"):
        load_cells(cells)
