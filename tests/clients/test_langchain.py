"""LangChain's ChatOpenAI: a chat, a stream, a call of a tool, structured output."""
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city"""
    return "21 C"


@pytest.fixture(scope="module")
def llm(server):
    return ChatOpenAI(base_url=server.url + "/v1", api_key="unused", model="tiny-r1", temperature=0, max_retries=0)


def test_a_chat(llm):
    reply = llm.invoke("how many rs are in strawberry")
    assert "**3**" in reply.content and reply.usage_metadata["output_tokens"] > 0
    assert reply.response_metadata["finish_reason"] == "stop"


def test_a_stream(llm):
    whole = llm.invoke("hello").content
    pieces = list(llm.stream("hello"))
    assert len(pieces) > 3 and "".join(piece.content for piece in pieces) == whole


def test_a_tool_loop(llm):
    bound = llm.bind_tools([get_weather])
    messages = [HumanMessage("What is the weather in Oslo?")]
    reply = bound.invoke(messages)
    [call] = reply.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Oslo"}) and not reply.invalid_tool_calls
    messages += [reply, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert "21 C" in bound.invoke(messages).content


def test_a_streamed_call(llm):
    gathered = None
    for chunk in llm.bind_tools([get_weather]).stream("What is the weather in Oslo?"):
        gathered = chunk if gathered is None else gathered + chunk
    [call] = gathered.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Oslo"})


class Person(BaseModel):
    """A person."""

    name: str
    age: int
    city: str


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(llm, method):
    question = "Ada is 36 years old and lives in London. Answer with a JSON object with the keys name, age and city."
    person = llm.with_structured_output(Person, method=method).invoke(question)
    assert isinstance(person, Person)
