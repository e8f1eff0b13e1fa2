"""Who writes a reward program: a stored text, an endpoint, or a vision-language model of this project.

Every writer turns a request into a reply; replies are kept under the hash of what was asked, so that a run can be
repeated without asking again. A reply is parsed and checked (`program.parse`, `check.check`), never executed.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from vla_jax.errors import UserError
from vla_jax.files import write_atomically
from vla_jax.steering.check import check
from vla_jax.steering.program import Program, parse
from vla_jax.steering.terms import TERMS, View


@dataclasses.dataclass(frozen=True)
class Request:
    """A question to a model: text, and a PNG picture or none (empty)."""

    text: str
    picture: bytes = b""


class Writer(Protocol):
    """name: identifies the writer in the cache. Calling it raises UserError where no reply can be had."""

    name: str

    def __call__(self, request: Request) -> str: ...


@dataclasses.dataclass(frozen=True)
class Stored:
    """Always the same reply: a program from a file, or from the code."""

    text: str
    name: str = "stored"

    @classmethod
    def read(cls, path: str | Path) -> Stored:
        """The text of a file. Raises UserError if there is none."""
        try:
            return cls(Path(path).read_text(), f"stored {path}")
        except OSError as error:
            raise UserError(f"no reward program at {path}: {error.strerror}") from error

    def __call__(self, request: Request) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Any server that speaks OpenAI's chat completions.

    Attributes:
        url: up to and with the version, as "http://localhost:8000/v1".
        model: what the server calls it.
        key_variable: environment variable that holds the key; empty: none is sent.
        temperature, max_tokens, timeout: of a request; seconds.
    """

    url: str
    model: str
    key_variable: str = ""
    temperature: float = 0.0
    max_tokens: int = 2000
    timeout: float = 60.0

    @property
    def name(self) -> str:
        """Model and temperature."""
        return f"{self.model} at {self.temperature}"

    def __call__(self, request: Request) -> str:
        content: list[dict[str, Any]] = [{"type": "text", "text": request.text}]
        if request.picture:
            data = base64.b64encode(request.picture).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            if self.key_variable not in os.environ:
                raise UserError(f"the endpoint's key is not set: export {self.key_variable}=…")
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        where = f"{self.url.rstrip('/')}/chat/completions"
        try:
            question = urllib.request.Request(where, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(question, timeout=self.timeout) as answer:
                return json.load(answer)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            raise UserError(f"the endpoint {where} refused the request: {error.code} {error.reason}") from error
        except (LookupError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"the endpoint {where} answered, but not as a chat completion does") from error
        except ValueError as error:
            raise UserError(f"{where} is not the address of an endpoint") from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            hint = "start it, or use a stored program"
            raise UserError(f"the endpoint {where} does not answer ({reason}): {hint}") from error


@dataclasses.dataclass(frozen=True)
class Local:
    """A vision-language model of this project.

    Attributes:
        vlm: as from `vla_jax.load_vlm`.
        encode: the checkpoint's processor: (text, PNG or nothing) -> arrays of one prompt, as `vlm.generate` takes.
        decode: token ids -> text.
        stop: ids that end an answer.
        name: identifies the weights in the cache.
    """

    vlm: Any
    encode: Callable[[str, bytes], Mapping[str, np.ndarray]]
    decode: Callable[[Sequence[int]], str]
    stop: tuple[int, ...]
    name: str
    max_tokens: int = 2000

    def __call__(self, request: Request) -> str:
        inputs = self.encode(request.text, request.picture)
        answer = self.vlm.generate(max_tokens=self.max_tokens, stop=self.stop, **inputs)
        tokens = np.asarray(answer.tokens)[0][: int(answer.lengths[0])]
        return self.decode([int(token) for token in tokens if token not in self.stop])


@dataclasses.dataclass(frozen=True)
class Cached:
    """A writer whose replies are kept in files, one for each question."""

    writer: Writer
    directory: Path

    @property
    def name(self) -> str:
        """That of the writer."""
        return self.writer.name

    def path(self, request: Request) -> Path:
        """Where the reply is kept: named by the hash of writer, text and picture."""
        digest = hashlib.sha256()
        for part in (self.writer.name.encode(), request.text.encode(), request.picture):
            digest.update(len(part).to_bytes(8, "big") + part)
        return Path(self.directory) / f"{digest.hexdigest()[:24]}.txt"

    def __call__(self, request: Request) -> str:
        path = self.path(request)
        if path.is_file():
            return path.read_text()
        reply = self.writer(request)
        write_atomically(path, reply)
        return reply


def read_program(reply: str, labels: Sequence[str], view: View) -> Program:
    """The program in a writer's reply, checked. labels, view: the keypoints of its scene.

    Raises:
        UserError: a reply without a program, or a program that cannot steer (it names the term).
    """
    program = parse(find_json(reply), labels)
    check(program, view, jax.random.key(0))
    return program


def find_json(reply: str) -> str:
    """The first JSON object in a reply, which may stand in a code fence or among words.

    Raises:
        UserError: there is none.
    """
    decoder, start = json.JSONDecoder(), reply.find("{")
    while start >= 0:
        try:
            _, end = decoder.raw_decode(reply, start)
            return reply[start:end]
        except (ValueError, RecursionError):  # brackets in brackets in brackets
            start = reply.find("{", start + 1)
    shown = " ".join(reply.split())[:80]
    raise UserError(f"the model replied with prose and no JSON: {shown!r}")


def make_prompt(instruction: str, labels: Sequence[str], view: View) -> str:
    """The question: what a program is, its terms, the keypoints of this scene, and the instruction."""
    terms = "\n".join(
        f"- {name}: {' '.join((term.__doc__ or '').split())} {_signature(term)}" for name, term in TERMS.items()
    )
    points = "\n".join(
        f"{number}: {label} at ({', '.join(f'{value:.3f}' for value in point)})"
        for number, (label, point) in enumerate(zip(labels, np.asarray(view.now), strict=True))
    )
    return f"""You steer a robot arm whose policy knows how to move and grasp. Write a reward program for where \
its end effector should go. Coordinates are metres: x away from the robot, y to its left, z up, the table at z = 0.

A program is one JSON object: {{"stages": [{{"name": "...", "terms": [{{"term": "...", ...}}]}}]}}
Split the task into stages (pick and place: reach, carry). Do not write a stage that only closes or opens the gripper.
A stage ends when its reward has risen to nearly 0, or when the gripper opens or closes; with "until": "reward" or \
"until": "gripper" beside its name only by that (going down to grasp: until gripper).
The rewards of a stage's terms are added, each times its "weight" (1 where none is given). Terms:
{terms}
"keypoint" is a number from the list below, or the name of an object.

Keypoints, also numbered in the picture:
{points}

Instruction: {instruction}
Answer with the JSON object only."""


def _signature(term) -> str:
    optional = {field.name: field.default for field in dataclasses.fields(term)}
    listed = (
        name if optional[name] is dataclasses.MISSING else f"{name} = {json.dumps(optional[name])}"
        for name in term.kinds
    )
    return f"Fields: {', '.join(listed)}."
