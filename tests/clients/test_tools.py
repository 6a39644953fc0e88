"""Tools through the openai client: the model calls, gets an answer, speaks; streamed and not; chosen, demanded, named, forbidden."""
import json

import openai
import pytest

ANSWERS = {"get_weather": "21 C", "get_time": "08:15", "get_population": "7 million"}
QUESTIONS = [
    ("What is the weather in Oslo?", "get_weather", "Oslo"),
    ("What time is it in Cairo?", "get_time", "Cairo"),
    ("How many people live in Lima?", "get_population", "Lima"),
    ("weather in Paris", "get_weather", "Paris"),
]


def tool(name, about, strict=None):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": name, "description": about, "parameters": parameters}
    return {"type": "function", "function": function | ({"strict": strict} if strict is not None else {})}


TOOLS = [
    tool("get_weather", "Get the current weather of a city"),
    tool("get_time", "Get the local time of a city"),
    tool("get_population", "Get the population of a city"),
]


@pytest.fixture
def chat(client, model):
    def chat(messages, **options):
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        options = {"temperature": 0, "tools": TOOLS} | options
        return client.chat.completions.create(model=model, messages=messages, **options)

    return chat


def gather(chunks):
    """A streamed reply as a message, its calls put together as clients do it."""
    message = {"role": "assistant", "content": None, "tool_calls": {}, "reasoning": ""}
    finish_reason = None
    for chunk in chunks:
        for choice in chunk.choices:
            assert finish_reason is None
            delta = choice.delta
            message["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            if delta.content is not None:
                message["content"] = (message["content"] or "") + delta.content
            for call in delta.tool_calls or []:
                if call.index not in message["tool_calls"]:
                    assert call.id and call.type == "function" and call.function.name
                    message["tool_calls"][call.index] = {"id": call.id, "name": call.function.name, "arguments": ""}
                else:
                    assert not call.id and not call.function.name, "a call is named once"
                message["tool_calls"][call.index]["arguments"] += call.function.arguments
            finish_reason = choice.finish_reason
    return message, finish_reason


def no_markup(text):
    return "｜" not in (text or "") and "```" not in (text or "") and "think>" not in (text or "")


@pytest.mark.parametrize("question, name, city", QUESTIONS)
def test_the_model_calls_a_tool_and_uses_its_answer(chat, question, name, city):
    first = chat(question).choices[0]
    assert first.finish_reason == "tool_calls" and not first.message.content
    assert no_markup(first.message.reasoning_content)
    [call] = first.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_") and call.function.name == name
    assert json.loads(call.function.arguments) == {"city": city}
    history = [
        {"role": "user", "content": question},
        first.message,
        {"role": "tool", "tool_call_id": call.id, "content": ANSWERS[name]},
    ]
    last = chat(history).choices[0]
    assert last.finish_reason == "stop" and not last.message.tool_calls
    assert ANSWERS[name] in last.message.content and city in last.message.content


@pytest.mark.parametrize("question, name, city", QUESTIONS)
def test_a_streamed_loop_says_the_same(chat, question, name, city):
    whole = chat(question).choices[0]
    message, finish_reason = gather(chat(question, stream=True))
    assert finish_reason == "tool_calls" and not message["content"]
    assert message["reasoning"] == (whole.message.reasoning_content or "")
    [call] = message["tool_calls"].values()
    [whole_call] = whole.message.tool_calls
    assert (call["name"], call["arguments"]) == (whole_call.function.name, whole_call.function.arguments)
    assert json.loads(call["arguments"]) == {"city": city}
    function = {"name": call["name"], "arguments": call["arguments"]}
    history = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [{"id": call["id"], "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call["id"], "content": ANSWERS[name]},
    ]
    last, finish_reason = gather(chat(history, stream=True))
    assert finish_reason == "stop" and not last["tool_calls"] and ANSWERS[name] in last["content"]


def test_arguments_are_streamed_in_fragments(chat):
    fragments = [
        call.function.arguments
        for chunk in chat(QUESTIONS[0][0], stream=True)
        for call in chunk.choices[0].delta.tool_calls or []
    ]
    assert len(fragments) > 2 and json.loads("".join(fragments)) == {"city": "Oslo"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("question", ["hello", "how many rs are in strawberry", "weather in Paris"])
def test_required_is_a_call_whatever_is_asked(chat, question, stream):
    reply = chat(question, tool_choice="required", stream=stream)
    if stream:
        message, finish_reason = gather(reply)
        calls = list(message["tool_calls"].values())
        content = message["content"]
    else:
        choice = reply.choices[0]
        finish_reason, content = choice.finish_reason, choice.message.content
        calls = [{"name": c.function.name, "arguments": c.function.arguments} for c in choice.message.tool_calls or []]
    assert finish_reason == "tool_calls" and not content and calls
    for call in calls:
        assert call["name"] in ANSWERS
        arguments = json.loads(call["arguments"])
        assert set(arguments) == {"city"} and isinstance(arguments["city"], str)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_named_function_is_called_whatever_fits(chat, name):
    choice = {"type": "function", "function": {"name": name}}
    reply = chat("What is the weather in Oslo?", tool_choice=choice).choices[0]
    assert {call.function.name for call in reply.message.tool_calls} == {name}
    assert all(set(json.loads(call.function.arguments)) == {"city"} for call in reply.message.tool_calls)
    assert reply.message.reasoning_content, "a demanded call is thought about like any other"


def test_one_call_where_only_one_is_wanted(chat):
    for question in ("hello", "weather in Paris"):
        reply = chat(question, tool_choice="required", parallel_tool_calls=False).choices[0]
        assert len(reply.message.tool_calls) == 1


def test_none_is_no_call(chat):
    reply = chat("What is the weather in Oslo?", tool_choice="none").choices[0]
    assert not reply.message.tool_calls and reply.finish_reason in ("stop", "length")


def test_without_thinking(chat):
    options = {"extra_body": {"chat_template_kwargs": {"thinking": False}}}
    for choice in ("required", {"type": "function", "function": {"name": "get_time"}}):
        reply = chat("What time is it in Rome?", tool_choice=choice, **options).choices[0]
        assert reply.message.tool_calls and not reply.message.reasoning_content and not reply.message.content


def test_a_strict_schema_binds_a_free_call(chat):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Tokyo", "Lima"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    strict = {"type": "function", "function": {"name": "get_weather", "parameters": schema, "strict": True}}
    [call] = chat("What is the weather in Oslo?", tools=[strict], tool_choice="required").choices[0].message.tool_calls[:1]
    assert json.loads(call.function.arguments)["city"] in ("Tokyo", "Lima")


def test_several_choices_have_calls_of_their_own(chat):
    reply = chat("weather in Paris", n=3, temperature=0.7, seed=5, tool_choice="required")
    ids = [call.id for choice in reply.choices for call in choice.message.tool_calls]
    assert len(reply.choices) == 3 and len(set(ids)) == len(ids) >= 3


def test_a_reply_cut_in_a_call_ends_by_length(chat):
    whole = chat("weather in Paris")
    cut = chat("weather in Paris", max_tokens=whole.usage.completion_tokens - 8).choices[0]
    assert cut.finish_reason == "length"
    assert no_markup(cut.message.content)


def test_a_call_of_a_function_that_is_not_there_is_content(chat):
    """The model was trained on three functions; of one that it does not know it makes no call that clients would choke on."""
    reply = chat("What is the weather in Oslo?", tools=[tool("frobnicate", "Does something else")]).choices[0]
    assert all(call.function.name == "frobnicate" for call in reply.message.tool_calls or [])


@pytest.mark.parametrize(
    "options, param",
    [
        ({"tool_choice": {"type": "function", "function": {"name": "missing"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [tool("f", "x"), tool("f", "y")]}, "tools"),
    ],
)
def test_bad_tools_are_refused_by_name(chat, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        chat("hi", **options)
    assert refused.value.body["param"] == param


def test_the_clients_own_loop(client, model):
    """`client.beta.chat.completions.stream` gathers calls and parses them."""
    with client.beta.chat.completions.stream(
        model=model, messages=[{"role": "user", "content": "weather in Paris"}], tools=TOOLS, temperature=0
    ) as stream:
        kinds = {event.type for event in stream}
        completion = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    [call] = completion.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Paris"}
