"""Words to numbers and back."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vla_jax.data import tokenizer as tokenizers
from vla_jax.data.tokenizer import PAD_ID, cut_off, encode, from_json, to_json, train_tokenizer, with_limit
from vla_jax.envs import language
from vla_jax.errors import UserError

SENTENCES = ["push the red cube", "push the blue ball"]


def test_numbers_are_alphabetical_after_padding():
    tokenizer = train_tokenizer(reversed(SENTENCES))
    words = ["ball", "blue", "cube", "push", "red", "the"]
    assert [tokenizer.token_to_id(word) for word in words] == [2, 3, 4, 5, 6, 7]
    assert tokenizer.get_vocab_size() == 8
    assert to_json(tokenizer) == to_json(train_tokenizer(SENTENCES))


def test_encode_aligns_left_and_masks_padding():
    tokens, mask = encode(train_tokenizer(SENTENCES), ["push the red cube", "the ball", ""], 5)
    np.testing.assert_array_equal(tokens, [[5, 7, 6, 4, PAD_ID], [7, 2, PAD_ID, PAD_ID, PAD_ID], [PAD_ID] * 5])
    np.testing.assert_array_equal(mask, tokens != PAD_ID)
    assert tokens.dtype == np.int32 and mask.dtype == bool


def test_case_spaces_and_punctuation_do_not_matter():
    tokenizer = train_tokenizer(SENTENCES)
    plain = encode(tokenizer, ["push the red cube"], 4)
    for text in ("Push the RED cube.", "  push   the red\tcube ", "push the red cube, !", "push; the red cube?"):
        for ours, theirs in zip(encode(tokenizer, [text], 4), plain, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_every_sentence_of_the_templates_survives_the_round_trip():
    tokenizer = train_tokenizer(language.sentences())
    sentences = language.sentences()[::7]
    tokens, mask = encode(tokenizer, sentences, language.MAX_WORDS)
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    back = [" ".join(words[number] for number in row[on]) for row, on in zip(tokens, mask, strict=True)]
    assert back == list(sentences)
    assert tokenizer.token_to_id(tokenizers.UNKNOWN) not in tokens


def test_an_unknown_word_is_named_with_the_nearest_known_one():
    tokenizer = train_tokenizer(SENTENCES)
    with pytest.raises(UserError, match=r"unknown word 'Cubes' in .*: did you mean 'cube'\?"):
        encode(tokenizer, ["push the red cube", "push the red Cubes"], 8)
    for text in ("push the [UNK] cube", "push the [PAD] cube", "push the größe cube", "push the red-cubes"):
        with pytest.raises(UserError, match="unknown word"):
            encode(tokenizer, [text], 8)


def test_too_many_words_are_told():
    with pytest.raises(UserError, match="'push the red cube' has 4 tokens and at most 3 fit"):
        encode(train_tokenizer(SENTENCES), ["push the red cube"], 3)


def test_a_limit_cuts_only_if_asked_to():
    made = train_tokenizer(SENTENCES)
    made.enable_truncation(2)
    made.enable_padding(length=9)  # as files of released models may say
    whole, cut = (from_json(with_limit(to_json(made), 3, truncate)) for truncate in (False, True))
    with pytest.raises(UserError, match="4 tokens and at most 3 fit"):
        encode(whole, SENTENCES[:1], 3)
    tokens, mask = encode(cut, ["push the red cube", "push"], 3)
    np.testing.assert_array_equal(tokens, [[5, 7, 6], [5, PAD_ID, PAD_ID]])
    assert mask.sum() == 4
    assert [
        cut_off(cut, text) for text in ("push the red cube", "push the red", "push the the the the the red cube")
    ] == [1, 0, 5]


def test_json_round_trip():
    tokenizer = train_tokenizer(SENTENCES)
    loaded = from_json(to_json(tokenizer))
    assert to_json(loaded) == to_json(tokenizer)
    for ours, theirs in zip(encode(loaded, SENTENCES, 6), encode(tokenizer, SENTENCES, 6), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_foreign_json_is_told():
    with pytest.raises(UserError, match="not the text of a tokenizer.json"):
        from_json("{}")
    foreign = to_json(train_tokenizer(SENTENCES)).replace("[PAD]", "[EMPTY]")
    with pytest.raises(UserError, match=r"lacks \[PAD\]"):
        from_json(foreign)


def test_the_tokenizer_of_a_pretrained_model_needs_no_words_of_ours():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(["push it"], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.add_special_tokens(["<start>"])
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", made.token_to_id("<start>"))]
    )
    tokenizer = from_json(made.to_str())
    tokens, mask = encode(tokenizer, ["push it", "ö?"], 6)
    assert tokenizer.decode(tokens[0][mask[0]]) == "push it" and tokenizer.decode(tokens[1][mask[1]]) == "ö?"
    assert made.token_to_id("<start>") not in tokens, "words around the instruction are the policy's to add"
