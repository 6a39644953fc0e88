"""What operators see: time limits, health, cached tokens, logs, spans, and a server that is out of file descriptors."""
import http.server
import json
import resource
import signal
import socket
import subprocess
import threading
import time

import httpx2
import openai
import pytest
from conftest import COMMAND, START_TIMEOUT_S, STRAWBERRY, Server, free_port

USER = [{"role": "user", "content": STRAWBERRY}]
# With it a reply never ends by itself, so that a limit must end it.
ENDLESS = {"extra_body": {"ignore_eos": True, "min_tokens": 2000}, "max_tokens": 2000}


def test_cached_tokens_are_counted(ask):
    question = " ".join(f"word {i}" for i in range(100))
    seen = []
    for _ in range(2):
        usage = ask(question, max_tokens=4).usage
        cached = usage.prompt_tokens_details.cached_tokens
        assert isinstance(cached, int) and 0 <= cached <= usage.prompt_tokens and usage.prompt_tokens > 64
        assert usage.prompt_cache_hit_tokens == cached and usage.prompt_cache_miss_tokens == usage.prompt_tokens - cached
        seen.append(cached)
    # At least one whole block of the cache.
    assert seen[1] >= 64


def test_a_cache_salt_changes_no_reply(ask, strawberry):
    for salt in ("pepper", "", None):
        assert ask(STRAWBERRY, extra_body={"cache_salt": salt}).choices[0].message.content.strip("\n") == strawberry.content


def test_health_says_what_it_is(http):
    response = http.get("/health")
    assert response.status_code == 200 and response.json() == {"status": "ready"}


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("hasty") / "log", "--request-timeout", "0.2", "--idle-timeout", "0.5") as server:
        yield server


def test_a_request_that_takes_too_long(hasty):
    with pytest.raises(openai.APIStatusError) as caught:
        hasty.openai().chat.completions.create(model="any", messages=USER, **ENDLESS)
    assert caught.value.status_code == 408 and caught.value.code == "request_timeout"
    assert "--request-timeout" in caught.value.body["message"]
    hasty.wait_idle()


def test_a_stream_that_takes_too_long(hasty):
    stream = hasty.openai().chat.completions.create(model="any", messages=USER, stream=True, **ENDLESS)
    with pytest.raises(openai.APIError, match="--request-timeout"):
        for _ in stream:
            pass
    hasty.wait_idle()


def test_a_client_may_be_less_patient(server):
    client = server.openai().with_options(timeout=0.2)
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="any", messages=USER, **ENDLESS)
    server.wait_idle()


def test_idle_connections_are_closed(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as idle:
        assert idle.recv(1) == b""


def test_a_body_over_the_limit_is_refused_while_it_is_still_sent(server):
    with pytest.raises(openai.APIStatusError) as caught:
        server.openai().completions.create(model="any", prompt="a" * (40 << 20))
    assert caught.value.status_code == 413 and caught.value.code == "request_too_large"


def test_log_lines_are_json_and_name_their_request(tmp_path):
    port = free_port()
    errors = tmp_path / "stderr"
    command = [*COMMAND, "--port", str(port), "--log-format", "json", "--request-timeout", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors.open("wb"))
    try:
        wait_ready(port)
        for path, body in (("/health", None), ("/v1/chat/completions", {"messages": USER, "max_tokens": 2000, **ENDLESS["extra_body"]})):
            method = "POST" if body else "GET"
            httpx2.request(method, f"http://127.0.0.1:{port}{path}", json=body, headers={"x-request-id": f"id-of-{method}"}, timeout=20)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    lines = [json.loads(line) for line in errors.read_text().splitlines()]
    assert lines and all({"timestamp", "level", "fields"} <= set(line) for line in lines)
    access = {line["fields"]["request_id"]: line["fields"] for line in lines if line["fields"].get("message") == "request"}
    assert access["id-of-GET"]["status"] == 200 and access["id-of-POST"]["status"] == 408
    aborted = [line for line in lines if "request timeout" in line["fields"].get("message", "")]
    assert len(aborted) == 1 and aborted[0]["span"]["request_id"] == "id-of-POST"


def wait_ready(port):
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        assert time.monotonic() < deadline, "r1-serve did not come up"
        time.sleep(0.1)


class Collector(http.server.BaseHTTPRequestHandler):
    """Keeps the bodies of what OTLP exporters send."""

    def do_POST(self):
        self.server.bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_spans_reach_a_collector(tmp_path):
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    collector.bodies = []
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with Server(tmp_path / "log", "--otlp-traces-endpoint", endpoint) as server:
        headers = {"x-request-id": "spans-of-this", "traceparent": f"00-{trace}-{parent}-01"}
        server.openai().chat.completions.create(model="any", messages=USER, max_tokens=4, extra_headers=headers)
    collector.shutdown()
    assert {path for path, _ in collector.bodies} == {"/v1/traces"}
    sent = b"".join(body for _, body in collector.bodies)
    for name in (b"r1-serve", b"request", b"tokenize", b"queue", b"prefill", b"decode", b"spans-of-this", b"tiny-r1"):
        assert name in sent, name
    assert bytes.fromhex(trace) in sent and bytes.fromhex(parent) in sent


def test_too_many_connections_are_survived(tmp_path):
    """The system refuses further sockets; when some are given back the server goes on."""
    limit = 64

    class Poor(Server):
        def __enter__(self):
            before = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
            try:
                command = [*COMMAND, "--port", str(self.port), *self.arguments]
                self.process = subprocess.Popen(command, stdout=self.log.open("wb"), stderr=subprocess.STDOUT)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
            wait_ready(self.port)
            return self

    with Poor(tmp_path / "log") as server:
        crowd = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(2 * limit)]
        time.sleep(1.5)
        for connection in crowd:
            connection.close()
        assert httpx2.get(server.url + "/health", timeout=20).status_code == 200
        lines = server.tail().count("could not be accepted")
        assert 1 <= lines <= 10, "a line now and then, no flood"
