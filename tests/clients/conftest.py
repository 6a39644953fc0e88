"""Starts `r1-serve` with its bundled model and hands clients to the tests.

    cargo build --release
    pip install -r tests/clients/requirements.txt
    pytest tests/clients

R1_SERVE_BIN names another binary, and R1_SERVE_ARGS what every server is started with, such as "--device emu --tp 2". What the model must answer stands in tests/goldens/tiny_r1.json: transformers' greedy replies.
"""
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx2
import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("R1_SERVE_BIN", ROOT / "target/release/r1-serve"))
COMMAND = [BINARY, *shlex.split(os.environ.get("R1_SERVE_ARGS", ""))]
MODEL_FOLDER = ROOT / "crates/cli/model"
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 40
STRAWBERRY = "how many rs are in strawberry"
EOS = "<｜end▁of▁sentence｜>"

# Where the best two logits are this far apart, the CPU's own precision cannot turn a token.
SAFE_MARGIN = 0.5


class Reference:
    """One greedy reply as transformers gives it."""

    def __init__(self, reply):
        self.question = reply["prompt_text"]
        self.prompt_ids = reply["prompt_ids"]
        self.output_ids = reply["output_ids"]
        self.text = reply["text"].removesuffix(EOS)
        reasoning, self.content = (part.strip("\n") for part in self.text.split("</think>"))
        self.reasoning = reasoning or None


GOLDEN = json.loads((ROOT / "tests/goldens/tiny_r1.json").read_text())
REFERENCES = [Reference(reply) for reply in GOLDEN["replies"] if reply["min_margin"] >= SAFE_MARGIN]
PENALTIES = GOLDEN["penalties"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A running r1-serve; leaving the block sends SIGTERM and expects a clean end."""

    def __init__(self, log, *arguments, environment=None):
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        self.arguments, self.environment = arguments, environment or {}

    def __enter__(self):
        if not BINARY.is_file():
            pytest.exit(f"{BINARY} does not exist: run `cargo build --release` or set R1_SERVE_BIN", returncode=2)
        environment = {k: v for k, v in os.environ.items() if k != "R1_API_KEY"} | self.environment
        command = [*COMMAND, "--port", str(self.port), *self.arguments]
        self.process = subprocess.Popen(command, stdout=self.log.open("wb"), stderr=subprocess.STDOUT, env=environment)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                pytest.exit(f"r1-serve did not come up:\n{self.tail()}", returncode=2)
            time.sleep(0.1)
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"r1-serve did not end after SIGTERM:\n{self.tail()}") from None
        assert code == 0, f"r1-serve ended with {code} after SIGTERM:\n{self.tail()}"

    def healthy(self):
        try:
            return httpx2.get(self.url + "/health", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    def tail(self):
        return self.log.read_text(errors="replace")[-4000:]

    def openai(self, api_key="unused"):
        return openai.OpenAI(base_url=self.url + "/v1", api_key=api_key, max_retries=0, timeout=120)

    def async_openai(self):
        return openai.AsyncOpenAI(base_url=self.url + "/v1", api_key="unused", max_retries=0, timeout=120)

    def metric(self, name):
        """The sum of a Prometheus metric's series."""
        text = httpx2.get(self.url + "/metrics", timeout=10).text
        values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        assert values, f"/metrics has no {name}"
        return sum(map(float, values))

    def wait_idle(self, timeout_s=10):
        """Until nothing runs or waits and no block of the KV cache is held; fails when that does not come."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        deadline = time.monotonic() + timeout_s
        while any((values := {name: self.metric(name) for name in names}).values()):
            assert time.monotonic() < deadline, f"not idle after {timeout_s} s: {values}"
            time.sleep(0.05)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    return server.openai()


@pytest.fixture(scope="session")
def http(server):
    """For what the openai client would not send."""
    with httpx2.Client(base_url=server.url, timeout=120) as http:
        yield http


@pytest.fixture(scope="session")
def model(client):
    return client.models.list().data[0].id


@pytest.fixture(scope="session")
def strawberry():
    return next(r for r in REFERENCES if r.question == STRAWBERRY)


@pytest.fixture
def ask(client, model):
    """chat(question, **options): greedy unless told otherwise."""

    def ask(question, **options):
        options = {"temperature": 0} | options
        return client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], **options)

    return ask


@pytest.fixture
def complete(client, model):
    """completion(prompt, **options): greedy and long enough for a whole reply unless told otherwise."""

    def complete(prompt, **options):
        options = {"temperature": 0, "max_tokens": 260} | options
        return client.completions.create(model=model, prompt=prompt, **options)

    return complete


def joined(chunks):
    """A chat stream put together per choice: {index: {reasoning_content, reasoning, content, finish_reason}}."""
    choices = {}
    for chunk in chunks:
        for choice in chunk.choices:
            whole = choices.setdefault(choice.index, dict.fromkeys(("reasoning_content", "reasoning", "content", "finish_reason")))
            assert whole["finish_reason"] is None, "a choice goes on after its finish_reason"
            for field in ("reasoning_content", "reasoning", "content"):
                if (piece := getattr(choice.delta, field, None)) is not None:
                    whole[field] = (whole[field] or "") + piece
            whole["finish_reason"] = choice.finish_reason
    return choices


def parts(choice):
    """The same fields of a choice that was not streamed."""
    message = choice.message
    return dict(
        reasoning_content=message.reasoning_content, reasoning=message.reasoning, content=message.content, finish_reason=choice.finish_reason
    )


def same(streamed, whole):
    """Whether a joined stream says what the whole reply says; a field nothing was streamed for is empty or null there."""
    return all((streamed[field] or "") == (whole[field] or "") for field in whole)
