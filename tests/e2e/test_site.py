"""Two neurons behind a gateway: one listing, each request to its node, and a node may die and return."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import openai
import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.real_model, pytest.mark.timeout(120)]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def body(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 8, **fields}


def in_flight(endpoint: str) -> list[str]:
    with urllib.request.urlopen(f"{endpoint}/health") as reply:
        requests: list[str] = json.loads(reply.read())["requests"]
    return requests


@pytest.fixture
def client(site: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{site.gateway.endpoint}/v1", api_key="any", max_retries=0)


def test_the_sdk_chats_with_each_node(site, client) -> None:
    for node in ("a", "b"):
        answer = client.chat.completions.create(**body(f"model-of-{node}"))
        assert "Paris" in answer.choices[0].message.content
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage.completion_tokens > 0
        line = f"model=model-of-{node} node={node}"
        site.wait_for(lambda line=line: line in site.gateway.log(), "the request's log line")


def test_the_sdk_streams_with_usage(client) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**body("model-of-a", **options)))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    plain = client.chat.completions.create(**body("model-of-a"))
    assert plain.choices[0].message.content == text


def test_the_sdk_lists_the_merged_models(client) -> None:
    assert [model.id for model in client.models.list()] == ["model-of-a", "model-of-b"]
    assert client.models.retrieve("model-of-b").loaded is True


def test_the_sdk_meets_its_own_error_classes(client) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**body("absent"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(**body("model-of-a", temperature=-3))
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            **body("model-of-a", stream=True) | {"messages": [{"role": "user", "content": "word " * 20_000}]}
        )
    assert long.value.code == "context_length_exceeded"


def test_a_client_that_leaves_frees_the_node(site, client) -> None:
    stream = client.chat.completions.create(**body("model-of-a", stream=True, max_tokens=4000))
    next(iter(stream))
    assert len(in_flight(site.neurons["a"].endpoint)) == 1
    stream.close()
    site.wait_for(lambda: not in_flight(site.neurons["a"].endpoint), "the sequence to be cancelled")


def test_a_scrape_counts_and_never_loads(site) -> None:
    with urllib.request.urlopen(site.metrics) as reply:
        text = reply.read().decode()
    assert 'cortex_node_up{node="a"} 1' in text
    assert 'cortex_requests_in_flight{model="model-of-a",node="a"} 0' in text


def test_a_killed_worker_is_reported_and_comes_back(site, client) -> None:
    neuron = site.neurons["b"]
    worker = max(neuron.family()[1:], key=lambda process: process.memory_info().rss)
    worker.kill()
    site.wait_for(lambda: site.loaded()["model-of-b"] is False, "the death to be seen")
    assert client.chat.completions.create(**body("model-of-a")).usage.completion_tokens > 0
    assert "Paris" in client.chat.completions.create(**body("model-of-b")).choices[0].message.content


def test_a_killed_warm_server_takes_its_workers_and_all_comes_back(site, client) -> None:
    neuron = site.neurons["b"]
    workers = neuron.family()[1:]
    warm = next(process for process in workers if "forkserver" in " ".join(process.cmdline()))
    children = warm.children()
    warm.kill()
    _, left = psutil.wait_procs(children, timeout=10)
    assert not left
    site.wait_for(lambda: site.loaded()["model-of-b"] is False, "the death to be seen")
    patient = client.with_options(max_retries=5)  # after two deaths in a minute the model rests
    assert "Paris" in patient.chat.completions.create(**body("model-of-b")).choices[0].message.content
    assert not warm.is_running()  # not even as a zombie, once there is another one


def test_a_killed_node_is_unavailable_within_four_polls_and_comes_back(site, client) -> None:
    site.neurons["b"].kill()  # asserts that no process of it stays
    site.wait_for(lambda: site.loaded() == {"model-of-a": True, "model-of-b": False}, "the loss of node b")
    with pytest.raises(openai.InternalServerError) as lost:
        client.chat.completions.create(**body("model-of-b"))
    assert lost.value.status_code == 503
    assert "does not answer" in lost.value.message
    assert "Paris" in client.chat.completions.create(**body("model-of-a")).choices[0].message.content
    site.neurons["b"].start()
    site.wait_for(lambda: site.loaded()["model-of-b"], "node b to return")
    assert "Paris" in client.chat.completions.create(**body("model-of-b")).choices[0].message.content
