"""Who writes programs: stored texts, an endpoint on this machine, a local model; and what goes wrong with them."""

import http.server
import json
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.models.generate import Generation
from vla_jax.steering.terms import TERMS, View
from vla_jax.steering.writer import Cached, Endpoint, Local, Request, Stored, find_json, make_prompt, read_program

PROGRAM = (
    '{"stages": [{"name": "reach", "terms": [{"term": "distance", "keypoint": "red cube", "offset": [0, 0, 0.03]}]}]}'
)
LABELS = ("red cube", "blue ball")
VIEW = View(jnp.array([[0.5, 0.1, 0.02], [0.4, -0.1, 0.02]]), jnp.array([[0.5, 0.1, 0.02], [0.4, -0.1, 0.02]]))


def test_a_stored_program_is_read_and_checked(tmp_path):
    (tmp_path / "reach.json").write_text(PROGRAM)
    program = read_program(Stored.read(tmp_path / "reach.json")(Request("")), LABELS, VIEW)
    assert program.stages[0].name == "reach"
    with pytest.raises(UserError, match="no reward program at"):
        Stored.read(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="prose and no JSON: 'I would move"):
        read_program("I would move to the cube.", LABELS, VIEW)
    with pytest.raises(UserError, match="keypoints lie on blue ball"):
        read_program(PROGRAM, ("blue ball",) * 2, VIEW)
    flat = PROGRAM.replace('"offset": [0, 0, 0.03]', '"weight": 1e-9')
    with pytest.raises(UserError, match="stage 1 .'reach'., term 1 .'distance'. has a zero gradient"):
        read_program(flat, LABELS, VIEW)


def test_programs_are_found_among_words():
    assert find_json(f"Here it is:\n```json\n{PROGRAM}\n```\nGood luck {{}}!") == PROGRAM
    assert find_json('{oops {"a": 1}') == '{"a": 1}'
    with pytest.raises(UserError, match="no JSON"):
        find_json('{"stages": ' + 100_000 * "[")


def test_the_question_tells_all_that_is_needed():
    prompt = make_prompt("reach the red cube", LABELS, VIEW)
    assert all(f"- {name}: " in prompt for name in TERMS)
    assert "0: red cube at (0.500, 0.100, 0.020)" in prompt and "Instruction: reach the red cube" in prompt
    assert "radius" in prompt and "tail_weight = 3.0" in prompt


class Counting:
    """A writer that counts."""

    name = "counting"
    calls = 0

    def __call__(self, request):
        self.calls += 1
        return f"{self.calls}"


def test_replies_are_kept_by_what_was_asked(tmp_path):
    writer = Counting()
    cached = Cached(writer, tmp_path / "cache")
    assert [cached(Request(text)) for text in ("a", "b", "a")] == ["1", "2", "1"]
    assert cached(Request("a", b"picture")) == "3" and Cached(writer, tmp_path / "cache")(Request("a")) == "1"
    writer.name = "another"
    assert cached(Request("a")) == "4"
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.fixture
def server():
    """An endpoint that answers with what is in `replies`, and keeps what it was sent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append((self.path, dict(self.headers), body))
            status, answer = self.server.replies.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        running.asked, running.replies = [], []
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_an_endpoint_is_asked_as_openai_has_it(server, monkeypatch):
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1/", "small", "STEERING_TEST_KEY", max_tokens=7)
    with pytest.raises(UserError, match="export STEERING_TEST_KEY"):
        endpoint(Request("hello"))
    monkeypatch.setenv("STEERING_TEST_KEY", "secret")
    server.replies.append((200, {"choices": [{"message": {"content": PROGRAM}}]}))
    reply = endpoint(Request(make_prompt("reach the red cube", LABELS, VIEW), b"picture"))
    assert read_program(reply, LABELS, VIEW).stages[0].name == "reach"
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "small" and body["max_tokens"] == 7
    text, picture = body["messages"][0]["content"]
    assert "Instruction: reach the red cube" in text["text"]
    assert picture["image_url"]["url"] == "data:image/png;base64,cGljdHVyZQ=="


def test_an_endpoint_that_fails_is_named(server):
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "small")
    for status, answer, message in (
        (500, {}, "refused the request: 500"),
        (200, {"error": "no"}, "not as a chat completion"),
        (200, b"<html>", "not as a chat completion"),
    ):
        server.replies.append((status, answer))
        with pytest.raises(UserError, match=message):
            endpoint(Request("hello"))
    with pytest.raises(UserError, match="does not answer .*stored program"):
        Endpoint("http://127.0.0.1:9/v1", "small", timeout=2)(Request("hello"))
    with pytest.raises(UserError, match="is not the address"):
        Endpoint("nowhere", "small")(Request("hello"))


def test_a_local_model_writes():
    class Echo:
        """Generates the tokens of a fixed text, then a stop, then padding."""

        def generate(self, *, max_tokens, stop, tokens):
            assert tokens.shape == (1, 3) and max_tokens == 500 and stop == (1,)
            answer = [ord(letter) for letter in PROGRAM] + [1, 0, 0]
            return Generation(np.array([answer]), np.array([len(PROGRAM) + 1]))

    local = Local(
        Echo(),
        encode=lambda text, picture: {"tokens": np.zeros((1, 3), int)},
        decode=lambda tokens: "".join(chr(token) for token in tokens),
        stop=(1,),
        name="echo",
        max_tokens=500,
    )
    assert local(Request("write")) == PROGRAM
