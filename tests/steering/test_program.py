"""Reward programs: what they compute, and that a bad one is an error that names its term."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.steering.check import _climb, check
from vla_jax.steering.program import Program, Stage, parse, stack
from vla_jax.steering.terms import TERMS, Term, View

LABELS = ("red cube", "red cube", "plate")
NOW = jnp.array([[0.5, 0.1, 0.02], [0.5, 0.12, 0.04], [0.4, -0.1, 0.0]])
VIEW = View(NOW, NOW - jnp.array([0.0, 0.05, 0.0]))
PATH = jnp.array([[0.4, 0.0, 0.1], [0.42, 0.0, 0.1], [0.44, 0.02, 0.1], [0.43, 0.06, 0.08], [0.47, 0.1, 0.05]])
KEY = jax.random.key(0)

EXAMPLES = {
    "distance": {"keypoint": 0, "offset": [0, 0, 0.03], "tail": 0.5, "tail_weight": 3},
    "height": {"height": 0.06},
    "progress": {"keypoint": 0, "axis": [2, 0, 0], "distance": 0.08},
    "perpendicular": {"keypoint": 0, "axis": [0, 1, 0]},
    "contact": {"keypoint": 1, "head": 0.5},
    "avoid": {"keypoint": 2, "radius": 0.3, "axes": [1, 1, 0]},
    "backtrack": {"axis": [1, 0, 0]},
}


def program(*names, **changes) -> str:
    listed = [{"term": name, **EXAMPLES[name], **changes} for name in names]
    return json.dumps({"stages": [{"name": "go", "terms": listed}]})


def test_every_term_has_an_example():
    assert set(EXAMPLES) == set(TERMS)


def test_terms_measure_what_they_say():
    def value(name):
        return float(parse(program(name), LABELS).stages[0].terms[0](VIEW, PATH))

    rows, now, start = np.asarray(PATH)[1:], np.asarray(VIEW.now), np.asarray(VIEW.start)
    square = ((rows - now[0] - [0, 0, 0.03]) ** 2).sum(-1)
    assert np.isclose(value("distance"), -(square * [1, 1, 3, 3]).sum() / 8, rtol=1e-4)
    high = (rows[:, 2] - 0.06) ** 2  # of four poses the last 30 % is one
    assert np.isclose(value("height"), -(high * [1, 1, 1, 3]).sum() / 6, rtol=1e-4)
    left = np.maximum(0.08 - (rows[:, 0] - start[0, 0]), 0) ** 2
    assert np.isclose(value("progress"), -(left * [1, 1, 1, 3]).sum() / 6, rtol=1e-4)
    assert np.isclose(value("perpendicular"), -((rows - start[0])[:, [0, 2]] ** 2).sum(-1).mean(), rtol=1e-4)
    assert np.isclose(value("contact"), -((rows[:2] - now[1]) ** 2).sum(-1).mean(), rtol=1e-4)
    near = np.maximum(0.3 - np.linalg.norm((rows - now[2])[:, :2], axis=-1), 0)
    assert np.isclose(value("avoid"), -(near**2).mean(), rtol=1e-4)
    assert np.isclose(value("backtrack"), -(0.01**2) / 5, rtol=1e-3)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_agree_with_finite_differences(name):
    term, h = parse(program(name), LABELS).stages[0].terms[0], 1e-3
    # On a metre's scale, where differences of float32 numbers are exact enough.
    path, view = 3 * PATH, View(3 * VIEW.now, 3 * VIEW.start)
    gradient = jax.grad(lambda path: term(view, path))(path)
    # A running maximum has a kink where two poses are equally far: none of these steps crosses one.
    for place in ((3, 0), (4, 2), (2, 1)):
        step = jnp.zeros_like(path).at[place].set(h)
        difference = (term(view, path + step) - term(view, path - step)) / (2 * h)
        np.testing.assert_allclose(gradient[place], difference, atol=2e-3)


def test_stages_and_names():
    text = json.dumps(
        {
            "stages": [
                {"name": "reach", "terms": [{"term": "distance", "keypoint": "plate", "weight": 2}]},
                {
                    "name": "rise",
                    "until": "gripper",
                    "terms": [{"term": "height", "height": 0.2}, {"term": "backtrack", "axis": [0, 0, 1]}],
                },
            ]
        }
    )
    found = parse(text, LABELS)
    assert int(found.stages[0].terms[0].keypoint) == 2
    for stage, part in enumerate(found.stages):
        expected = sum(float(term(VIEW, PATH)) for term in part.terms)
        assert np.isclose(float(found.reward(VIEW, PATH, jnp.int32(stage))), expected)
    assert [part.until for part in found.stages] == ["either", "gripper"]
    again = parse(found.to_json(), LABELS)
    jax.tree.map(np.testing.assert_array_equal, found, again)


def test_programs_of_one_structure_are_stacked():
    first, second = (parse(program("distance", keypoint=k), LABELS) for k in (0, 2))
    both = jax.vmap(lambda p: p.reward(VIEW, PATH, 0))(stack([first, second]))
    np.testing.assert_allclose(both, [float(p.reward(VIEW, PATH, 0)) for p in (first, second)])
    other = dataclasses.replace(second, stages=(dataclasses.replace(second.stages[0], name="come"),))
    assert jax.tree.structure(stack([first, other])) == jax.tree.structure(stack([first, second])), "whatever the names"
    with pytest.raises(UserError, match="split it"):
        stack([first, parse(program("height"), LABELS)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Here is your program!", "not JSON .*Here is your program"),
        ('{"stages": []}', "1 to 8 stages"),
        ('{"steps": []}', "lacks 'stages'"),
        ('{"stages": [{"name": "a", "terms": [{"term": "height", "height": 1}], "until": "dawn"}]}', "got 'dawn'"),
        ('{"stages": [{"name": "a", "terms": [{"term": "distanse"}]}]}', "stage 1 .'a'., term 1 .*mean 'distance'"),
        (program("distance", keypoint=3), "'distance'.: keypoint is 3, but there are 3 keypoints"),
        (program("distance", keypoint=-1), "keypoint is -1"),
        (program("distance", keypoint="blue ball"), "'blue ball', but the keypoints lie on red cube, plate"),
        (program("distance", keypoint=1.5), "number of a keypoint or the name"),
        (program("distance", radius=1), "'distance'. has an unknown field 'radius'"),
        ('{"stages": [{"name": "a", "terms": [{"term": "avoid", "keypoint": 0}]}]}', "lacks 'radius'"),
        (program("height", height=True), "height must be a finite number, got True"),
        (program("height", height=float("nan")), "height must be a finite number, got nan"),
        (program("height", height=10**400), "height must be a finite number, got 1000"),
        ('{"stages": ' + 100_000 * "[", "not JSON"),
        (program("distance", weight=0), "weight must be above 0"),
        (program("distance", tail=1.5), r"tail must be in \(0, 1\]"),
        (program("distance", offset=[1, 2]), "offset must be three numbers"),
        (program("backtrack", axis=[0, 0, 0]), "axis must point somewhere"),
        (program("avoid", axes=[0, 0, 0]), "axes must be three weights"),
    ],
)
def test_a_bad_program_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse(text, LABELS)


def test_good_programs_pass():
    check(parse(program(*EXAMPLES), LABELS), VIEW, KEY)


@pytest.mark.parametrize("radius", [0.02, 0.03, 0.15])
def test_a_small_ball_to_keep_out_of_is_found(radius):
    term = parse(program("avoid", radius=radius, axes=[1, 1, 1], offset=[0, 0, 0.3]), LABELS)
    for seed in range(12):
        check(term, VIEW, jax.random.key(seed))


def test_names_of_stages_compile_nothing_anew():
    text = program("distance", "height")
    check(parse(text, LABELS), VIEW, KEY)
    compiled = _climb._cache_size()
    check(parse(text.replace('"go"', '"come"'), LABELS), VIEW, KEY)
    assert _climb._cache_size() == compiled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Broken(Term):
    """A term that fails in a chosen way."""

    how: str = dataclasses.field(metadata={"static": True})
    name = "broken"

    def __call__(self, view, path):
        good = -jnp.square(path[1:] - view.now[0]).sum()
        return {
            "vector": jnp.stack([good, good]),
            "nan": jnp.where(path[0, 0] > 0.5, jnp.nan, good),
            "constant": 0 * good + 1.0,
            "stopped": jax.lax.stop_gradient(good),
            "steep": good + 0.0 * jnp.sqrt(jnp.square(path - path).sum()),
            "falling": jax.lax.stop_gradient(2 * good) - good,
        }[self.how]

    cost = None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("vector", "not one number"),
        ("nan", "not finite on every path"),
        ("constant", "same on every path"),
        ("stopped", "zero gradient"),
        ("steep", "gradient that is not finite"),
        ("falling", "does not rise"),
    ],
)
def test_a_term_that_cannot_steer_is_named(how, message):
    good = parse(program("distance"), LABELS).stages[0].terms[0]
    with pytest.raises(UserError, match=f"stage 1 .'go'., term 2 .'broken'. .*{message}"):
        check(Program((Stage("go", (good, Broken(how))),)), VIEW, KEY)


def test_terms_out_of_reach_and_lost_keypoints_are_named():
    with pytest.raises(UserError, match="'avoid'. is the same on every path"):
        check(parse(program("avoid", radius=1e-4), LABELS), VIEW, KEY)
    with pytest.raises(UserError, match="keypoints are not finite"):
        check(parse(program("distance"), LABELS), View(NOW.at[0].set(jnp.nan), NOW), KEY)


def test_the_registry_knows_fields():
    """Every field of every term has a kind."""
    for term in TERMS.values():
        assert set(term.kinds) == {field.name for field in dataclasses.fields(term)}
