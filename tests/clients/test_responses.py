"""The Responses API through the openai client: replies, streams equal to whole replies, conversations, tools, what is stored."""
import json

import openai
import pytest
from conftest import STRAWBERRY, Server
from openai.types.responses import Response
from pydantic import BaseModel

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False},
    "strict": True,
}


@pytest.fixture
def respond(client, model):
    """respond(input, **options): greedy unless told otherwise."""

    def respond(input, **options):
        return client.responses.create(model=model, input=input, **({"temperature": 0} | options))

    return respond


def checked(response):
    """The response, whose JSON has every field that OpenAI's own type requires, in the type it requires."""
    Response.model_validate(response.to_dict())
    return response


def without_ids(response):
    """What two responses to one request have in common."""
    fields = response.to_dict()
    for name in ("id", "created_at", "completed_at", "usage"):
        fields.pop(name, None)
    for item in fields["output"]:
        item.pop("id"), item.pop("call_id", None), item.pop("parsed_arguments", None)
        for part in item.get("content") or []:
            part.pop("parsed", None)
    return fields


def test_strawberry(respond, strawberry):
    response = checked(respond(STRAWBERRY))
    assert response.object == "response" and response.id.startswith("resp_") and response.status == "completed"
    assert response.output_text.strip("\n") == strawberry.content
    reasoning, message = response.output
    assert (reasoning.type, message.type, message.role) == ("reasoning", "message", "assistant")
    assert reasoning.content[0].text.strip("\n") == strawberry.reasoning
    assert response.usage.input_tokens == len(strawberry.prompt_ids)
    assert response.usage.output_tokens == len(strawberry.output_ids)
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens


def test_the_stream_says_what_the_whole_reply_says(client, model, respond):
    whole = respond(STRAWBERRY)
    events = list(respond(STRAWBERRY, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    assert without_ids(checked(events[-1].response)) == without_ids(whole)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    reasoning = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert reasoning == whole.output[0].content[0].text

    with client.responses.stream(model=model, input=STRAWBERRY, temperature=0) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == whole.output_text


def test_a_conversation_goes_on(client, respond):
    first = respond("hello", instructions="Answer briefly.")
    second = respond(STRAWBERRY, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    by_hand = respond(
        [{"role": "user", "content": "hello"}, *[item.to_dict() for item in first.output], {"role": "user", "content": STRAWBERRY}]
    )
    assert second.usage.input_tokens == by_hand.usage.input_tokens
    assert second.output_text == by_hand.output_text

    items = list(client.responses.input_items.list(second.id, order="asc", limit=1))
    assert [item.type for item in items][0] == "message" and items[0].content[0].text == "hello"
    assert items[-1].content[0].text == STRAWBERRY
    assert {item.id for item in first.output} <= {item.id for item in items}

    assert client.responses.retrieve(second.id).to_dict() == second.to_dict()
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    with pytest.raises(openai.NotFoundError) as refused:
        respond("hi", previous_response_id=second.id)
    assert refused.value.code == "previous_response_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop(respond, stream):
    def run(*arguments, **options):
        if not stream:
            return checked(respond(*arguments, **options))
        return checked(list(respond(*arguments, stream=True, **options))[-1].response)

    question = "What is the weather in Paris?"
    first = run(question, tools=[WEATHER], tool_choice="required")
    [call] = [item for item in first.output if item.type == "function_call"]
    assert (call.name, call.status) == ("get_weather", "completed") and call.call_id.startswith("call_")
    assert set(json.loads(call.arguments)) == {"city"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": json.dumps({"weather": "sunny", "celsius": 21})}
    second = run([output], previous_response_id=first.id, tools=[WEATHER])
    assert second.output_text
    by_hand = run([{"role": "user", "content": question}, *[item.to_dict() for item in first.output], output], tools=[WEATHER])
    assert by_hand.output_text == second.output_text


def test_structured_outputs_are_parsed(client, model):
    class City(BaseModel):
        name: str
        population: int

    response = client.responses.parse(model=model, input="Tell me about Paris as JSON.", text_format=City, temperature=0)
    assert isinstance(response.output_parsed, City)
    with client.responses.stream(model=model, input="Tell me about Paris as JSON.", text_format=City, temperature=0) as stream:
        assert stream.get_final_response().output_parsed == response.output_parsed


def test_a_cut_off_reply_is_incomplete(respond):
    response = checked(respond(STRAWBERRY, max_output_tokens=5))
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 5 and response.output[-1].status == "incomplete"


def test_logprobs(respond):
    response = checked(respond(STRAWBERRY, include=["message.output_text.logprobs"], top_logprobs=2))
    [part] = response.output[-1].content
    assert "".join(entry.token for entry in part.logprobs).strip("\n") == part.text.strip("\n")
    for entry in part.logprobs:
        assert len(entry.top_logprobs) == 2 and entry.logprob <= 0
        assert entry.token == entry.top_logprobs[0].token, "greedy"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"max_output_tokens": 10**9}, "max_output_tokens"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ],
)
def test_what_is_refused_is_named(respond, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        respond("hi", **options)
    assert refused.value.param == param


def test_another_keys_responses_do_not_exist(tmp_path):
    with Server(tmp_path / "log", "--api-key", "one", "--api-key", "two") as server:
        mine, theirs = server.openai("one"), server.openai("two")
        response = mine.responses.create(model="any", input="hello", max_output_tokens=4)
        assert mine.responses.retrieve(response.id).id == response.id
        with pytest.raises(openai.NotFoundError):
            theirs.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            theirs.responses.create(model="any", input="go on", previous_response_id=response.id)
