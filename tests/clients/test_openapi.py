"""What /openapi.json promises is what the server does: requests drawn from the document, good ones and broken ones."""
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
POST = {"/v1/chat/completions": (260, 260), "/v1/completions": (260, 260), "/tokenize": (300, 160), "/detokenize": (300, 160)}
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


def cheap(body):
    """The same request with little to generate; what is wrong with it stays wrong."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    for name, most in (("max_tokens", MAX_TOKENS), ("max_completion_tokens", MAX_TOKENS), ("n", MAX_CHOICES), ("best_of", MAX_CHOICES)):
        if is_count(body.get(name)):
            body[name] = min(body[name], most)
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = MAX_TOKENS
    if isinstance(body.get("prompt"), list) and not all(map(is_count, body["prompt"])):
        body["prompt"] = body["prompt"][:MAX_PROMPTS]
    return body


def conforms(case, session):
    response = case.call(session=session, timeout=60)
    checks = [not_a_server_error, status_code_conformance, content_type_conformance]
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        text = response.content.decode()
        assert text.endswith("data: [DONE]\n\n"), text[-500:]
    else:
        checks.append(response_schema_conformance)
    case.validate_response(response, checks=checks)
    return response


def draw(operation, mode, examples, session, seen):
    strategy = operation.as_strategy(generation_mode=mode)
    generating = operation.path in ("/v1/chat/completions", "/v1/completions")

    @seed(SEED)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate, Phase.shrink], verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy)
    def run(case):
        if generating:
            case.body = cheap(case.body)
        seen.append(conforms(case, session).status_code)

    run()


def operations(schema):
    return [result.ok() for result in schema.get_all_operations()]


def test_the_document_is_valid_and_describes_what_is_drawn(tested):
    _, schema = tested
    schema.validate()
    paths = {(operation.method.upper(), operation.path) for operation in operations(schema)}
    assert {("POST", path) for path in POST} <= paths
    others = len(paths) - len(POST)
    assert sum(map(sum, POST.values())) + others * sum(GET) >= EXAMPLES


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
                assert 200 in seen or operation.path == "/v1/models/{id}", (operation.path, seen)
    server.wait_idle()


def test_the_page_is_there(tested):
    server, _ = tested
    page = httpx2.get(server.url + "/docs", timeout=10)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
