"""Generated text against transformers, token by token, and the choices that are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.models.generate import draw

torch = pytest.importorskip("torch")

from tests.parity.tiny import paligemma_inputs, qwen_inputs, to_torch  # noqa: E402

TOKENS = 32
QWEN_PROMPTS = [
    [5],
    [5, 6, 7],
    [5, (4, 6), 7],
    [(2, 4), 9, (4, 4), 6, 5],
    [11, 12],
    [(2, 2)],
    [20, (2, 2), 21],
    [9] * 9,
]
PALIGEMMA_PROMPTS = [([2, *range(5, 5 + length), 108], []) for length in range(1, 9)]


def expected_tokens(pair, inputs):
    with torch.no_grad():
        out = pair.theirs.generate(
            **to_torch(inputs), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[:, inputs["input_ids"].shape[1] :].numpy()


@pytest.fixture(scope="module")
def qwen_answers(qwen):
    inputs = qwen_inputs(QWEN_PROMPTS)
    return inputs, expected_tokens(qwen, inputs)


def test_qwen_goes_on_as_transformers_does(qwen, qwen_answers):
    inputs, expected = qwen_answers
    answer = qwen.ours.generate(**inputs, max_tokens=TOKENS)
    np.testing.assert_array_equal(answer.tokens, expected)
    assert (np.asarray(answer.lengths) == TOKENS).all() and len(np.unique(expected)) > 8


def test_paligemma_goes_on_as_transformers_does(paligemma):
    inputs = paligemma_inputs(PALIGEMMA_PROMPTS)
    answer = paligemma.ours.generate(**inputs, max_tokens=TOKENS)
    np.testing.assert_array_equal(answer.tokens, expected_tokens(paligemma, inputs))


def test_padding_on_either_side_and_none_give_the_same_answers(qwen, qwen_answers):
    expected = qwen_answers[1]
    np.testing.assert_array_equal(
        qwen.ours.generate(**qwen_inputs(QWEN_PROMPTS, left=False), max_tokens=TOKENS).tokens, expected
    )
    alone = qwen.ours.generate(**qwen_inputs(QWEN_PROMPTS[1:2]), max_tokens=TOKENS)
    np.testing.assert_array_equal(alone.tokens[0], expected[1])


def test_answers_end_with_their_first_stop_token(qwen, qwen_answers):
    inputs, expected = qwen_answers
    stop = (int(expected[2, 3]), int(expected[5, 1]))
    answer = qwen.ours.generate(**inputs, max_tokens=TOKENS, stop=stop)
    for row, full in enumerate(expected):
        ends = np.flatnonzero(np.isin(full, stop))
        length = ends[0] + 1 if len(ends) else TOKENS
        assert answer.lengths[row] == length
        np.testing.assert_array_equal(answer.tokens[row], np.where(np.arange(TOKENS) < length, full, 0))


def test_drawn_answers_repeat_with_their_key_and_change_with_it(qwen, qwen_answers):
    inputs, expected = qwen_answers

    def answer(seed, temperature=2.0, top_p=1.0):
        key = jax.random.key(seed)
        return np.asarray(
            qwen.ours.generate(**inputs, max_tokens=TOKENS, temperature=temperature, top_p=top_p, key=key).tokens
        )

    np.testing.assert_array_equal(answer(0), answer(0))
    assert (answer(0) != answer(1)).mean() > 0.5
    np.testing.assert_array_equal(answer(0, top_p=1e-6), expected)


def test_draws_follow_temperature_and_the_nucleus():
    probability = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.log(jnp.tile(jnp.array(probability), (40_000, 1)))

    def frequency(temperature, top_p):
        drawn = draw(logits, jnp.float32(temperature), jnp.float32(top_p), jax.random.key(0))
        return np.bincount(np.asarray(drawn), minlength=4) / len(logits)

    np.testing.assert_allclose(frequency(1.0, 1.0), probability, atol=0.01)
    np.testing.assert_allclose(frequency(1.0, 0.7), [0.625, 0.375, 0, 0], atol=0.01)
    none = draw(logits[:, ::-1], jnp.float32(1.0), jnp.float32(0.0), jax.random.key(0))
    assert (none == 3).all(), "the likeliest is always kept"
    flat = probability**0.5 / (probability**0.5).sum()
    np.testing.assert_allclose(frequency(2.0, 1.0), flat, atol=0.01)
