"""Structured output through the openai client: JSON, schemas, regexes, choices, grammars; behind the thinking, in streams, with
sampling and log-probabilities, several at once."""
import concurrent.futures
import enum
import json
import re
from typing import Annotated

import openai
import pytest
from pydantic import BaseModel, Field

QUESTION = "Ada is 36 years old and lives in London. Answer with a JSON object with the keys name, age and city."


class Color(enum.Enum):
    red = "red"
    blue = "blue"


class Person(BaseModel):
    name: str
    age: int
    city: str


Word = Annotated[str, Field(max_length=12)]


class Child(BaseModel):
    name: Word
    age: Annotated[int, Field(ge=0, le=120)]


class Family(BaseModel):
    people: Annotated[list[Child], Field(max_length=3)]
    pet: Word | None
    color: Color


@pytest.fixture
def chat(client, model):
    def chat(question, **options):
        options = {"temperature": 0, "max_tokens": 400} | options
        return client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], **options)

    return chat


def as_schema(model):
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": model.model_json_schema()}}


def test_a_pydantic_model_is_parsed(client, model):
    reply = client.beta.chat.completions.parse(
        model=model, messages=[{"role": "user", "content": QUESTION}], response_format=Person, temperature=0
    )
    message = reply.choices[0].message
    assert message.parsed == Person(name="Ada", age=36, city=message.parsed.city)
    assert message.reasoning_content, "the schema holds for the answer, not for the thinking"


def test_a_nested_model_is_parsed(client, model):
    """Lists, references, a choice of types and an enumeration. The model knows nothing of families and may babble in a name for
    ever: names are short here."""
    ask = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 1200}
    reply = client.beta.chat.completions.parse(response_format=Family, **ask)
    assert isinstance(reply.choices[0].message.parsed, Family)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("question", [QUESTION, "hello", "how many rs are in strawberry"])
def test_an_object_is_an_object_whatever_is_asked(chat, question, thinking):
    options = {"extra_body": {"chat_template_kwargs": {"thinking": thinking}}}
    reply = chat(question, response_format={"type": "json_object"}, **options).choices[0]
    if reply.finish_reason == "stop":
        assert isinstance(json.loads(reply.message.content), dict)
    assert reply.message.content.lstrip().startswith("{")
    assert bool(reply.message.reasoning_content) <= thinking


def test_thinking_is_free(chat):
    free = chat("how many rs are in strawberry").choices[0].message
    held = chat("how many rs are in strawberry", response_format=as_schema(Person)).choices[0].message
    assert held.reasoning_content == free.reasoning_content
    assert held.content.startswith('{"name": "')


def test_a_stream_says_what_the_whole_reply_says(chat):
    whole = chat(QUESTION, response_format=as_schema(Person)).choices[0].message
    content = reasoning = ""
    for chunk in chat(QUESTION, response_format=as_schema(Person), stream=True):
        content += chunk.choices[0].delta.content or ""
        reasoning += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
    assert (content, reasoning) == (whole.content, whole.reasoning_content)


FORMS = [
    ({"regex": r"[0-9]{3}-[A-F]{2}"}, r"[0-9]{3}-[A-F]{2}"),
    ({"guided_regex": r"(yes|no), (maybe|never)"}, r"(yes|no), (maybe|never)"),
    ({"guided_choice": ["north", "south east"]}, r"north|south east"),
    ({"structured_outputs": {"choice": ["1", "22", "333"]}}, r"1|22|333"),
    ({"structured_outputs": {"regex": "a{3,5}b"}}, r"a{3,5}b"),
    ({"ebnf": 'root ::= "x" digit+ "y"?\ndigit ::= [0-3]'}, r"x[0-3]+y?"),
    ({"guided_grammar": 'start: "(" WORD ")"\nWORD: /[a-z]{2,4}/'}, r"\([a-z]{2,4}\)"),
    ({"guided_json": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}}, r"\[[\s12,]+\]"),
    ({"guided_json": '{"type": "boolean"}'}, r"true|false"),
]


@pytest.mark.parametrize("form, pattern", FORMS, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("question", ["hello", "What is 27 + 58?"])
def test_every_servers_words_for_a_form(chat, form, pattern, question):
    reply = chat(question, extra_body=form, max_tokens=300).choices[0]
    assert reply.finish_reason in ("stop", "length")
    if reply.finish_reason == "stop":
        assert re.fullmatch(pattern, reply.message.content), reply.message.content


@pytest.mark.parametrize("form, pattern", FORMS, ids=lambda x: str(x)[:40])
def test_completions_are_held_from_the_first_token(complete, form, pattern):
    reply = complete("<｜begin▁of▁sentence｜>Oslo", extra_body=form, max_tokens=60, temperature=0.8, seed=3).choices[0]
    if reply.finish_reason == "stop":
        assert re.fullmatch(pattern, reply.text), reply.text


def test_sampling_and_logprobs_go_with_it(chat):
    reply = chat(QUESTION, response_format=as_schema(Person), temperature=1.5, seed=11, n=4, logprobs=True, top_logprobs=3)
    for choice in reply.choices:
        assert choice.logprobs.content and all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)
        if choice.finish_reason == "stop":
            Person.model_validate_json(choice.message.content)
    assert len({choice.message.content for choice in reply.choices}) > 1


def test_held_and_free_requests_run_together(chat, strawberry):
    def held(i):
        return chat(QUESTION, response_format=as_schema(Person), seed=i).choices[0].message.content

    def free(_):
        return chat("how many rs are in strawberry").choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        held_replies = [pool.submit(held, i) for i in range(8)]
        free_replies = [pool.submit(free, i) for i in range(8)]
        for reply in held_replies:
            Person.model_validate_json(reply.result())
        for reply in free_replies:
            assert reply.result().strip("\n") == strawberry.content


BOMBS = [
    ({"regex": "(a{1,1000}){1,1000}"}, "regex"),
    ({"regex": "("}, "regex"),
    ({"regex": "(?=a)b"}, "regex"),
    ({"guided_regex": "a" * 1_000_000}, "guided_regex"),
    ({"guided_json": {"$ref": "#"}}, "guided_json"),
    ({"guided_json": {"$ref": "http://localhost/x.json"}}, "guided_json"),
    ({"guided_json": {"type": "array", "minItems": 1_000_000_000}}, "guided_json"),
    ({"guided_json": {"enum": [str(i) for i in range(500_000)]}}, "guided_json"),
    ({"guided_choice": ["x" * 100_000] * 50}, "guided_choice"),
    ({"ebnf": "root ::= root"}, "ebnf"),
    ({"ebnf": "root ::= missing"}, "ebnf"),
    ({"ebnf": "this is no grammar"}, "ebnf"),
    ({"guided_json": {"type": "object", "properties": {"a": {"type": "objekt"}}}}, "guided_json"),
]


@pytest.mark.parametrize("form, param", BOMBS, ids=lambda x: str(x)[:40])
def test_bombs_are_refused_by_name(chat, server, form, param):
    with pytest.raises(openai.BadRequestError) as refused:
        chat("hi", extra_body=form)
    assert refused.value.body["param"].split(".")[0].split("[")[0] == param
    assert server.healthy()


def test_a_schema_nested_beyond_reason_is_refused(http, server):
    deep = '{"type":"array","items":' * 100_000 + "{}" + "}" * 100_000
    body = '{"messages":[{"role":"user","content":"hi"}],"guided_json":' + deep + "}"
    reply = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and server.healthy()
