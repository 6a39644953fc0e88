"""Models, health, metrics: what a client looks at before it asks anything."""
import openai
import pytest


def test_the_list_and_each_model_agree(client):
    models = client.models.list().data
    assert models
    for listed in models:
        assert listed.object == "model" and listed.owned_by and listed.max_model_len == 4096
        assert client.models.retrieve(listed.id) == listed


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no-such-model")
    assert "no-such-model" in caught.value.body["message"]


def test_any_model_name_is_served(client):
    reply = client.chat.completions.create(model="deepseek-ai/DeepSeek-R1", messages=[{"role": "user", "content": "hi"}], temperature=0)
    assert "tiny-r1" in reply.choices[0].message.content


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/ping"])
def test_health(http, path):
    assert http.get(path).status_code == 200


def test_version_names_one(http):
    assert http.get("/version").json()["version"][0].isdigit()


def test_metrics_count_tokens_under_both_vocabularies(server, ask):
    before = {name: server.metric(name) for name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")}
    usage = ask("hello").usage
    server.wait_idle()
    assert server.metric("vllm:prompt_tokens_total") - before["vllm:prompt_tokens_total"] == usage.prompt_tokens
    assert server.metric("vllm:generation_tokens_total") - before["vllm:generation_tokens_total"] == usage.completion_tokens
    for name in ("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage"):
        assert server.metric(name) == 0
    assert server.metric("vllm:time_to_first_token_seconds_count") > 0
