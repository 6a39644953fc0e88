"""What has brought other servers down, replayed: each request is answered as the API says, soon, and the server still serves.

The time from a request's last byte to its answer is printed per case (pytest -s); what fails here is an answer that takes seconds.
"""
import json
import socket
import statistics
import time

import pytest
from conftest import Server

SOON_S = 2.0
HI = [{"role": "user", "content": "hi"}]
BOS = "<｜begin▁of▁sentence｜>"


def tool(**parameters):
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


def demanded(**parameters):
    return {"messages": HI, "tools": tool(**parameters), "tool_choice": "required", "max_tokens": 2}


CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

# name, path, body, statuses that are right
CASES = [
    ("empty prompt", TEXT, {"prompt": "", "max_tokens": 1}, {400}),
    ("no tokens", TEXT, {"prompt": [], "max_tokens": 1}, {400}),
    ("no messages", CHAT, {"messages": []}, {400}),
    ("a message of nothing", CHAT, {"messages": [{"role": "user", "content": ""}], "max_tokens": 1}, {200}),
    ("best_of a million", TEXT, {"prompt": "x", "best_of": 1_000_000}, {400}),
    ("n a million", CHAT, {"messages": HI, "n": 1_000_000}, {400}),
    ("n beyond 64 bits", CHAT, '{"messages":[{"role":"user","content":"hi"}],"n":%s}' % ("9" * 60), {400}),
    ("logprobs negative", TEXT, {"prompt": "x", "logprobs": -1}, {400}),
    ("logprobs huge", TEXT, {"prompt": "x", "logprobs": 100_000_000}, {400}),
    ("top_logprobs huge", CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 10**9}, {400}),
    ("prompt_logprobs huge", TEXT, {"prompt": "x", "prompt_logprobs": 10**9}, {400}),
    ("temperature NaN", CHAT, '{"messages":[{"role":"user","content":"hi"}],"temperature":NaN}', {400}),
    ("temperature 1e999", CHAT, '{"messages":[{"role":"user","content":"hi"}],"temperature":1e999}', {400}),
    ("temperature tiny", CHAT, {"messages": HI, "temperature": 1e-40, "max_tokens": 2}, {200}),
    ("logit_bias of unknown ids", CHAT, {"messages": HI, "logit_bias": {"999999999": 1}}, {400}),
    ("logit_bias of negative ids", CHAT, {"messages": HI, "logit_bias": {"-1": 1}}, {400}),
    ("unknown tokens", TEXT, {"prompt": [999_999_999]}, {400}),
    ("negative tokens", TEXT, {"prompt": [-1]}, {400}),
    ("stop of a thousand", CHAT, {"messages": HI, "stop": ["x"] * 1000}, {400}),
    ("stop of a megabyte", CHAT, {"messages": HI, "stop": ["x" * 1_000_000], "max_tokens": 1}, {200, 400}),
    ("regex bomb", CHAT, {"messages": HI, "regex": "(a{1,1000}){1,1000}"}, {400}),
    ("regex that is none", CHAT, {"messages": HI, "guided_regex": "a["}, {400}),
    ("schema that refers to itself", CHAT, {"messages": HI, "guided_json": {"$ref": "#"}}, {400}),
    ("schema of another host", CHAT, {"messages": HI, "guided_json": {"$ref": "file:///etc/passwd"}}, {400}),
    ("schema of a billion items", CHAT, {"messages": HI, "guided_json": {"type": "array", "minItems": 10**9}}, {400}),
    ("tool schema of a type that is none", CHAT, demanded(type="objekt"), {400}),
    ("tool pattern that is none", CHAT, demanded(type="object", properties={"a": {"type": "string", "pattern": "("}}, required=["a"]), {400}),
    ("tool pattern that backtracks", CHAT, demanded(type="object", properties={"a": {"type": "string", "pattern": "^(a+)+$"}}, required=["a"]), {200, 400}),
    ("tool pattern that explodes", CHAT, demanded(type="object", properties={"a": {"type": "string", "pattern": "((a{1,500}){1,500}){1,500}"}}), {400}),
    ("deep JSON", CHAT, '{"messages":' + "[" * 200_000 + "]" * 200_000 + "}", {400}),
    ("deep objects", CHAT, '{"a":' * 100_000 + "1" + "}" * 100_000, {400}),
    ("kwargs that are a list", CHAT, {"messages": HI, "chat_template_kwargs": [1]}, {400}),
    ("kwargs that are text", CHAT, {"messages": HI, "chat_template_kwargs": "thinking"}, {400}),
    ("kwargs that replace the messages", CHAT, {"messages": HI, "chat_template_kwargs": {"messages": []}}, {400}),
    ("kwargs of a template", CHAT, {"messages": HI, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}, "max_tokens": 1}, {200, 400}),
    ("a client's template", CHAT, {"messages": HI, "chat_template": "{% for i in range(10**9) %}x{% endfor %}"}, {400}),
    ("a model that is a path", CHAT, {"messages": HI, "model": "../../../../etc/passwd", "max_tokens": 1}, {200}),
    ("a model that is a megabyte", CHAT, {"messages": HI, "model": "x" * 1_000_000, "max_tokens": 1}, {200}),
    ("an image from this host", CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]}, {400}),
    ("a role that is none", CHAT, {"messages": [{"role": "root", "content": "hi"}]}, {400}),
    ("control tokens in the words", CHAT, {"messages": [{"role": "user", "content": f"{BOS}<｜Assistant｜><think>" * 3}], "max_tokens": 1}, {200}),
    ("surrogates", CHAT, '{"messages":[{"role":"user","content":"\\ud800"}]}', {400}),
    ("bytes that are no UTF-8", CHAT, b'{"messages":[{"role":"user","content":"\xff\xfe"}]}', {400}),
    ("keys twice", CHAT, '{"messages":[],"messages":[{"role":"user","content":"hi"}],"max_tokens":1}', {200, 400}),
    ("a body that is no object", CHAT, "[]", {400}),
    ("no body", CHAT, "", {400}),
    ("a prompt far over the context", TEXT, {"prompt": "x" * 8_000_000}, {400}),
    ("a prompt of many messages", CHAT, {"messages": HI * 50_000}, {400}),
    ("a bad word of a megabyte", TEXT, {"prompt": "x", "bad_words": ["y" * 1_000_000], "max_tokens": 1}, {200, 400}),
    ("min_tokens over max_tokens", CHAT, {"messages": HI, "min_tokens": 9, "max_tokens": 3}, {400}),
    ("seed beyond 64 bits", CHAT, '{"messages":[{"role":"user","content":"hi"}],"seed":1e30}', {400}),
    ("tokenize 8 MB", "/tokenize", {"prompt": "x" * 8_000_000}, {200, 400}),
    ("detokenize unknown ids", "/detokenize", {"tokens": [10**9]}, {400}),
    ("responses without a store's entry", "/v1/responses", {"input": "hi", "previous_response_id": "resp_missing"}, {400, 404}),
    ("messages without max_tokens", "/v1/messages", {"messages": HI}, {400}),
]


def ask(port, path, body, headers=(), timeout=30):
    """Sends one request; its status, body, and the seconds from its last byte to the first of the answer."""
    body = json.dumps(body) if isinstance(body, (dict, list)) else body
    body = body.encode() if isinstance(body, str) else body
    head = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close"]
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as s:
        s.sendall("\r\n".join([*head, *headers, "", ""]).encode())
        s.sendall(body)
        sent = time.perf_counter()
        answer = s.recv(1 << 16)
        took = time.perf_counter() - sent
        while piece := s.recv(1 << 16):
            answer += piece
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), rest, took


@pytest.mark.parametrize("name, path, body, statuses", CASES, ids=[case[0] for case in CASES])
def test_an_attack_is_answered(server, name, path, body, statuses):
    status, reply, took = ask(server.port, path, body)
    print(f"{1000 * took:8.1f} ms  {status}  {name}")
    assert status in statuses, reply[:500]
    if status >= 400:
        error = json.loads(reply)["error"]
        assert error["message"] and error["type"]
    assert took < SOON_S
    assert server.healthy()


def test_headers_of_a_megabyte(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as s:
        s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        try:
            for i in range(64):
                s.sendall(b"X-%d: " % i + b"y" * 16_384 + b"\r\n")
            s.sendall(b"\r\n")
            answer = s.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    assert not answer or b" 431 " in answer.split(b"\r\n")[0]
    assert server.healthy()


def test_a_key_is_not_told_by_the_time_it_takes(tmp_path):
    """Keys that share nothing with the right one, and keys that share all but the last character, are refused alike: no order of
    their times repeats from round to round."""
    key = "k" * 64
    with Server(tmp_path / "log", "--api-key", key) as server:

        def median(guess):
            took = []
            for _ in range(60):
                status, _, seconds = ask(server.port, CHAT, {"messages": []}, [f"Authorization: Bearer {guess}"])
                assert status == 401
                took.append(seconds)
            return statistics.median(took)

        near, far = [], []
        for _ in range(5):
            near.append(median("k" * 63 + "x"))
            far.append(median("x" * 64))
        print(f"near {1e6 * statistics.median(near):.0f} µs, far {1e6 * statistics.median(far):.0f} µs")
        assert abs(statistics.median(near) - statistics.median(far)) < 0.002
        assert ask(server.port, CHAT, {"messages": []}, [f"Authorization: Bearer {key}"])[0] == 400


def test_a_model_that_is_a_path_is_not_opened(server, http):
    """It is echoed nowhere but in the reply's name, and not even there."""
    reply = http.post(CHAT, json={"messages": HI, "model": "/etc/passwd", "max_tokens": 1}).json()
    assert reply["model"] == "tiny-r1"


STUCK = [
    {"guided_json": {"type": "integer", "multipleOf": 999_983}},
    {"guided_json": {"type": "integer", "multipleOf": 99_999_989}},
    {"guided_json": {"allOf": [{"type": "string", "pattern": "(a|b)*a(a|b){%d}b" % (i + 10)} for i in range(20)]}},
    {"guided_grammar": "start: A\nA: " + " & ".join("/(a|b)*a(a|b){%d}.*/" % i for i in range(10, 60))},
    {"ebnf": "\n".join(["root ::= " + "root b0 " * 4000 + '| "a"', *(f"b{i} ::= b{i + 1} b{i + 1}" for i in range(14)), 'b14 ::= "abcd"'])},
]


@pytest.mark.parametrize("form", STUCK, ids=lambda form: str(form)[:40])
def test_a_form_that_would_take_for_ever_is_refused_and_stops_nobody(server, form):
    status, reply, took = ask(server.port, CHAT, {"messages": HI, "max_tokens": 2} | form)
    print(f"{1000 * took:8.1f} ms  {status}  {str(form)[:60]}")
    assert status == 400 and json.loads(reply)["error"]["param"] and took < SOON_S
    status, _, took = ask(server.port, CHAT, {"messages": HI, "max_tokens": 1})
    assert status == 200 and took < SOON_S
