"""What a policy and whatever feeds or drives it must agree on: names, units, rates, image sizes, the prompt."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from vla_jax.data import tokenizer as tokenizers
from vla_jax.errors import UserError

PROMPT_FORMAT = "{instruction}"


@dataclasses.dataclass(frozen=True)
class Interface:
    """The meaning of every array of an observation and an action.

    Attributes:
        embodiment: the robot, as in `EnvConfig.embodiment`.
        control_hz: actions per second.
        images: (height, width) in pixels of each view, RGB uint8.
        action_names, action_units: one entry per action dimension (A of them), SI units ("m", "rad", "1").
        action_representation: what an action vector means, in words.
        state_names, state_units: one entry per proprioceptive dimension (S of them).
        prompt_format: how an instruction becomes the text that is tokenised.
        max_tokens: the length L of every token row.
        tokenizer: the tokenizer, as the text of a `tokenizer.json`.
    """

    embodiment: str
    control_hz: float
    images: dict[str, tuple[int, int]]
    action_names: tuple[str, ...]
    action_units: tuple[str, ...]
    action_representation: str
    state_names: tuple[str, ...]
    state_units: tuple[str, ...]
    max_tokens: int
    tokenizer: str
    prompt_format: str = PROMPT_FORMAT

    def __post_init__(self):
        for kind in ("action", "state"):
            names, units = getattr(self, f"{kind}_names"), getattr(self, f"{kind}_units")
            if len(names) != len(units) or not names:
                raise UserError(f"the interface names {len(names)} {kind} dimensions but gives {len(units)} units")

    def resized(self, image_size: int) -> "Interface":
        """The same with square pictures of `image_size` pixels; 0 leaves them as they are."""
        sizes = {view: (image_size, image_size) for view in self.images} if image_size else self.images
        return dataclasses.replace(self, images=sizes)

    def prompt(self, instruction: str) -> str:
        """The text that is tokenised for `instruction`."""
        return self.prompt_format.format(instruction=instruction)

    def encode(self, instructions: Sequence[str]) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Tokens and mask of instructions; see `tokenizer.encode`. Raises UserError for a word that is not known."""
        prompts = [self.prompt(instruction) for instruction in instructions]
        return tokenizers.encode(tokenizers.from_json(self.tokenizer), prompts, self.max_tokens)

    def check_interface(self, other: "Interface", what: str = "the dataset") -> None:
        """Raises UserError that names every field in which `other` (called `what` in the message) differs.

        Words may differ: a policy reads text by its own tokenizer, and a word that this does not know is an error.
        """
        differing = [
            describe_difference(field.name, getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(Interface)
            if field.name not in ("tokenizer", "max_tokens") and getattr(self, field.name) != getattr(other, field.name)
        ]
        if differing:
            raise UserError(
                f"{what} does not fit the contract: {'; '.join(differing)}. "
                "Use data collected with the same settings, or train a new policy on it"
            )


def describe_difference(name: str, expected: Any, found: Any) -> str:
    """Says "name: expected A, found B", shortened for long values."""

    def short(value):
        text = str(value)
        return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"

    if len(str(expected)) > 200:  # a tokenizer's text says nothing to a reader
        return f"{name} differs"
    return f"{name}: expected {short(expected)}, found {short(found)}"


def interface_from_json(values: dict[str, Any]) -> dict[str, Any]:
    """Turns the lists of a JSON object back into the tuples of the interface's fields."""
    converted = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    converted["images"] = {view: tuple(size) for view, size in values["images"].items()}
    return converted
