"""Words to numbers: a word-level tokenizer trained on the sentences that the instruction templates can make, or that of
a pretrained model.

Case, extra spaces and punctuation do not matter. Number 0 is padding. A word that the tokenizer does not know is an
error and never a token, because a policy that silently reads "unknown" where the object should be has been told
nothing.

Axis legend: B batch, L tokens.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from vla_jax.errors import UserError
from vla_jax.schema import suggest

PAD, UNKNOWN = "[PAD]", "[UNK]"
PAD_ID = 0


def train_tokenizer(sentences: Iterable[str]) -> Tokenizer:
    """A tokenizer that knows exactly the words of `sentences`, numbered in alphabetical order after padding."""
    normalizer = normalizers.Lowercase()
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("removed")])
    words = set()
    for sentence in set(sentences):
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence)))
    vocabulary = {word: number for number, word in enumerate([PAD, UNKNOWN, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    return tokenizer


def with_limit(text: str, length: int, truncate: bool) -> str:
    """The text of a tokenizer.json whose tokenizer cuts what is longer than `length` tokens, or leaves it whole.

    What the file itself says about cutting and padding is dropped: it is made for other uses.
    """
    tokenizer = from_json(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if truncate:
        tokenizer.enable_truncation(length)
    return to_json(tokenizer)


def cut_off(tokenizer: Tokenizer, text: str) -> int:
    """How many tokens of a text the tokenizer's limit takes away."""
    return sum(len(part.ids) for part in tokenizer.encode(text, add_special_tokens=False).overflowing)


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], length: int
) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """Token numbers, left-aligned and padded with 0 to `length`, and a mask that is True on words.

    Raises:
        UserError: a text holds a word that the tokenizer does not know, or more than `length` words, unless the
            tokenizer itself cuts them off (`with_limit`).
    """
    tokens = np.full((len(texts), length), PAD_ID, np.int32)
    mask = np.zeros((len(texts), length), bool)
    unknown = tokenizer.token_to_id(UNKNOWN)
    for row, (text, encoding) in enumerate(
        zip(texts, tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True)
    ):
        if unknown is not None and unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(unknown)]
            raise UserError(_unknown_word(tokenizer, text[start:end], text))
        count = len(encoding.ids)
        if count > length:
            raise UserError(f"the instruction {text!r} has {count} tokens and at most {length} fit; shorten it.")
        tokens[row, :count] = encoding.ids
        mask[row, :count] = True
    return tokens, mask


def _unknown_word(tokenizer, word, text) -> str:
    known = sorted(set(tokenizer.get_vocab()) - {PAD, UNKNOWN})
    return f"unknown word {word!r} in the instruction {text!r}{suggest(word.lower(), known)}"


def to_json(tokenizer: Tokenizer) -> str:
    """The tokenizer as the text of a tokenizer.json file."""
    return tokenizer.to_str()


def from_json(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json text.

    Raises:
        UserError: the text is not a tokenizer, or a word-level one without this module's padding and unknown tokens.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"not the text of a tokenizer.json file ({error}); use the one saved with the data.") from error
    of_words = isinstance(tokenizer.model, models.WordLevel)
    if of_words and (tokenizer.token_to_id(PAD) != PAD_ID or tokenizer.token_to_id(UNKNOWN) is None):
        raise UserError(f"this tokenizer lacks {PAD} as number {PAD_ID} or {UNKNOWN}; use the one saved with the data.")
    return tokenizer
