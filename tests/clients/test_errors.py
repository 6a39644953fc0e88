"""What is wrong with a request is said: the status, the field, the way out; what asks for nothing is accepted."""
import httpx2
import openai
import pytest
from conftest import STRAWBERRY, Server

USER = [{"role": "user", "content": "hi"}]
FUNCTION = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def error_of(response, status):
    """The error object, whose four fields are always there."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1), ("temperature", 2.1), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.5), ("min_p", 2), ("top_k", "all"),
        ("n", 0), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("presence_penalty", 3), ("frequency_penalty", -3),
        ("repetition_penalty", 0), ("logit_bias", {"1": 200}), ("logit_bias", {"99999": 1}), ("logit_bias", {"x": 1}), ("stop", ["s"] * 17),
        ("stop", 5), ("stop_token_ids", [-1]), ("cache_salt", 5), ("cache_salt", "s" * 257), ("seed", "seven"), ("stream", "yes"), ("messages", []), ("messages", "hi"), ("messages", None),
        ("top_logprobs", 21), ("top_logprobs", 2),
    ],
)  # fmt: skip
def test_a_bad_chat_field_is_named(http, field, value):
    body = {"model": "any", "messages": USER, "logprobs": True} | {field: value}
    if field == "top_logprobs" and value == 2:
        del body["logprobs"]  # which top_logprobs needs
    error = error_of(http.post(CHAT, json=body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0].split("[")[0] == field and field in error["message"]


@pytest.mark.parametrize("message", [{"role": "king", "content": "hi"}, {"role": "user", "content": 5}, {"role": "user"}, {"content": "hi"}], ids=str)
def test_a_bad_message_is_named_by_its_place(http, message):
    error = error_of(http.post(CHAT, json={"model": "any", "messages": [*USER, message]}), 400)
    assert error["param"].startswith("messages[1]")


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, {"type": "input_audio", "input_audio": {}}])
def test_pictures_and_sound_are_refused(http, part):
    body = {"model": "any", "messages": [{"role": "user", "content": [{"type": "text", "text": "what is this"}, part]}]}
    assert error_of(http.post(CHAT, json=body), 400)["param"].startswith("messages[0].content")


@pytest.mark.parametrize(
    "field, value",
    [("prompt", None), ("prompt", ""), ("prompt", []), ("prompt", [[]]), ("prompt", [1.5]), ("prompt", [99999]), ("prompt", {"text": "hi"}),
     ("logprobs", 21), ("logprobs", True), ("max_tokens", 0), ("temperature", 3)],
)  # fmt: skip
def test_a_bad_completion_field_is_named(http, field, value):
    error = error_of(http.post(COMPLETIONS, json={"model": "any", "prompt": "hi"} | {field: value}), 400)
    assert error["param"].split("[")[0] == field


@pytest.mark.parametrize(
    "field, value",
    [("functions", [FUNCTION["function"]]), ("structural_tag", "{}"), ("use_beam_search", True), ("chat_template", "{{ messages }}"),
     ("suffix", "end"), ("documents", [{"text": "x"}]), ("modalities", ["text", "audio"]), ("lora_path", "x")],
)  # fmt: skip
def test_what_is_not_built_is_refused_by_name(http, field, value):
    error = error_of(http.post(CHAT, json={"model": "any", "messages": USER} | {field: value}), 400)
    assert error["param"] == field and "not supported" in error["message"] and error["code"] == "unsupported_parameter"


def test_neutral_values_ask_for_nothing(ask, client, model):
    plain = ask("hi").choices[0].message
    neutral = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "presence_penalty": 0, "frequency_penalty": 0.0,
        "repetition_penalty": 1, "top_p": 1, "top_k": -1, "min_p": 0, "logit_bias": {}, "stop": [], "stop_token_ids": [], "n": 1, "stream": False,
        "logprobs": False, "user": "ada", "metadata": {"a": "b"}, "guided_choice": [], "best_of": 1, "store": False, "service_tier": "auto",
        "parallel_tool_calls": True, "modalities": ["text"], "an_unknown_field": {"is": "ignored"},
    }  # fmt: skip
    assert ask("hi", extra_body=neutral).choices[0].message == plain
    nulls = dict.fromkeys([*neutral, "seed", "max_tokens", "stream_options", "chat_template_kwargs", "thinking", "guided_json", "functions"])
    assert ask("hi", extra_body=nulls).choices[0].message == plain
    assert ask("hi", tools=[FUNCTION], tool_choice="none").choices[0].message == plain


def test_the_client_raises_what_openai_raises(ask):
    with pytest.raises(openai.BadRequestError) as caught:
        ask("hi", temperature=3)
    error = caught.value
    assert error.status_code == 400 and error.param == "temperature" and error.type == "invalid_request_error"
    assert {"message", "type", "param", "code"} <= set(error.body) and "2" in error.body["message"]


def test_a_stream_fails_before_it_begins(ask):
    with pytest.raises(openai.BadRequestError):
        ask("hi", temperature=3, stream=True)


def test_more_tokens_than_the_context_holds(ask):
    with pytest.raises(openai.BadRequestError) as caught:
        ask("hi", max_tokens=5000)
    assert "4096" in caught.value.body["message"] and "5000" in caught.value.body["message"]
    assert caught.value.code == "context_length_exceeded"


def test_a_prompt_longer_than_the_context(http):
    body = {"model": "any", "prompt": [5] * 4100}
    error = error_of(http.post(COMPLETIONS, json=body), 400)
    assert "4096" in error["message"] and "4100" in error["message"] and error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("body", ["", "{", "[]", "\"hi\"", "{\"messages\": [}"])
def test_a_body_that_is_no_json_object(http, body):
    for path in (CHAT, COMPLETIONS):
        error_of(http.post(path, content=body, headers={"content-type": "application/json"}), 400)


def test_a_body_over_the_limit(http):
    assert error_of(http.post(CHAT, json={"model": "any", "messages": [{"role": "user", "content": "a" * (17 << 20)}]}), 413)


def test_unknown_paths_and_methods(http):
    assert "/v1/nothing" in error_of(http.get("/v1/nothing"), 404)["message"]
    response = http.get(CHAT)
    error_of(response, 405)
    assert "POST" in response.headers["allow"]


def test_the_server_lives_on_after_all_this(ask, strawberry):
    assert ask(STRAWBERRY).choices[0].message.content.strip("\n") == strawberry.content


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("keyed") / "log", "--api-key", "first", "--api-key", "second") as server:
        yield server


@pytest.mark.parametrize("key", ["first", "second"])
def test_a_right_key(keyed, key):
    assert keyed.openai(key).models.list().data


@pytest.mark.parametrize("key", ["sekret", "firs", "firstt"])
def test_a_wrong_key(keyed, key):
    with pytest.raises(openai.AuthenticationError) as caught:
        keyed.openai(key).chat.completions.create(model="any", messages=USER)
    assert caught.value.status_code == 401 and caught.value.code == "invalid_api_key"
    assert f"`{key}`" not in caught.value.body["message"] and f"'{key}'" not in caught.value.body["message"]


def test_no_key(keyed):
    for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("POST", COMPLETIONS)):
        error_of(httpx2.request(method, keyed.url + path, json={}), 401)
    assert httpx2.get(keyed.url + "/health").status_code == 200


def test_a_key_from_the_environment(tmp_path):
    with Server(tmp_path / "log", environment={"R1_API_KEY": "from-the-environment"}) as server:
        assert server.openai("from-the-environment").models.list().data
        with pytest.raises(openai.AuthenticationError):
            server.openai("other").models.list()
