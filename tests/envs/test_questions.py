"""Questions about the table: their words, their answers, and the stream that brings them."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from vla_jax.data import tokenizer as tokenizers
from vla_jax.envs import language, questions
from vla_jax.envs.bias import HELD_OUT_PAIRS, BiasConfig
from vla_jax.envs.env import EnvConfig
from vla_jax.envs.questions import BINS, KINDS, QuestionConfig, Questioner, QuestionStream, ask
from vla_jax.envs.sampling import SceneConfig
from vla_jax.envs.scene import COLORS, SHAPES, Scene
from vla_jax.envs.tasks import FAMILIES
from vla_jax.errors import UserError


class Words:
    """What a questioner needs of a contract."""

    tokenizer = tokenizers.to_json(tokenizers.train_tokenizer((*language.sentences(), *questions.sentences())))
    max_tokens = language.MAX_WORDS


def make_questioner(seed=0, held_out=False, objects=3):
    return Questioner(
        Words, EnvConfig(image_size=16), BiasConfig("uniqueness", 0.1), SceneConfig(objects), seed, held_out
    )


@pytest.fixture(scope="module")
def questioner():
    return make_questioner()


def decode(batch, row, mask):
    names = {number: word for word, number in tokenizers.from_json(Words.tokenizer).get_vocab().items()}
    return " ".join(names[number] for number in batch["tokens"][row][mask])


def table():
    """A red cube on the left, a green ball in the middle, a dark blue cylinder on the right."""
    colors, shapes = list(COLORS), list(SHAPES)
    values = dict.fromkeys((field for field in Scene.__dataclass_fields__), np.zeros(0))
    values |= {
        "color": np.array([colors.index(name) for name in ("green", "red", "blue", "red")]),
        "shape": np.array([shapes.index(name) for name in ("ball", "cube", "cylinder", "cube")]),
        "present": np.array([True, True, True, False]),
        "position": np.array([[0.5, 0.0], [0.4, 0.15], [0.5, -0.15], [2.0, 0.0]]),
    }
    return Scene(**values)


FITS = np.array([[True, True, True, False, False, False, False]] * 4)
PIXELS = np.array([[0.5, 0.6], [0.2, 0.7], [0.999, 0.0], [9.0, 9.0]])


def all_answers(kind, task="reach"):
    asked = [ask(kind, task, table(), FITS, PIXELS, np.random.default_rng(number)) for number in range(200)]
    return {(question.question, question.answer) for question in asked}


def test_the_whole_table_is_described_from_left_to_right():
    assert all_answers("describe") == {("describe", "a red cube a green ball and a blue cylinder")}


def test_the_views_that_are_shown_look_as_they_do_beside_others(questioner):
    arguments = EnvConfig(image_size=16), BiasConfig("uniqueness", 0.1), SceneConfig(3), 0, False
    alone = Questioner(Words, *arguments, views=("wrist",))(3, np.arange(4))["images"]
    both = questioner(3, np.arange(4))["images"]
    assert set(alone) == {"wrist"} and set(both) == {"front", "wrist"}
    np.testing.assert_array_equal(alone["wrist"], both["wrist"])
    assert (both["front"] != both["wrist"]).any()


def test_the_middle_of_a_place_is_that_place():
    for pixel in np.random.default_rng(0).random((50, 2)):
        assert questions.place(questions.middle(questions.place(pixel))) == questions.place(pixel)
        assert np.abs(questions.middle(questions.place(pixel)) - pixel).max() <= 0.5 / BINS + 1e-9
    assert np.isnan(questions.middle("a red cube")).all() and np.isnan(questions.middle("y3 x4")).all()


def test_places_and_names_answer_each_other():
    where, what = all_answers("where"), all_answers("what")
    places = {"the red cube": "x6 y22", "the green ball": "x16 y19", "the blue cylinder": "x31 y0"}
    for phrase, spot in places.items():
        assert (f"where is {phrase}", spot) in where
        assert (f"what is at {spot}", phrase.replace("the", "a")) in what
    assert ("where is the ball", "x16 y19") in where and ("where is the red object", "x6 y22") in where
    assert len(where) == 9 and len(what) == 3, "three names fit each object; nothing else is asked about"


@pytest.mark.parametrize("task", FAMILIES)
def test_an_instruction_is_answered_by_the_place_of_its_target(task):
    answers = {"red": "x6 y22", "cube": "x6 y22", "green": "x16 y19", "ball": "x16 y19"}
    asked = all_answers("point", task)
    assert len(asked) > 8 and all(len(question.split()) + 2 <= language.MAX_WORDS for question, _ in asked)
    for question, answer in asked:
        words = question[question.index("the") :].split()
        words = words[2:] if words[1] == "gripper" else words  # "move the gripper to the red cube"
        words = words[words.index("the") + 1 :]
        named = [word for word in words[:2] if word in answers]
        assert not named or answers[named[0]] == answer, question


def test_yes_and_no_are_true_and_equally_frequent():
    asked = [ask("exists", "reach", table(), FITS, PIXELS, np.random.default_rng(i)) for i in range(400)]
    there = {"is there a red cube", "is there a green ball", "is there a blue cylinder"}
    assert all((question.question in there) == (question.answer == "yes") for question in asked)
    assert 160 < sum(question.answer == "yes" for question in asked) < 240
    relations = all_answers("relation")
    assert ("is the red cube left of the green ball", "yes") in relations
    assert ("is the green ball left of the red cube", "no") in relations
    assert ("is the red cube in front of the blue cylinder", "yes") in relations
    assert not any("front" in question or "behind" in question for question, _ in relations if "red" not in question)


def test_only_the_kinds_that_are_named_are_asked(questioner):
    arguments = EnvConfig(image_size=16), BiasConfig("uniqueness", 0.1), SceneConfig(3)
    some = Questioner(Words, *arguments, kinds=("exists", "relation"))(0, np.arange(64))
    counts = np.bincount(some["kind"], minlength=len(KINDS))
    assert counts[-2:].min() > 16 and counts[:-2].sum() == 0, "in equal shares, as among all kinds"
    assert {decode(some, row, some["answer_mask"][row]) for row in range(64)} == {"yes", "no"}
    np.testing.assert_array_equal(some["images"]["front"], questioner(0, np.arange(64))["images"]["front"])


@pytest.mark.parametrize("kinds", [(), ("where", "where"), ("were",)])
def test_kinds_that_cannot_be_asked_are_refused(kinds):
    with pytest.raises(UserError, match="did you mean 'where'" if kinds == ("were",) else "name one kind or more"):
        QuestionConfig(kinds=kinds)


def test_a_batch_is_a_function_of_seed_and_number(questioner):
    rows = np.arange(6)
    first, again, next_one = questioner(3, rows), make_questioner()(3, rows), questioner(4, rows)
    for name in ("tokens", "answer_mask", "kind"):
        np.testing.assert_array_equal(first[name], again[name])
    np.testing.assert_array_equal(first["images"]["front"], again["images"]["front"])
    others = [next_one, make_questioner(seed=1)(3, rows), make_questioner(held_out=True)(3, rows)]
    for other in others:
        assert (other["images"]["front"] != first["images"]["front"]).any()
        assert (other["tokens"] != first["tokens"]).any()
    part = questioner(3, rows[1::2])
    np.testing.assert_array_equal(part["tokens"], first["tokens"][1::2])


def test_the_answer_follows_the_question(questioner):
    batch = questioner(0, np.arange(64))
    assert set(batch["kind"]) == set(range(len(KINDS)))
    starts = {"describe": "describe", "where": "where is", "what": "what is at", "exists": "is there"}
    starts |= {"relation": "is the", "point": ("reach", "touch", "move", "go")}
    for row, kind in enumerate(batch["kind"]):
        answer = batch["answer_mask"][row]
        question = batch["token_mask"][row] & ~answer
        assert decode(batch, row, question).startswith(starts[KINDS[kind]])
        assert answer.any() and not (answer & ~batch["token_mask"][row]).any()
        assert np.flatnonzero(question).max() < np.flatnonzero(answer).min()
        if KINDS[kind] == "where":
            column, place = decode(batch, row, answer).split()
            assert 0 <= int(column[1:]) < BINS and int(place[1:]) > BINS // 3, "the table fills the lower part"


def tokens_of_digits():
    """A tokenizer that is not one token a word: "x12" is x, 1 and 2."""
    words = tokenizers.from_json(Words.tokenizer)
    vocabulary = sorted({*words.get_vocab(), "x", "y", *"0123456789"} - {tokenizers.PAD, tokenizers.UNKNOWN})
    numbers = {word: number for number, word in enumerate([tokenizers.PAD, tokenizers.UNKNOWN, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=tokenizers.UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return tokenizer


def test_an_answer_begins_where_its_tokens_do():
    tokenizer = tokens_of_digits()

    class Digits(Words):
        max_tokens = 24

    Digits.tokenizer = tokenizers.to_json(tokenizer)
    world = EnvConfig(image_size=16), BiasConfig("uniqueness", 0.1), SceneConfig(3)
    batch = Questioner(Digits, *world)(0, np.arange(64))
    starts = {"describe": "a ", "where": "x ", "point": "x ", "what": "a ", "exists": ("yes", "no")}
    starts |= {"relation": ("yes", "no")}
    for row, kind in enumerate(batch["kind"]):
        assert tokenizer.decode(batch["tokens"][row][batch["answer_mask"][row]]).startswith(starts[KINDS[kind]])
    tokenizer.enable_truncation(4, direction="left")
    Digits.tokenizer = tokenizers.to_json(tokenizer)
    with pytest.raises(UserError, match="the answer cannot be told from the question"):
        Questioner(Digits, *world)(0, np.arange(64))


def test_a_place_must_be_two_tokens():
    questions.check_places(tokenizers.from_json(Words.tokenizer))
    for tokenizer in (tokens_of_digits(), tokenizers.train_tokenizer(language.sentences())):
        with pytest.raises(UserError, match="the place 'x0 y0' is not 2 tokens of this run's words"):
            questions.check_places(tokenizer)


def test_every_question_fits_and_uses_known_words():
    batch = make_questioner(objects=4)(0, np.arange(128))
    assert batch["tokens"].shape == (128, language.MAX_WORDS)


def test_pairs_that_training_never_shows_are_not_described():
    batch = make_questioner()(1, np.arange(256))
    seen = " / ".join(decode(batch, row, batch["token_mask"][row]) for row in np.flatnonzero(batch["kind"] == 0))
    assert not any(f"{color} {shape}" in seen for color, shape in HELD_OUT_PAIRS)


def test_the_stream_goes_on_where_it_was(questioner):
    stream = QuestionStream(questioner, 4)
    batches = [next(stream) for _ in range(3)]
    assert (batches[2]["episode"] == 2).all() and list(batches[2]["step"]) == [0, 1, 2, 3]
    other = QuestionStream(questioner, 4)
    other.set_state(stream.get_state())
    np.testing.assert_array_equal(next(other)["questions"]["tokens"], next(stream)["questions"]["tokens"])
    with pytest.raises(UserError, match="seed was 0, is 1"):
        QuestionStream(make_questioner(seed=1), 4).set_state(stream.get_state())
    half = QuestionStream(questioner, 4, process_index=1, processes=2)
    np.testing.assert_array_equal(next(half)["questions"]["tokens"], batches[0]["questions"]["tokens"][1::2])


def test_questions_go_beside_demonstrations(questioner):
    class Data:
        taken = 0

        def __next__(self):
            self.taken += 1
            return {"actions": self.taken}

        def get_state(self):
            return {"batches": self.taken}

        def set_state(self, state):
            self.taken = state["batches"]

        def close(self):
            pass

    stream = QuestionStream(questioner, 2, Data())
    assert next(stream)["actions"] == 1 and next(stream)["questions"]["tokens"].shape[0] == 2
    other = QuestionStream(questioner, 2, Data())
    other.set_state(stream.get_state())
    assert next(other)["actions"] == 3


def test_words_that_are_not_in_the_contract_are_an_error():
    class Old(Words):
        tokenizer = tokenizers.to_json(tokenizers.train_tokenizer(language.sentences()))

    old = Questioner(Old, EnvConfig(image_size=16), BiasConfig(), SceneConfig())
    with pytest.raises(UserError, match="unknown word"):
        old(0, np.arange(4))
