"""What /openapi.json promises is what the server does: requests drawn from the document, good ones and broken ones."""
import json

import httpx2
import pytest
import requests
import schemathesis
from conftest import Server
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

SEED = 20250120
# Examples of well-formed requests and of broken ones.
POST = {
    "/v1/chat/completions": (120, 120),
    "/v1/completions": (180, 200),
    "/v1/responses": (180, 160),
    "/v1/messages": (150, 150),
    "/v1/messages/count_tokens": (60, 40),
    "/tokenize": (200, 160),
    "/detokenize": (150, 140),
}
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
# What a stream ends with.
LAST_EVENT = {
    "/v1/responses": {"response.completed", "response.incomplete", "response.failed"},
    "/v1/messages": {"message_stop", "error"},
}
GET = (20, 0)
EXAMPLES = 2000
# What a reply costs. Smaller than any limit, so that nothing else about the request changes.
MAX_TOKENS, MAX_CHOICES, MAX_PROMPTS = 2, 2, 3


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """A server without a prefix and without a key, and its document."""
    with Server(tmp_path_factory.mktemp("openapi") / "log") as server:
        yield server, schemathesis.openapi.from_url(server.url + "/openapi.json")


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool)


def cheap(path, body):
    """The same request with little to generate; what is wrong with it stays wrong."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    limits = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    for name, most in (*((name, MAX_TOKENS) for name in limits), ("n", MAX_CHOICES), ("best_of", MAX_CHOICES)):
        if is_count(body.get(name)):
            body[name] = min(body[name], most)
    # Messages must say it themselves.
    if path != "/v1/messages" and all(body.get(name) is None for name in limits):
        body["max_output_tokens" if path == "/v1/responses" else "max_tokens"] = MAX_TOKENS
    if isinstance(body.get("prompt"), list) and not all(map(is_count, body["prompt"])):
        body["prompt"] = body["prompt"][:MAX_PROMPTS]
    return body


def check_stream(path, text):
    if path not in LAST_EVENT:
        assert text.endswith("data: [DONE]\n\n"), text[-500:]
        return
    frames = text.removesuffix("\n\n").split("\n\n")
    for frame in frames:
        name, data = frame.split("\n")
        kind = json.loads(data.removeprefix("data: "))["type"]
        assert name == f"event: {kind}", frame
    assert kind in LAST_EVENT[path], text[-500:]


def conforms(case, session):
    response = case.call(session=session, timeout=60)
    checks = [not_a_server_error, status_code_conformance, content_type_conformance]
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        check_stream(case.operation.path, response.content.decode())
    else:
        checks.append(response_schema_conformance)
    case.validate_response(response, checks=checks)
    return response


def draw(operation, mode, examples, session, seen):
    strategy = operation.as_strategy(generation_mode=mode)

    @seed(SEED)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate, Phase.shrink], verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy)
    def run(case):
        if operation.path in GENERATING:
            case.body = cheap(operation.path, case.body)
        seen.append(conforms(case, session).status_code)

    run()


def operations(schema):
    return [result.ok() for result in schema.get_all_operations()]


def test_the_document_is_valid_and_describes_what_is_drawn(tested):
    _, schema = tested
    schema.validate()
    paths = {(operation.method.upper(), operation.path) for operation in operations(schema)}
    assert {("POST", path) for path in POST} <= paths
    assert sum(map(sum, POST.values())) >= EXAMPLES


@pytest.mark.parametrize("path", POST)
def test_requests_drawn_from_the_document(tested, path):
    server, schema = tested
    good, broken = [], []
    with requests.Session() as session:
        draw(schema[path]["POST"], GenerationMode.POSITIVE, POST[path][0], session, good)
        draw(schema[path]["POST"], GenerationMode.NEGATIVE, POST[path][1], session, broken)
    # Both kinds arrive where they should: some well-formed requests are answered, most broken ones refused.
    assert good.count(200) > len(good) / 20, sorted(good)
    assert broken.count(400) > len(broken) / 2, sorted(broken)
    server.wait_idle()


def test_what_is_read_only(tested):
    server, schema = tested
    with requests.Session() as session:
        for operation in operations(schema):
            if operation.path not in POST:
                seen = []
                # The same request again would be the same test: without parameters there is one.
                draw(operation, GenerationMode.POSITIVE, GET[0], session, seen)
                # What is drawn for an id names nothing.
                assert 200 in seen or "{id}" in operation.path, (operation.path, seen)
    server.wait_idle()


def test_a_stored_response_is_what_is_described(tested):
    server, schema = tested
    one = "/v1/responses/{id}"
    with requests.Session() as session:
        body = {"input": [{"role": "user", "content": "hi"}], "max_output_tokens": MAX_TOKENS, "metadata": {"a": "b"}}
        created = session.post(server.url + "/v1/responses", json=body, timeout=60).json()["id"]
        for path, method, status in (
            (one, "GET", 200), (one + "/input_items", "GET", 200), (one + "/cancel", "POST", 400), (one, "DELETE", 200), (one, "GET", 404),
        ):  # fmt: skip
            case = schema[path][method].Case(path_parameters={"id": created})
            assert conforms(case, session).status_code == status, (method, path)


def test_the_page_is_there(tested):
    server, _ = tested
    page = httpx2.get(server.url + "/docs", timeout=10)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
