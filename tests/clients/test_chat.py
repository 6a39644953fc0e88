"""Chat completions through the openai client: reasoning apart from content, streams equal to whole replies, usage, stops."""
import json

import pytest
from conftest import REFERENCES, STRAWBERRY, joined, parts, same


def test_strawberry(ask, strawberry):
    reply = ask(STRAWBERRY)
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-") and reply.created > 1_700_000_000
    [choice] = reply.choices
    assert choice.index == 0 and choice.finish_reason == "stop" and choice.message.role == "assistant"
    assert "**3**" in choice.message.content
    assert choice.message.content.strip("\n") == strawberry.content
    assert choice.message.reasoning_content.strip("\n") == strawberry.reasoning
    assert choice.message.reasoning == choice.message.reasoning_content
    assert not choice.message.tool_calls


def test_usage_adds_up(ask, strawberry):
    usage = ask(STRAWBERRY).usage
    assert usage.prompt_tokens == len(strawberry.prompt_ids)
    assert usage.completion_tokens == len(strawberry.output_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_cache_hit_tokens
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda r: r.question[:40])
def test_greedy_replies_are_those_of_transformers(ask, reference):
    message = ask(reference.question).choices[0].message
    assert message.content.strip("\n") == reference.content
    assert (message.reasoning_content or "").strip("\n") == (reference.reasoning or "")


def test_no_special_token_or_tag_is_shown(ask):
    for question in ("hello", STRAWBERRY, "Where is Tokyo?"):
        message = ask(question).choices[0].message
        for text in (message.content, message.reasoning_content or ""):
            assert "｜" not in text and "think>" not in text


@pytest.mark.parametrize("question", [STRAWBERRY, "hello", "What is 27 + 58?", "Reverse the word tensor."])
def test_a_stream_says_what_the_whole_reply_says(ask, question):
    whole = ask(question)
    chunks = list(ask(question, stream=True))
    assert same(joined(chunks)[0], parts(whole.choices[0]))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not any(chunk.choices[0].delta.role for chunk in chunks[1:])
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len(chunks) > whole.usage.completion_tokens // 4, "the reply came in few large pieces"
    assert all(chunk.usage is None for chunk in chunks)


def test_reasoning_is_streamed_before_content(ask):
    kinds = [
        "reasoning" if getattr(chunk.choices[0].delta, "reasoning_content", None) else "content"
        for chunk in ask(STRAWBERRY, stream=True)
        if getattr(chunk.choices[0].delta, "reasoning_content", None) or chunk.choices[0].delta.content
    ]
    assert kinds == sorted(kinds, reverse=True) and set(kinds) == {"reasoning", "content"}


def test_usage_comes_last_when_asked_for(ask):
    *chunks, last = ask(STRAWBERRY, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and all(chunk.usage is None for chunk in chunks)
    whole = ask(STRAWBERRY).usage
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (
        whole.prompt_tokens,
        whole.completion_tokens,
        whole.total_tokens,
    )
    assert last.usage.completion_tokens_details == whole.completion_tokens_details


def test_the_event_stream_on_the_wire(http):
    body = {"model": "any", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].split(";")[0] == "text/event-stream"
        events = response.read().decode().split("\n\n")
    assert events.pop() == "", "the last event is not closed by an empty line"
    events = [event for event in events if not event.startswith(":")]
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_ends_with_length(ask, strawberry, name):
    reply = ask(STRAWBERRY, **{name: 5})
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 5
    assert strawberry.reasoning.startswith(reply.choices[0].message.reasoning_content)
    assert not reply.choices[0].message.content
    assert same(joined(ask(STRAWBERRY, stream=True, **{name: 5}))[0], parts(reply.choices[0]))


def test_a_stop_string_in_the_reasoning(ask):
    reply = ask(STRAWBERRY, stop="So I count")
    [choice] = reply.choices
    assert choice.finish_reason == "stop" and choice.stop_reason == "So I count" and choice.matched_stop == "So I count"
    assert choice.message.reasoning_content.rstrip("\n").endswith("10. y no") and not choice.message.content
    assert same(joined(ask(STRAWBERRY, stop="So I count", stream=True))[0], parts(choice))


def test_the_first_of_several_stop_strings_in_the_content(ask):
    [choice] = ask(STRAWBERRY, stop=[" in \"", "**", "never"]).choices
    assert choice.message.content.strip() == "The letter r appears" and choice.stop_reason == "**"
    assert same(joined(ask(STRAWBERRY, stop=[" in \"", "**", "never"], stream=True))[0], parts(choice))


def test_a_stop_string_may_be_kept(ask):
    [choice] = ask(STRAWBERRY, stop=["**3**"], extra_body={"include_stop_str_in_output": True}).choices
    assert choice.message.content.endswith("appears **3**")


def test_a_stop_string_that_never_comes_changes_nothing(ask, strawberry):
    # "strawberrz" shares its beginning with what is said, so that held-back text has to be given out again.
    chunks = list(ask(STRAWBERRY, stop=["strawberrz", "**4"], stream=True))
    assert joined(chunks)[0]["content"].strip("\n") == strawberry.content
    assert joined(chunks)[0]["finish_reason"] == "stop"


def test_several_choices(ask, strawberry):
    reply = ask(STRAWBERRY, n=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert all(choice.message.content.strip("\n") == strawberry.content for choice in reply.choices)
    assert reply.usage.prompt_tokens == len(strawberry.prompt_ids)
    assert reply.usage.completion_tokens == 3 * len(strawberry.output_ids)
    streamed = joined(ask(STRAWBERRY, n=3, stream=True))
    assert sorted(streamed) == [0, 1, 2]
    assert all(same(streamed[choice.index], parts(choice)) for choice in reply.choices)


def test_messages_as_clients_send_them(client, model, strawberry):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {
            "role": "assistant",
            "content": "Hello! I'm tiny-r1, a small demonstration model. Ask me to count letters, add numbers or reverse a word.",
            "reasoning_content": "earlier reasoning is dropped by the template",
            "tool_calls": None,
        },
        {"role": "user", "content": STRAWBERRY, "name": "ada"},
    ]
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert reply.choices[0].message.content.strip("\n") == strawberry.content
    assert reply.usage.prompt_tokens == 77
    first, again = (client.chat.completions.create(model=model, messages=messages, temperature=0) for _ in range(2))
    assert again.choices[0].message == first.choices[0].message


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_messages(client, model, role):
    messages = [{"role": role, "content": "You are a helpful assistant."}, {"role": "user", "content": "What is 27 + 58?"}]
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert reply.choices[0].message.content.strip("\n") == "27 + 58 = **85**" and reply.usage.prompt_tokens == 21


@pytest.mark.parametrize(
    "switch", [{"chat_template_kwargs": {"thinking": False}}, {"chat_template_kwargs": {"enable_thinking": False}}, {"thinking": {"type": "disabled"}}]
)
def test_thinking_can_be_switched_off(ask, switch):
    reply = ask("What is the capital of Norway?", extra_body=switch)
    message = reply.choices[0].message
    assert message.content.strip("\n") == "The capital of Norway is **Oslo**." and not message.reasoning_content
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


def test_reasoning_may_stay_in_the_content(ask, strawberry):
    message = ask(STRAWBERRY, extra_body={"separate_reasoning": False}).choices[0].message
    assert message.content.endswith(strawberry.content) and strawberry.reasoning in message.content and "</think>" in message.content
    assert not message.reasoning_content
