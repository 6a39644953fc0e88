"""Text completions through the openai client: every form of prompt, log-probabilities, echo, streams."""
import pytest
from conftest import REFERENCES

BOS = "<｜begin▁of▁sentence｜>"
PARIS = BOS + "Paris"
PARIS_REPLY = " is a city in France. It is the capital of France."


def test_text(complete):
    reply = complete(PARIS)
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-")
    [choice] = reply.choices
    assert choice.text == PARIS_REPLY and choice.finish_reason == "stop" and choice.index == 0 and choice.logprobs is None
    assert reply.usage.prompt_tokens == 4


def test_token_ids(complete, strawberry):
    reply = complete(strawberry.prompt_ids)
    assert reply.choices[0].text == strawberry.text
    assert reply.usage.prompt_tokens == len(strawberry.prompt_ids) and reply.usage.completion_tokens == len(strawberry.output_ids)


def test_a_list_of_texts_keeps_its_order(complete):
    cities = {"Oslo": "Norway", "Lima": "Peru", "Paris": "France"}
    reply = complete([BOS + city for city in cities])
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [choice.text for choice in reply.choices] == [f" is a city in {c}. It is the capital of {c}." for c in cities.values()]


def test_a_list_of_token_id_lists(complete):
    some = REFERENCES[:5]
    reply = complete([r.prompt_ids for r in some])
    assert [choice.text for choice in reply.choices] == [r.text for r in some]
    assert reply.usage.prompt_tokens == sum(len(r.prompt_ids) for r in some)
    assert reply.usage.completion_tokens == sum(len(r.output_ids) for r in some)


def test_several_choices_per_prompt_are_numbered_prompt_by_prompt(complete):
    reply = complete([BOS + "Oslo", PARIS], n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert ["Norway" in choice.text for choice in reply.choices] == [True, True, False, False]


def test_the_reply_ends_by_itself_when_max_tokens_is_absent(client, model, strawberry):
    reply = client.completions.create(model=model, prompt=strawberry.prompt_ids, temperature=0)
    assert reply.usage.completion_tokens == len(strawberry.output_ids) and reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"stop": "capital"}, {"max_tokens": 3}, {"echo": True}], ids=str)
def test_a_stream_says_what_the_whole_reply_says(complete, options):
    whole = complete(PARIS, **options)
    *chunks, last = complete(PARIS, stream=True, stream_options={"include_usage": True}, **options)
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason] and own[-1].finish_reason


def test_logprobs(complete):
    reply = complete(PARIS, logprobs=2)
    logprobs = reply.choices[0].logprobs
    count = len(logprobs.tokens)
    assert count in (reply.usage.completion_tokens, reply.usage.completion_tokens - 1)
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == count
    assert "".join(logprobs.tokens).startswith(PARIS_REPLY)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 2 and top[token] == logprob == max(top.values()) and logprob <= 0
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert PARIS_REPLY[offset:].startswith(token) or offset == len(PARIS_REPLY)


def test_logprobs_of_the_drawn_token_alone(complete):
    logprobs = complete(PARIS, logprobs=0).choices[0].logprobs
    assert logprobs.tokens and all(list(top) in ([], [token]) for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))


def test_tokens_as_ids(complete, strawberry):
    reply = complete(strawberry.prompt_ids, logprobs=0, extra_body={"return_tokens_as_token_ids": True})
    ids = [int(token.removeprefix("token_id:")) for token in reply.choices[0].logprobs.tokens]
    assert ids in (strawberry.output_ids, strawberry.output_ids[:-1])


def test_echo(complete):
    alone, echoed = complete("Paris", max_tokens=6), complete("Paris", max_tokens=6, echo=True)
    assert echoed.choices[0].text == "Paris" + alone.choices[0].text
    assert echoed.usage == alone.usage or echoed.usage.completion_tokens == alone.usage.completion_tokens
    by_ids = complete([63, 285, 480], max_tokens=6, echo=True)  # the same text as ids
    assert by_ids.choices[0].text == echoed.choices[0].text


def test_stop(complete):
    [choice] = complete(PARIS, stop=[" It is", "never"]).choices
    assert choice.text == " is a city in France." and choice.finish_reason == "stop" and choice.stop_reason == " It is"


def test_special_tokens_may_be_shown(complete):
    assert complete(PARIS, extra_body={"skip_special_tokens": True}).choices[0].text == PARIS_REPLY
    shown = complete(PARIS, extra_body={"skip_special_tokens": False, "ignore_eos": True}, max_tokens=40).choices[0].text
    assert shown.startswith(PARIS_REPLY + "<｜end▁of▁sentence｜>")
