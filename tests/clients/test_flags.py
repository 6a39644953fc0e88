"""Flags and what they change: files of flags, keys, web pages, what is logged, defaults of sampling, a root path."""
import json
import subprocess
import time

import httpx2
import openai
import pytest
from conftest import COMMAND, STRAWBERRY, Server

USER = [{"role": "user", "content": STRAWBERRY}]

YAML = """
# In vLLM's words.
served-model-name: [main, "org/alias"]
api_key: [007, zweiter]
admin-api-key: wurzel
root-path: /proxy/models/main
allowed-origins: ["https://chat.example.com"]
allowed_methods: [GET, POST]
allow-credentials: true
max-choices: 3
max-logprobs: 2
override-generation-config: {temperature: 0, max_new_tokens: 7}
default-chat-template-kwargs: {}
disable-fastapi-docs: true
trust-remote-code: true
enforce-eager: false
"""


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configured")
    (folder / "flags.yaml").write_text(YAML)
    # The command line wins, of a list's values too.
    with Server(folder / "log", "--config", folder / "flags.yaml", "--max-choices", "2") as server:
        yield server


def refused(*arguments, environment=None):
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, env=environment)
    assert ended.returncode != 0, ended
    return ended.stderr


def test_a_file_of_flags(configured):
    client = configured.openai(api_key="007")
    assert [model.id for model in client.models.list()] == ["main", "org/alias"]
    reply = client.chat.completions.create(model="main", messages=USER)
    again = client.chat.completions.create(model="main", messages=USER)
    assert reply.usage.completion_tokens == 7 and reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.reasoning_content == again.choices[0].message.reasoning_content
    assert "--trust-remote-code" in configured.tail()
    for options, field in [({"n": 3}, "n"), ({"logprobs": True, "top_logprobs": 3}, "top_logprobs")]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="main", messages=USER, **options)
        assert caught.value.param == field
    client.chat.completions.create(model="main", messages=USER, n=2, logprobs=True, top_logprobs=2, max_tokens=1)


def test_keys_come_in_either_header(configured):
    for headers, status in [
        ({"Authorization": "Bearer 007"}, 200),
        ({"Authorization": "Bearer zweiter"}, 200),
        ({"x-api-key": "zweiter"}, 200),
        ({"x-api-key": "007", "Authorization": "Bearer unused"}, 200),
        ({"x-api-key": "7"}, 401),
        ({"x-api-key": ""}, 401),
        ({"Authorization": "Bearer wurzel"}, 401),
        ({"Authorization": "007"}, 401),
        ({}, 401),
    ]:
        assert httpx2.get(configured.url + "/v1/models", headers=headers).status_code == status, headers
    log = configured.log.read_text()
    assert "zweiter" not in log and "wurzel" not in log


def test_a_root_path(configured):
    headers = {"x-api-key": "007"}
    for path in ("/proxy/models/main/v1/models", "/proxy/models/main/models", "/v1/models"):
        assert httpx2.get(configured.url + path, headers=headers).status_code == 200, path
    client = openai.OpenAI(base_url=configured.url + "/proxy/models/main", api_key="zweiter", max_retries=0)
    assert client.chat.completions.create(model="any", messages=USER).usage.completion_tokens == 7
    assert httpx2.get(configured.url + "/proxy/models/main/health").status_code == 200


def test_web_pages_that_are_not_named_are_not_served(configured):
    def preflight(origin, method="POST"):
        headers = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": "x-api-key"}
        return httpx2.options(configured.url + "/v1/chat/completions", headers=headers).headers

    allowed = preflight("https://chat.example.com")
    assert allowed["access-control-allow-origin"] == "https://chat.example.com"
    assert allowed["access-control-allow-credentials"] == "true"
    assert sorted(allowed["access-control-allow-methods"].split(",")) == ["GET", "POST"]
    assert allowed["access-control-allow-headers"] == "x-api-key"
    assert "access-control-allow-origin" not in preflight("https://other.example.com")


def test_wrong_files_of_flags_are_refused_by_name(tmp_path):
    def said(text, name="flags.yaml"):
        (tmp_path / name).write_text(text)
        return refused("--config", tmp_path / name)

    for text, needles in [
        ("max-model-length: 3", ["flags.yaml", "max-model-length", "--max-model-len"]),
        ("port: many", ["flags.yaml", "--port", "many"]),
        ("enforce-eager: 3", ["enforce-eager", "true or false"]),
        ("a: [", ["flags.yaml"]),
    ]:
        error = said(text)
        assert all(needle in error for needle in needles), error
    assert "port" in said("port = ", "flags.toml")
    assert ".yaml" in said("port=1", "flags.ini")
    # The values of the file are checked as those of the command line.
    assert "--max-model-len" in said("max-model-len = 100000", "flags.toml")


def test_without_an_admin_key_nothing_is_there(server):
    for headers in ({}, {"Authorization": "Bearer wurzel"}, {"x-api-key": ""}):
        assert httpx2.post(server.url + "/flush_cache", headers=headers).status_code == 404


def test_an_empty_key_is_refused():
    assert "--api-key" in refused("--api-key", "")
    assert "--admin-api-key" in refused("--admin-api-key", "")


def lines(log):
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def ask_and_leave(server):
    """One whole reply, and one whose client leaves."""
    server.openai().chat.completions.create(model="any", messages=USER, temperature=0)
    options = {"extra_body": {"ignore_eos": True, "min_tokens": 2000}, "max_tokens": 2000}
    with server.openai().chat.completions.create(model="any", messages=USER, stream=True, **options) as stream:
        next(chunk for chunk in stream if getattr(chunk.choices[0].delta, "reasoning_content", None))
    server.wait_idle()
    time.sleep(0.2)


def test_the_log_holds_no_texts(tmp_path):
    with Server(tmp_path / "log", "--log-format", "json", "--log-level", "DEBUG") as server:
        ask_and_leave(server)
    # The banner, which is no line of the log, holds the question.
    for secret in ("strawberry", "So I count", "**3**"):
        assert not any(secret in json.dumps(line) for line in lines(tmp_path / "log")), secret
    requests = [line["fields"] for line in lines(tmp_path / "log") if line["fields"].get("path") == "/v1/chat/completions"]
    assert [request["status"] for request in requests if request["message"] == "request"] == [200, 499]


def test_the_log_holds_texts_when_asked_to(tmp_path, strawberry):
    with Server(tmp_path / "log", "--log-format", "json", "--log-prompts", "--max-log-len", "60", "--no-request-log") as server:
        ask_and_leave(server)
    fields = [line["fields"] for line in lines(tmp_path / "log")]
    prompts = [field["prompt"] for field in fields if field["message"] == "prompt"]
    replies = [field["reply"] for field in fields if field["message"] == "reply"]
    assert len(prompts) == len(replies) == 2
    for text in prompts + replies:
        assert len(text) <= 61
    assert "how many rs are in" in prompts[0] and prompts[0].endswith("…")
    assert replies[0] == strawberry.text[:60] + "…"
    assert not any(field["message"] == "request" for field in fields)


def test_texts_cannot_break_a_line_of_the_log(tmp_path):
    with Server(tmp_path / "log", "--log-prompts") as server:
        text = "one\nFAKE LINE \x1b[31m"
        server.openai().completions.create(model="any", prompt=text, max_tokens=1)
    log = (tmp_path / "log").read_text()
    assert r"one\nFAKE LINE \u{1b}[31m" in log and "\nFAKE" not in log


def test_logging_can_be_turned_down(tmp_path):
    with Server(tmp_path / "log", "--log-level", "warning") as server:
        server.openai().completions.create(model="any", prompt="hi", max_tokens=1)
    assert " INFO " not in (tmp_path / "log").read_text()


def test_templates_that_are_none_are_named(tmp_path):
    (tmp_path / "broken.jinja").write_text("fine\n{% if %}\n")
    error = refused("--chat-template", tmp_path / "broken.jinja")
    assert "broken.jinja" in error and ":2)" in error, error
    assert "takes a file" in refused("--chat-template", "{{ messages }}")


def test_words_of_other_servers(tmp_path):
    arguments = ["--tool-call-parser", "deepseek_v3", "--enable-auto-tool-choice", "--reasoning-parser", "deepseek_r1"]
    arguments += ["--enable-reasoning", "--guided-decoding-backend", "xgrammar", "--stream-interval", "2", "--max_num_seqs", "4", "-tp", "2"]
    with Server(tmp_path / "log", *arguments) as server:
        assert server.openai().completions.create(model="any", prompt="hi", max_tokens=1).usage.completion_tokens == 1
    log = (tmp_path / "log").read_text()
    for flag in ("--enable-auto-tool-choice", "--enable-reasoning", "--guided-decoding-backend", "--stream-interval"):
        assert f"{flag}: " in log, log
    assert "2 tensor-parallel ranks" in log
    for flag in ("--uds", "--speculative-config", "--enable-lora"):
        assert flag in refused(flag, *([] if flag == "--enable-lora" else ["x"]))
