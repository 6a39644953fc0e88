"""Sampling parameters: each is given such that being ignored would show."""
import pytest
from conftest import PENALTIES, STRAWBERRY

WILD = {"temperature": 2.0, "top_p": 1.0, "max_tokens": 40}  # far enough from greedy that draws differ


def texts(reply):
    return [(choice.message.reasoning_content, choice.message.content) for choice in reply.choices]


def test_a_seed_repeats_its_draws(ask):
    first = texts(ask(STRAWBERRY, seed=7, n=4, **WILD))
    assert texts(ask(STRAWBERRY, seed=7, n=4, **WILD)) == first
    assert len(set(first)) > 1, "choices of one request must draw apart"
    assert len({str(texts(ask(STRAWBERRY, seed=seed, **WILD))) for seed in range(4)}) > 1


def test_the_same_seed_at_temperature_one(ask):
    assert texts(ask("Where is Tokyo?", temperature=1, seed=3)) == texts(ask("Where is Tokyo?", temperature=1, seed=3))


@pytest.mark.parametrize("truncation", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}], ids=str)
def test_truncation_to_one_token_is_greedy(ask, strawberry, truncation):
    message = ask(STRAWBERRY, **(WILD | {"max_tokens": 260} | truncation)).choices[0].message
    assert message.content.strip("\n") == strawberry.content and message.reasoning_content.strip("\n") == strawberry.reasoning


@pytest.mark.parametrize("everything", [{"top_k": -1}, {"top_k": 0}, {"min_p": 0}], ids=str)
def test_neutral_truncation_changes_no_draw(ask, everything):
    plain = texts(ask(STRAWBERRY, seed=11, **WILD))
    assert texts(ask(STRAWBERRY, seed=11, extra_body=everything, **WILD)) == plain


@pytest.mark.parametrize("bias", [-100, 100])
def test_logit_bias(complete, strawberry, bias):
    banned = strawberry.output_ids[0]
    wanted = banned if bias < 0 else strawberry.output_ids[1]
    reply = complete(
        strawberry.prompt_ids, logit_bias={str(wanted): bias}, max_tokens=4, logprobs=0, extra_body={"return_tokens_as_token_ids": True}
    )
    tokens = reply.choices[0].logprobs.tokens
    assert f"token_id:{wanted}" not in tokens if bias < 0 else tokens == [f"token_id:{wanted}"] * 4


@pytest.mark.parametrize("case", PENALTIES, ids=lambda case: str(case["penalties"]))
def test_penalties(complete, strawberry, case):
    def drawn(**penalties):
        tokens_as_ids = {"return_tokens_as_token_ids": True}
        reply = complete(strawberry.prompt_ids, max_tokens=8, logprobs=0, logit_bias=case["logit_bias"], extra_body=tokens_as_ids | penalties)
        return [int(token.removeprefix("token_id:")) for token in reply.choices[0].logprobs.tokens]

    assert drawn(**case["penalties"]) == case["output_ids"]
    assert drawn(repetition_penalty=1.0, presence_penalty=0, frequency_penalty=0) == case["unpenalised_ids"]


def test_ignore_eos_goes_on(ask, strawberry):
    whole = len(strawberry.output_ids)
    reply = ask(STRAWBERRY, max_tokens=whole + 7, extra_body={"ignore_eos": True})
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == whole + 7
    assert "｜" not in reply.choices[0].message.content


def test_min_tokens_holds_the_end_off(ask, strawberry):
    least = len(strawberry.output_ids) + 5
    reply = ask(STRAWBERRY, max_tokens=least + 20, extra_body={"min_tokens": least})
    assert least <= reply.usage.completion_tokens <= least + 20


def test_stop_token_ids(ask, strawberry):
    stop = strawberry.output_ids[9]
    count = strawberry.output_ids.index(stop) + 1
    reply = ask(STRAWBERRY, extra_body={"stop_token_ids": [stop]})
    assert reply.choices[0].finish_reason == "stop" and reply.choices[0].stop_reason == stop
    assert reply.usage.completion_tokens == count
    assert strawberry.reasoning.startswith(reply.choices[0].message.reasoning_content)


def test_chat_logprobs(ask, strawberry):
    reply = ask(STRAWBERRY, logprobs=True, top_logprobs=3)
    entries = reply.choices[0].logprobs.content
    assert len(entries) in (len(strawberry.output_ids), len(strawberry.output_ids) - 1)
    for entry in entries:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token and entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-5)
        assert [t.logprob for t in entry.top_logprobs] == sorted((t.logprob for t in entry.top_logprobs), reverse=True)
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    assert b"".join(bytes(entry.bytes) for entry in entries).decode().startswith(strawberry.reasoning)


def test_chat_logprobs_are_streamed_token_by_token(ask):
    whole = ask(STRAWBERRY, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in ask(STRAWBERRY, logprobs=True, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in whole], abs=1e-2)


def test_logprobs_without_top(ask):
    [choice] = ask("hi", logprobs=True).choices
    assert choice.logprobs.content and all(entry.top_logprobs == [] for entry in choice.logprobs.content)
    assert ask("hi").choices[0].logprobs is None
