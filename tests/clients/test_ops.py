"""Endpoints beside generation: tokens agree with what generation counts, facts agree with what is served."""
import time

import httpx2
import pytest
from conftest import STRAWBERRY, Server

MESSAGES = [{"role": "user", "content": STRAWBERRY}]


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, status=400):
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_a_conversation_has_as_many_tokens_as_a_chat_reads(http, ask, strawberry):
    counted = ok(http.post("/tokenize", json={"messages": MESSAGES}))
    assert counted["tokens"] == strawberry.prompt_ids and counted["count"] == len(strawberry.prompt_ids)
    assert counted["max_model_len"] == ok(http.get("/v1/models"))["data"][0]["max_model_len"]
    assert ask(STRAWBERRY, max_tokens=1).usage.prompt_tokens == counted["count"]


@pytest.mark.parametrize("prompt", ["", "hi", "San Francisco is a", "<｜User｜>naïve 🙂\n\n7", "日本語"])
def test_a_text_has_as_many_tokens_as_a_completion_reads_and_comes_back(http, complete, prompt):
    counted = ok(http.post("/tokenize", json={"prompt": prompt, "return_token_strs": True}))
    assert counted["count"] == len(counted["tokens"]) == len(counted["token_strs"])
    if prompt:
        assert complete(prompt, max_tokens=1).usage.prompt_tokens == counted["count"]
    bare = ok(http.post("/tokenize", json={"prompt": prompt, "add_special_tokens": False}))
    assert ok(http.post("/detokenize", json={"tokens": bare["tokens"]}))["prompt"] == prompt


def test_lists_and_other_dialects(http):
    reply = ok(http.post("/v1/tokenize", json={"prompt": ["hi", "hello there"]}))
    assert [len(tokens) for tokens in reply["tokens"]] == reply["count"]
    back = ok(http.post("/v1/detokenize", json={"tokens": reply["tokens"], "skip_special_tokens": True}))
    assert back["text"] == ["hi", "hello there"]
    llama = ok(http.post("/tokenize", json={"content": "hello there"}))
    assert ok(http.post("/detokenize", json={"tokens": llama["tokens"]}))["content"] == "hello there"


def test_a_text_over_the_context_is_counted_and_one_far_over_it_is_refused_soon(http):
    most = ok(http.get("/v1/models"))["data"][0]["max_model_len"]
    assert ok(http.post("/tokenize", json={"prompt": "one two " * most}))["count"] > most
    for text in ("x" * (15 << 20), "1 " * 7_000_000):
        began = time.monotonic()
        assert "262144" in refused(http.post("/tokenize", json={"prompt": text}))["message"]
        assert time.monotonic() - began < 30


def test_an_id_of_no_token_is_named(http):
    error = refused(http.post("/detokenize", json={"tokens": [5, 99999]}))
    assert error["param"] == "tokens" and "99999" in error["message"]


def test_facts(http):
    names = [card["id"] for card in ok(http.get("/v1/models"))["data"]]
    info = ok(http.get("/get_model_info"))
    assert info["model_path"] == names[0] and info["is_generation"] is True and info["served_model_names"] == names
    server = ok(http.get("/get_server_info"))
    assert server["version"] == ok(http.get("/version"))["version"] and server["status"] == {"status": "ready"}
    assert server["max_total_num_tokens"] >= server["max_model_len"] == info["max_model_len"]


def test_health_generates(http, server):
    assert ok(http.get("/health_generate")) == {"status": "ready"}
    server.wait_idle()


def test_keys_are_asked_for_and_never_told(tmp_path):
    key = "key-that-nobody-may-see"
    with Server(tmp_path / "log", "--api-key", key) as server, httpx2.Client(base_url=server.url, timeout=60) as http:
        for path in ("/get_server_info", "/get_model_info"):
            refused(http.get(path), 401)
            told = http.get(path, headers={"Authorization": f"Bearer {key}"})
            assert ok(told) and key not in told.text
        refused(http.post("/tokenize", json={"prompt": "hi"}), 401)
        for path in ("/openapi.json", "/docs", "/health_generate"):
            response = http.get(path)
            assert response.status_code == 200 and key not in response.text, path
