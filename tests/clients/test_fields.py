"""Request fields beyond OpenAI's basics, each seen at work over HTTP."""
import json

import openai
import pytest
from conftest import STRAWBERRY

BOS = "<｜begin▁of▁sentence｜>"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
GET_TIME = {
    "type": "function",
    "function": {"name": "get_time", "description": "Get the local time of a city", "parameters": CITY},
}


def test_the_likeliest_of_several(complete):
    shown = complete(f"{BOS}Oslo", n=2, temperature=1.2, seed=1, max_tokens=12, extra_body={"best_of": 8}, logprobs=0)
    every = complete(f"{BOS}Oslo", n=8, temperature=1.2, seed=1, max_tokens=12, logprobs=0)

    def mean(choice):
        logprobs = choice.logprobs.token_logprobs
        return sum(logprobs) / len(logprobs)

    best = sorted(every.choices, key=mean, reverse=True)[:2]
    assert [choice.text for choice in shown.choices] == [choice.text for choice in best]
    assert [choice.index for choice in shown.choices] == [0, 1]
    assert shown.usage.completion_tokens == every.usage.completion_tokens, "what was drawn was used"


def test_an_echo_has_its_logprobs(complete):
    text = f"{BOS}Oslo is a city in"
    plain = complete(text, max_tokens=4, logprobs=2)
    echoed = complete(text, max_tokens=4, logprobs=2, echo=True)
    [choice] = echoed.choices
    logprobs = choice.logprobs
    assert choice.text.startswith("Oslo is a city in") or choice.text.startswith(text)
    assert choice.text.endswith(plain.choices[0].text)
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == echoed.usage.prompt_tokens + echoed.usage.completion_tokens
    assert logprobs.token_logprobs[-4:] == pytest.approx(plain.choices[0].logprobs.token_logprobs, abs=1e-4)


def test_scoring_alone(complete):
    """What evaluation harnesses send: nothing to generate, the prompt's log-probabilities back."""
    text = f"{BOS}Oslo is a city in Norway."
    scored = complete(text, max_tokens=0, logprobs=1, echo=True)
    [choice] = scored.choices
    assert scored.usage.completion_tokens == 0 and len(choice.logprobs.tokens) == scored.usage.prompt_tokens
    wrong = complete(f"{BOS}Oslo is a city in Zebra.", max_tokens=0, logprobs=1, echo=True).choices[0]
    assert sum(choice.logprobs.token_logprobs[1:]) > sum(wrong.logprobs.token_logprobs[1:])


def test_prompt_logprobs(ask):
    reply = ask("hi", extra_body={"prompt_logprobs": 2}, max_tokens=3)
    first, *rest = reply.prompt_logprobs
    assert first is None and len(rest) == reply.usage.prompt_tokens - 1
    for token in rest:
        assert 2 <= len(token) <= 3 and all(entry["logprob"] <= 0 for entry in token.values())


def test_prompt_logprobs_cannot_be_streamed(ask):
    with pytest.raises(openai.BadRequestError) as refused:
        list(ask("hi", extra_body={"prompt_logprobs": 2}, stream=True))
    assert refused.value.body["param"] == "prompt_logprobs"


def test_allowed_tokens_and_bad_words(complete, http):
    tokens = http.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False}).json()["tokens"]
    held = complete(f"{BOS}Oslo", extra_body={"allowed_token_ids": tokens}, max_tokens=9).choices[0]
    assert set(held.text) <= {"a", "b"} and held.finish_reason == "length"
    free = complete(f"{BOS}Oslo").choices[0].text
    without = complete(f"{BOS}Oslo", extra_body={"bad_words": ["Norway", "city"]}).choices[0].text
    assert "Norway" in free and "Norway" not in without and "city" not in without


def test_the_end_of_a_prompt(complete):
    whole = complete(f"{BOS}Berlin is nice. {BOS}Oslo", extra_body={"truncate_prompt_tokens": 4})
    assert whole.usage.prompt_tokens == 4


def test_thinking_is_closed_at_once(ask):
    for options in (
        {"reasoning_effort": "none"},
        {"extra_body": {"thinking": {"type": "disabled"}}},
        {"extra_body": {"thinking_budget": 0}},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    ):
        reply = ask("hello", **options)
        assert not reply.choices[0].message.reasoning_content and "tiny-r1" in reply.choices[0].message.content
        assert reply.usage.completion_tokens_details.reasoning_tokens <= 2


@pytest.mark.parametrize("budget", [1, 10, 40])
def test_a_budget_of_thinking(ask, budget):
    reply = ask(STRAWBERRY, extra_body={"thinking_budget": budget}, max_tokens=200)
    assert reply.usage.completion_tokens_details.reasoning_tokens <= budget + 2
    assert reply.choices[0].message.content
    same = ask(STRAWBERRY, extra_body={"reasoning": {"max_tokens": budget}}, max_tokens=200)
    assert same.choices[0].message.content == reply.choices[0].message.content


def test_a_budget_beyond_the_thinking_changes_nothing(ask):
    free = ask(STRAWBERRY).choices[0].message
    assert ask(STRAWBERRY, extra_body={"thinking_budget": 5000}).choices[0].message == free
    assert ask(STRAWBERRY, reasoning_effort="high").choices[0].message == free


def test_the_reply_goes_on_with_the_last_message(client, model):
    def go_on(**last):
        messages = [{"role": "user", "content": "What is the capital of Norway?"}, {"role": "assistant"} | last]
        return messages

    prefixed = client.chat.completions.create(
        model=model, messages=go_on(content="The capital of", prefix=True), temperature=0, max_tokens=30
    )
    assert prefixed.choices[0].message.content.startswith(" Norway")
    continued = client.chat.completions.create(
        model=model,
        messages=go_on(content="The capital of"),
        temperature=0,
        max_tokens=30,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert continued.choices[0].message.content == prefixed.choices[0].message.content
    echoed = client.chat.completions.create(
        model=model,
        messages=go_on(content="The capital of"),
        temperature=0,
        max_tokens=30,
        extra_body={"continue_final_message": True, "add_generation_prompt": False, "echo": True},
    )
    assert echoed.choices[0].message.content == "The capital of" + prefixed.choices[0].message.content


def test_reasoning_left_out(ask):
    shown = ask(STRAWBERRY)
    hidden = ask(STRAWBERRY, extra_body={"include_reasoning": False})
    assert hidden.choices[0].message.reasoning_content is None and hidden.choices[0].message.reasoning is None
    assert hidden.choices[0].message.content == shown.choices[0].message.content
    assert hidden.usage.completion_tokens_details == shown.usage.completion_tokens_details


def test_reasoning_inline(ask):
    inline = ask(STRAWBERRY, extra_body={"separate_reasoning": False}).choices[0].message
    assert inline.content.startswith("<think>\n") and "</think>" in inline.content and inline.reasoning_content is None


def test_holes_need_tokens_for_them(complete):
    with pytest.raises(openai.BadRequestError) as refused:
        complete("def f(", suffix="return x")
    assert refused.value.body["param"] == "suffix"


def test_earlier_tool_results_and_thoughts_are_read(client, model):
    call = {"id": "1", "type": "function", "function": {"name": "get_time", "arguments": json.dumps({"city": "Rome"})}}
    messages = [
        {"role": "user", "content": "What time is it in Rome?"},
        {"role": "assistant", "content": None, "reasoning_content": "I call it.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "08:15"}]},
    ]
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0, tools=[GET_TIME])
    assert "08:15" in reply.choices[0].message.content
