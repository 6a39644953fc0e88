"""Anthropic's Messages through the anthropic client: whole and streamed, tools, thinking, prefills, counts, errors."""
import anthropic
import httpx2
import pytest
from conftest import STRAWBERRY, Server

ANSWERS = {"get_weather": "21 C", "get_time": "08:15", "get_population": "7 million"}
QUESTIONS = [
    ("What is the weather in Oslo?", "get_weather", "Oslo"),
    ("What time is it in Cairo?", "get_time", "Cairo"),
    ("How many people live in Lima?", "get_population", "Lima"),
]
ABOUTS = {
    "get_weather": "Get the current weather of a city",
    "get_time": "Get the local time of a city",
    "get_population": "Get the population of a city",
}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"name": name, "description": about, "input_schema": CITY} for name, about in ABOUTS.items()]
# The client has no argument for it any longer; the field is still the API's.
GREEDY = {"temperature": 0}


def connect(server, key="unused"):
    return anthropic.Anthropic(base_url=server.url, auth_token=key, api_key=None, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def claude(server):
    return connect(server)


def request(messages, **options):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return {"model": "any", "max_tokens": 300, "messages": messages, "extra_body": GREEDY | options.pop("extra_body", {})} | options


@pytest.fixture
def create(claude):
    return lambda messages, **options: claude.messages.create(**request(messages, **options))


@pytest.fixture
def stream(claude):
    """The final message of a stream, as the client puts it together."""

    def stream(messages, **options):
        with claude.messages.stream(**request(messages, **options)) as events:
            return events.get_final_message()

    return stream


def kinds(message):
    return [block.type for block in message.content]


def text_of(message):
    return "".join(block.text for block in message.content if block.type == "text")


def said(message):
    """Without what differs from request to request."""
    blocks = [block.to_dict() for block in message.content]
    for block in blocks:
        block.pop("id", None)
        # What only the stream's helper adds.
        block.pop("parsed_output", None)
    return blocks, message.stop_reason, message.stop_sequence, message.usage.output_tokens


def test_a_message_thinks_and_answers(create, strawberry):
    message = create(STRAWBERRY)
    assert (message.type, message.role, message.stop_reason, message.stop_sequence) == ("message", "assistant", "end_turn", None)
    assert message.id.startswith("msg_") and kinds(message) == ["thinking", "text"]
    assert message.content[0].thinking.strip("\n") == strawberry.reasoning
    assert message.content[1].text.strip("\n") == strawberry.content
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(strawberry.prompt_ids)
    assert usage.output_tokens == len(strawberry.output_ids) and 0 < usage.output_tokens_details.thinking_tokens < usage.output_tokens
    assert usage.cache_creation_input_tokens == 0


def test_thinking_can_be_switched_off(create):
    message = create(STRAWBERRY, thinking={"type": "disabled"})
    assert kinds(message) == ["text"] and message.usage.output_tokens_details.thinking_tokens == 0
    for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
        assert kinds(create(STRAWBERRY, thinking=thinking)) == ["thinking", "text"]
    hidden = create(STRAWBERRY, thinking={"type": "adaptive", "display": "omitted"})
    assert kinds(hidden) == ["text"] and hidden.usage.output_tokens_details.thinking_tokens > 0


def test_a_budget_bounds_the_thinking(create):
    message = create(STRAWBERRY, thinking={"type": "enabled", "budget_tokens": 5})
    # The two tags count as thinking too, those that are generated.
    assert message.usage.output_tokens_details.thinking_tokens <= 7 and text_of(message)


@pytest.mark.parametrize(
    "options",
    [{}, {"thinking": {"type": "disabled"}}, {"stop_sequences": ["straw"]}, {"max_tokens": 9}, {"tools": TOOLS}, {"system": "Be brief."}],
    ids=str,
)
@pytest.mark.parametrize("question", [STRAWBERRY, QUESTIONS[0][0]])
def test_a_stream_says_what_the_whole_message_says(create, stream, question, options):
    assert said(stream(question, **options)) == said(create(question, **options))


def test_the_streams_events_come_in_anthropics_order(claude):
    names = []
    for event in claude.messages.create(**request(STRAWBERRY), stream=True):
        if event.type == "message_start":
            assert event.message.content == [] and event.message.usage.input_tokens > 0 and event.message.stop_reason is None
        if event.type == "message_delta":
            assert event.delta.stop_reason == "end_turn" and event.usage.output_tokens > 0
        if not names or names[-1] != event.type:
            names.append(event.type)
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert names == ["message_start", *block, *block, "message_delta", "message_stop"]


def test_text_streams_as_it_comes(claude, strawberry):
    with claude.messages.stream(**request(STRAWBERRY)) as events:
        pieces = list(events.text_stream)
    assert len(pieces) > 3 and "".join(pieces).strip("\n") == strawberry.content


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("question, name, city", QUESTIONS)
def test_the_model_uses_a_tool_and_its_result(create, stream, question, name, city, streamed):
    ask = stream if streamed else create
    first = ask(question, tools=TOOLS)
    assert first.stop_reason == "tool_use" and kinds(first)[-1] == "tool_use"
    used = first.content[-1]
    assert used.id.startswith("toolu_") and (used.name, used.input) == (name, {"city": city})
    history = [
        {"role": "user", "content": question},
        # As it came, thinking and empty signature included.
        first.to_param(),
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": used.id, "content": ANSWERS[name]}]},
    ]
    last = ask(history, tools=TOOLS)
    assert last.stop_reason == "end_turn" and ANSWERS[name] in text_of(last) and city in text_of(last)


@pytest.mark.parametrize("choice, name", [({"type": "any"}, "get_weather"), ({"type": "tool", "name": "get_time"}, "get_time")])
def test_a_demanded_tool_is_used(create, choice, name):
    message = create("What is the weather in Oslo?", tools=TOOLS, tool_choice=choice | {"disable_parallel_tool_use": True})
    uses = [block for block in message.content if block.type == "tool_use"]
    assert message.stop_reason == "tool_use" and [use.name for use in uses] == [name]
    assert isinstance(uses[0].input["city"], str)


def test_a_forbidden_tool_is_not_used(create):
    message = create("What is the weather in Oslo?", tools=TOOLS, tool_choice={"type": "none"})
    assert "tool_use" not in kinds(message) and message.stop_reason != "tool_use"


def test_a_schema_holds_the_text(create, stream):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    config = {"format": {"type": "json_schema", "schema": schema}}
    for ask in (create, stream):
        message = ask("what is 2 plus 3", output_config=config, max_tokens=400)
        assert message.stop_reason == "end_turn" and text_of(message).lstrip().startswith("{")


def test_a_cut_off_call_crashes_no_client(create, stream):
    question = QUESTIONS[0][0]
    whole = create(question, tools=TOOLS)
    for missing in range(1, 25):
        options = {"tools": TOOLS, "max_tokens": whole.usage.output_tokens - missing}
        messages = [create(question, **options), stream(question, **options)]
        assert said(messages[0]) == said(messages[1]) and messages[0].stop_reason == "max_tokens"
        for block in messages[0].content:
            assert block.type != "tool_use" or block.input == {"city": "Oslo"}


def test_a_prefill_is_continued(create, client, model):
    question = {"role": "user", "content": "What is the capital of Norway?"}
    prefill = {"role": "assistant", "content": "The capital of"}
    said = text_of(create([question, prefill]))
    assert said.startswith(" Norway")
    chat = [question, prefill | {"prefix": True}]
    assert said == client.chat.completions.create(model=model, messages=chat, temperature=0).choices[0].message.content


def test_stop_sequences_are_named(create, strawberry):
    word = strawberry.content.split()[1]
    message = create(STRAWBERRY, stop_sequences=["never said", word], thinking={"type": "disabled"})
    if word in text_of(create(STRAWBERRY, thinking={"type": "disabled"})):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", word)
    assert word not in text_of(message)
    assert create(STRAWBERRY, max_tokens=5).stop_reason == "max_tokens"


def test_tokens_are_counted_as_they_are_read(claude, create):
    body = {"messages": [{"role": "user", "content": "What is the weather in Oslo?"}], "tools": TOOLS, "system": "Be brief."}
    usage = create(body["messages"], tools=TOOLS, system="Be brief.", max_tokens=1).usage
    assert claude.messages.count_tokens(model="any", **body).input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_cached_tokens_are_no_input_tokens(create):
    question = " ".join(f"step {i}" for i in range(100))
    first, second = (create(question, max_tokens=1).usage for _ in range(2))
    assert second.cache_read_input_tokens >= 64
    assert second.input_tokens + second.cache_read_input_tokens == first.input_tokens + first.cache_read_input_tokens


@pytest.mark.parametrize(
    "options, named",
    [
        ({"max_tokens": 0}, "max_tokens"), ({"messages": []}, "messages"), ({"extra_body": {"temperature": 3}}, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]}, "messages.0.content.0"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"), ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"), ({"thinking": {"type": "sometimes"}}, "thinking.type"), ({"stop_sequences": [""]}, "stop_sequences"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(create, options, named):
    with pytest.raises(anthropic.BadRequestError) as refused:
        create(options.pop("messages", "hi"), **options)
    error = refused.value
    assert error.type == "invalid_request_error" and error.api_message.startswith(f"{named}: ")
    assert error.request_id == error.body["request_id"] == error.response.headers["x-request-id"]


def test_max_tokens_must_be_given(http):
    response = http.post("/v1/messages", json={"model": "any", "messages": [{"role": "user", "content": "hi"}]})
    assert response.status_code == 400 and response.json()["error"]["message"].startswith("max_tokens: ")


def test_keys_names_and_sizes_are_refused_in_anthropics_words(tmp_path):
    flags = ["--api-key", "secret", "--strict-model-name", "--max-body-bytes", "5000"]
    with Server(tmp_path / "log", *flags) as server:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            connect(server, "wrong").messages.create(**request("hi"))
        assert refused.value.type == "authentication_error"
        client = connect(server, "secret")
        with pytest.raises(anthropic.NotFoundError) as refused:
            client.messages.create(**request("hi"))
        assert refused.value.type == "not_found_error"
        with pytest.raises(anthropic.APIStatusError) as refused:
            client.messages.create(**request("hi " * 5000))
        assert (refused.value.status_code, refused.value.type) == (413, "request_too_large")
        wrong = httpx2.get(server.url + "/v1/messages", headers={"authorization": "Bearer secret"})
        assert wrong.status_code == 405 and wrong.json()["type"] == "error"
        # Anthropic's own header for keys.
        by_header = anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0, timeout=120)
        model = httpx2.get(server.url + "/v1/models", headers={"authorization": "Bearer secret"}).json()["data"][0]["id"]
        assert by_header.messages.create(**request("hi", max_tokens=5) | {"model": model}).usage.output_tokens == 5
