"""The exposition after known traffic: exact counts, real histograms, bounded labels."""

import re

from cortex.testing import AsgiClient, FakeNode
from cortex.wire.errors import Busy

CHAT = "/v1/chat/completions"


def value(text: str, series: str) -> float:
    [found] = re.findall(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    return float(found)


async def test_plain_streamed_and_refused_are_counted_exactly(world):
    await world.client.post(CHAT, json=world.chat())
    await world.client.post(CHAT, json=world.chat(stream=True))
    world.nodes["a"].refusal = Busy("full")
    await world.client.post(CHAT, json=world.chat())
    text = await world.metrics()
    labels = 'model="m",node="a"'
    counted = 'cortex_requests_total{dialect="openai",model="m",node="a",outcome="%s"}'
    assert value(text, counted % "ok") == 2
    assert value(text, counted % "refused") == 1
    assert value(text, f"cortex_request_duration_seconds_count{{{labels}}}") == 3
    assert value(text, f"cortex_gateway_overhead_seconds_count{{{labels}}}") == 3
    assert value(text, f"cortex_time_to_first_token_seconds_count{{{labels}}}") == 1
    assert value(text, f"cortex_inter_token_latency_seconds_count{{{labels}}}") == 1
    assert value(text, f"cortex_prompt_tokens_total{{{labels}}}") == 6
    assert value(text, f"cortex_completion_tokens_total{{{labels}}}") == 4
    assert value(text, f"cortex_requests_in_flight{{{labels}}}") == 0
    assert value(text, 'cortex_model_state{model="m",node="a",state="loaded"}') == 1


async def test_histograms_have_buckets_up_to_infinity(world):
    await world.client.post(CHAT, json=world.chat(stream=True))
    text = await world.metrics()
    name = "cortex_time_to_first_token_seconds"
    bounds = re.findall(rf'^{name}_bucket{{le="([^"]+)",', text, re.MULTILINE)
    assert bounds[-1] == "+Inf"
    assert [float(bound) for bound in bounds] == sorted(float(bound) for bound in bounds)
    assert f"# TYPE {name} histogram" in text


async def test_a_clients_text_never_becomes_a_label(world):
    for name in ("x" * 50, "secret", 'a"b\nc'):
        await world.client.post(CHAT, json=world.chat(name))
    text = await world.metrics()
    assert "secret" not in text
    unknown = 'cortex_requests_total{dialect="openai",model="unknown",node="",outcome="refused"}'
    assert value(text, unknown) == 3


async def test_retries_are_counted_and_leave_nothing_in_flight(make_world):
    world = await make_world({"a": FakeNode(), "b": FakeNode()})
    world.nodes["a"].refusal = Busy("full")
    await world.client.post(CHAT, json=world.chat())
    text = await world.metrics()
    assert value(text, 'cortex_retries_total{model="m",reason="busy"}') == 1
    for node in ("a", "b"):
        assert value(text, f'cortex_requests_in_flight{{model="m",node="{node}"}}') == 0


async def test_the_metrics_listener_serves_nothing_else(world):
    assert (await AsgiClient(world.gateway.metrics_app).get("/v1/models")).status == 404
