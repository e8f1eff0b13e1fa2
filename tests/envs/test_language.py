"""Sentences: what they say, that they are unambiguous, and which words they use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs import language
from vla_jax.envs.language import PARAPHRASES, REFERENTS, TRAIN_TEMPLATES
from vla_jax.envs.scene import COLORS, SHAPES, Command, Scene
from vla_jax.envs.tasks import FAMILIES
from vla_jax.errors import UserError

NAMES = list(COLORS)


def table(objects):
    """A scene of (colour, shape, x, y) objects, as numpy arrays."""
    count = len(objects)
    spare = [("red", "cube", 2.0, 0.3 * slot) for slot in range(count, 4)]  # the empty slots hold leftovers
    colors, shapes, x, y = zip(*objects, *spare, strict=True)
    return Scene(
        color=np.asarray([NAMES.index(color) for color in colors]),
        shape=np.asarray([SHAPES.index(shape) for shape in shapes]),
        present=np.arange(4) < count,
        movable=np.ones(4, bool),
        position=np.stack([x, y], axis=-1).astype(np.float32),
        yaw=np.zeros(4, np.float32),
        zone_present=np.ones(2, bool),
        zone_position=np.zeros((2, 2), np.float32),
        tcp=np.zeros(3, np.float32),
        tcp_yaw=np.float32(0),
        background=np.int32(0),
        light=np.zeros(3, np.float32),
        brightness=np.float32(1),
        camera_shift=np.zeros((2, 3), np.float32),
    )


SCENE = table([("red", "cube", 0.40, 0.10), ("red", "ball", 0.50, 0.12), ("blue", "cylinder", 0.60, -0.10)])


def command(target=0, goal=0, relation=0, referent=0, template=0):
    return Command(*(np.int32(value) for value in (target, goal, relation, referent, template)))


def say(task_name, scene=SCENE, **fields):
    return language.instruction(task_name, scene, command(**fields))


def test_each_family_says_what_is_asked():
    assert say("reach") == "reach the red cube"
    assert say("pick", target=2, template=3) == "take the blue cylinder off the table"
    assert say("push", target=1, relation=0) == "push the red ball to the left"
    assert say("push", target=1, relation=1, template=3) == "use the gripper to push the red ball to the right"
    assert say("push", target=1, relation=2) == "push the red ball towards the robot"
    assert say("push", target=1, relation=3) == "push the red ball away from the robot"
    assert say("place_on", goal=0) == "put the red cube on the plate"
    assert say("place_on", goal=1, template=2) == "pick up the red cube and put it in the bowl"
    assert say("place_relative", goal=2, relation=2) == "put the red cube in front of the blue cylinder"
    assert say("place_relative", goal=1, relation=3, template=5) == "take the red cube and put it behind the red ball"


def test_ways_to_name_an_object():
    fits = language.fitting_referents(SCENE)
    names = [{REFERENTS[r] for r in np.flatnonzero(row)} for row in np.asarray(fits)]
    assert names[0] == {"color and shape", "shape", "nearest"}  # it is 2 cm short of leftmost
    assert names[1] == {"color and shape", "shape"}  # leftmost, but not by the margin
    assert names[2] == {"color and shape", "color", "shape", "rightmost", "farthest"}
    assert names[3] == set()
    spoken = {
        "color": "blue object",
        "shape": "cylinder",
        "rightmost": "rightmost object",
        "farthest": "farthest object",
    }
    for name, words in spoken.items():
        assert say("reach", target=2, referent=REFERENTS.index(name)) == f"reach the {words}"


def test_an_ambiguous_name_is_refused():
    with pytest.raises(ValueError, match="'color' does not single out slot 1"):
        say("reach", target=1, referent=REFERENTS.index("color"))
    with pytest.raises(ValueError, match="slot 3"):
        say("reach", target=3)


def resolve(phrase, scene):
    """The slots that a phrase may mean, by a rule of its own."""
    slots = [slot for slot in range(4) if scene.present[slot]]
    word = phrase.removeprefix("the ").removesuffix(" object")
    x, y = scene.position[:, 0], scene.position[:, 1]
    by_place = {"leftmost": -y, "rightmost": y, "nearest": x, "farthest": -x}
    if word in by_place:
        best = min(by_place[word][slot] for slot in slots)
        return [slot for slot in slots if by_place[word][slot] < best + language.PLACE_MARGIN - 1e-6]
    wanted = set(word.split())
    return [s for s in slots if wanted <= {NAMES[scene.color[s]], SHAPES[scene.shape[s]]}]


def test_a_name_fits_exactly_when_it_means_one_object():
    random = np.random.default_rng(0)
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    counts = np.zeros(len(REFERENTS), int)
    for _ in range(60):
        chosen = random.permutation(len(kinds))[: random.integers(2, 5)]
        scene = table([(*kinds[kind], *random.uniform((0.38, -0.2), (0.62, 0.2))) for kind in chosen])
        fits = np.asarray(language.fitting_referents(scene))
        for slot in np.flatnonzero(scene.present):
            for referent in range(len(REFERENTS)):
                phrase = language.object_phrase(scene.color[slot], scene.shape[slot], referent)
                assert fits[slot, referent] == (resolve(phrase, scene) == [slot]), (phrase, scene)
        counts += fits.sum(0)
    assert (counts > 20).all()


def test_names_are_drawn_by_weight_among_those_that_fit():
    names = np.asarray(language.referent_distribution(SCENE))
    np.testing.assert_allclose(names[:3].sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(names[0, [0, 2, 5]], [0.7 / 0.8, 0.05 / 0.8, 0.05 / 0.8], atol=1e-6)
    assert (names[3] == 0).all()


def test_wording_entropy_is_that_of_the_sentences():
    """Every wording of one command, with its probability: sentences differ, and their entropy is the function's."""
    names = np.asarray(language.referent_distribution(SCENE))[2]
    chance = {}
    for referent in np.flatnonzero(names):
        for template in range(*language.template_range("push")):
            sentence = say("push", target=2, referent=referent, template=template)
            assert sentence not in chance
            chance[sentence] = names[referent] / len(TRAIN_TEMPLATES["push"])
    p = np.asarray(list(chance.values()))
    assert language.wording_entropy("push", SCENE, command(target=2)) == pytest.approx(-np.sum(p * np.log(p)), abs=1e-5)


@pytest.mark.parametrize("task_name", FAMILIES)
def test_paraphrases_are_new_sentences_of_known_words(task_name):
    train, held_out = TRAIN_TEMPLATES[task_name], PARAPHRASES[task_name]
    assert len(train) >= 4 and len(held_out) >= 2
    assert len(set(train + held_out)) == len(train) + len(held_out)
    known = {word for template in train for word in template.split()}
    assert {word for template in held_out for word in template.split()} <= known
    slots = {word for word in train[0].split() if "{" in word}
    for template in train + held_out:
        assert {word for word in template.split() if "{" in word} == slots
    assert language.template_range(task_name) == (0, len(train))
    assert language.template_range(task_name, held_out=True) == (len(train), len(train) + len(held_out))


@pytest.mark.parametrize("task_name", FAMILIES)
def test_sentences_holds_every_sentence(task_name):
    listed = set(language.sentences(task_name))
    fits = np.asarray(language.fitting_referents(SCENE))
    for target in range(3):
        for referent in np.flatnonzero(fits[target]):
            for template in range(len(language.templates(task_name))):
                for relation in range(4):
                    goal = (target + 1) % 3 if task_name == "place_relative" else relation % 2
                    asked = {"target": target, "goal": goal, "relation": relation}
                    assert say(task_name, **asked, referent=referent, template=template) in listed
    assert listed <= set(language.sentences())


def test_the_longest_sentence_is_as_long_as_announced():
    assert language.max_words() == language.MAX_WORDS
    assert max(len(sentence.split()) for sentence in language.sentences("reach")) == language.max_words("reach") == 8


def test_a_batch_is_its_sentences():
    commands = [command(target=0), command(target=2, relation=3, template=1)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *commands)
    scenes = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * 2), SCENE)
    assert language.instructions("push", scenes, batch) == [
        "push the red cube to the left",
        "slide the blue cylinder away from the robot",
    ]


def test_an_unknown_family_is_told():
    with pytest.raises(UserError, match="did you mean 'pick'"):
        language.instruction("pik", SCENE, command())
    with pytest.raises(UserError, match="did you mean 'reach'"):
        language.sentences("reachh")


def test_scenes_keep_their_meaning_when_slots_are_renamed():
    """Which slot an object sits in does not change how it is called."""
    order = np.asarray([2, 0, 1, 3])
    names = ("color", "shape", "present", "position")
    renamed = dataclasses.replace(SCENE, **{name: getattr(SCENE, name)[order] for name in names})
    np.testing.assert_array_equal(language.fitting_referents(renamed), language.fitting_referents(SCENE)[order])
