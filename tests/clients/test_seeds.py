"""The commands of the guides that people follow, names and ports adapted: each answers as its guide says."""
import json
import subprocess

import pytest
from conftest import Server

JSON = "-H 'Content-Type: application/json'"

# dstack: through its proxy, with a token, streamed.
PROXIED = """curl $URL/proxy/models/main/chat/completions -X POST -H 'Authorization: Bearer token-of-dstack' %s -d '{
      "model": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
      "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is Deep Learning?"}
      ],
      "stream": true,
      "max_tokens": 512
    }'""" % JSON

# Apolo: a text completion.
COMPLETION = """curl -s $URL/v1/completions %s -d '{
        "model": "cognitivecomputations/DeepSeek-R1-AWQ",
        "prompt": "San Francisco is a",
        "max_tokens": 100,
        "temperature": 0
    }' | python3 -m json.tool""" % JSON

# SkyPilot: chats, with another name than the server was started with.
CHAT = """curl $URL/v1/chat/completions %s -d '{
    "model": "%%s",
    "messages": [
      {"role": "system", "content": "You are a helpful assistant."},
      {"role": "user", "content": "%%s"}
    ]
  }' | python3 -m json.tool""" % JSON


def run(url, command):
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, timeout=120, env={"URL": url, "PATH": "/usr/bin:/bin:/usr/local/bin"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("model", ["deepseek-ai/DeepSeek-R1-671B", "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "deepseek-ai/DeepSeek-R1-685B"])
def test_how_many_rs(server, model):
    reply = json.loads(run(server.url, CHAT % (model, "how many rs are in strawberry")))
    [choice] = reply["choices"]
    assert reply["object"] == "chat.completion" and choice["finish_reason"] == "stop" and "matched_stop" in choice
    assert "**3**" in choice["message"]["content"] and choice["message"]["reasoning_content"]


def test_who_are_you(server):
    reply = json.loads(run(server.url, CHAT % ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "Who are you?")))
    assert "tiny-r1" in reply["choices"][0]["message"]["content"]


def test_a_completion(server):
    reply = json.loads(run(server.url, COMPLETION))
    assert reply["object"] == "text_completion" and reply["id"].startswith("cmpl-")
    [choice] = reply["choices"]
    assert choice["index"] == 0 and choice["logprobs"] is None and "stop_reason" in choice
    assert 0 < reply["usage"]["completion_tokens"] <= 100


def test_through_a_proxys_path_with_a_key(tmp_path):
    with Server(tmp_path / "log", "--root-path", "/proxy/models/main", "--api-key", "token-of-dstack") as server:
        events = run(server.url, PROXIED).split("\n\n")
    payloads = [event.removeprefix("data: ") for event in events if event.startswith("data: ")]
    assert payloads[-1] == "[DONE]"
    chunks = [json.loads(payload) for payload in payloads[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_thinking_stays_inline_where_that_was_asked_for(tmp_path):
    """The guides that were written for servers without a reasoning parser show `<think>` in the content."""
    with Server(tmp_path / "log", "--reasoning-parser", "none") as server:
        reply = json.loads(run(server.url, CHAT % ("x", "how many rs are in strawberry")))
    content = reply["choices"][0]["message"]["content"]
    assert content.startswith("<think>") and "</think>\n\nThe letter r appears **3** times" in content
