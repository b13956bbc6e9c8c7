"""The gateway's Prometheus collectors: an observer like any other, and the one place that names them.

Labels are bounded by the events, which never carry a client's free text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aioprometheus.collectors import Counter, Gauge, Histogram, Registry
from aioprometheus.renderer import render

from cortex.hookspecs import (
    NodePolled,
    ObserverEvent,
    RequestEnded,
    RequestRetried,
    RequestStarted,
)
from cortex.web.buckets import (
    INTER_TOKEN_LATENCY,
    OVERHEAD,
    REQUEST_DURATION,
    TIME_TO_FIRST_TOKEN,
    TOKENS_PER_SECOND,
)
from cortex.web.series import Distributions, Numbers

SERVED = ("model", "node")
"""The labels of everything that a node served."""

DEVICE_READINGS: Mapping[str, str] = {
    "memory_used_bytes": "Memory of the device in use.",
    "memory_total_bytes": "Memory of the device.",
    "utilization_ratio": "How busy the device is, 0 to 1.",
    "temperature_celsius": "Temperature of the device.",
}


NUMBERS: Mapping[str, tuple[type[Counter | Gauge], str, tuple[str, ...]]] = {
    "cortex_requests_total": (Counter, "Requests by how they ended.", (*SERVED, "dialect", "outcome")),
    "cortex_requests_in_flight": (Gauge, "Requests that a node is serving for us.", SERVED),
    "cortex_retries_total": (Counter, "Requests that went on to another node.", ("model", "reason")),
    "cortex_prompt_tokens_total": (Counter, "Prompt tokens of requests that were served.", SERVED),
    "cortex_completion_tokens_total": (Counter, "Completion tokens that were served.", SERVED),
    "cortex_cached_prompt_tokens_total": (
        Counter,
        "Prompt tokens that a node found in its prefix cache.",
        SERVED,
    ),
}
DISTRIBUTIONS: Mapping[str, tuple[str, Sequence[float]]] = {
    "cortex_request_duration_seconds": ("From arrival to the last byte.", REQUEST_DURATION),
    "cortex_time_to_first_token_seconds": (
        "Streamed requests, from arrival to the first token.",
        TIME_TO_FIRST_TOKEN,
    ),
    "cortex_inter_token_latency_seconds": (
        "Mean gap between the output events of a streamed request.",
        INTER_TOKEN_LATENCY,
    ),
    "cortex_tokens_per_second": ("Completion tokens a second, by request.", TOKENS_PER_SECOND),
    "cortex_gateway_overhead_seconds": (
        "Time in the gateway itself, from the last byte of the request to its dispatch.",
        OVERHEAD,
    ),
}


class GatewayMetrics:
    name = "prometheus"

    def __init__(self) -> None:
        registry = self._registry = Registry()
        numbers = self._numbers = {
            name: Numbers(kind(name, text, registry=registry), *labels)
            for name, (kind, text, labels) in NUMBERS.items()
        }
        times = {
            name: Distributions(Histogram(name, text, registry=registry, buckets=buckets), *SERVED)
            for name, (text, buckets) in DISTRIBUTIONS.items()
        }
        self._requests = numbers["cortex_requests_total"]
        self._in_flight = numbers["cortex_requests_in_flight"]
        self._retries = numbers["cortex_retries_total"]
        self._prompt = numbers["cortex_prompt_tokens_total"]
        self._completion = numbers["cortex_completion_tokens_total"]
        self._cached = numbers["cortex_cached_prompt_tokens_total"]
        self._duration = times["cortex_request_duration_seconds"]
        self._ttft = times["cortex_time_to_first_token_seconds"]
        self._itl = times["cortex_inter_token_latency_seconds"]
        self._rate = times["cortex_tokens_per_second"]
        self._overhead = times["cortex_gateway_overhead_seconds"]
        self._node_up = Gauge("cortex_node_up", "1 while the node answers polls.", registry=registry)
        self._model_state = Gauge(
            "cortex_model_state", "1 for the state that a node reports of a model.", registry=registry
        )
        self._devices = {
            reading: Gauge(f"cortex_device_{reading}", text, registry=registry)
            for reading, text in DEVICE_READINGS.items()
        }
        self._polled: dict[str, list[tuple[Gauge, dict[str, str]]]] = {}

    def on_event(self, event: ObserverEvent) -> None:
        match event:
            case RequestStarted():
                self._in_flight.add((event.model, event.node))
            case RequestRetried():
                self._in_flight.add((event.model, event.node), -1)
                self._retries.add((event.model, event.reason))
            case RequestEnded():
                self._ended(event)
            case NodePolled():
                self._node(event)

    def _ended(self, event: RequestEnded) -> None:
        key = (event.model, event.node)
        self._requests.add((*key, event.dialect, event.outcome))
        if not event.started:
            return
        self._in_flight.add(key, -1)
        self._duration.observe(key, event.duration)
        self._overhead.observe(key, event.overhead)
        if event.time_to_first_token is not None:
            self._ttft.observe(key, event.time_to_first_token)
        if event.inter_token_latency is not None:
            self._itl.observe(key, event.inter_token_latency)
        if event.tokens_per_second is not None:
            self._rate.observe(key, event.tokens_per_second)
        for tokens, series in (
            (event.prompt_tokens, self._prompt),
            (event.completion_tokens, self._completion),
            (event.cached_prompt_tokens, self._cached),
        ):
            if tokens:
                series.add(key, tokens)

    def _node(self, event: NodePolled) -> None:
        """Sets the node's gauges anew; a series that it no longer reports goes away."""
        now: list[tuple[Gauge, dict[str, str], float]] = []
        for model, state in event.states.items():
            now.append((self._model_state, {"model": model, "node": event.node, "state": state}, 1.0))
        for device in event.devices:
            labels = {"node": event.node, "device": str(int(device.get("index", 0)))}
            for reading, collector in self._devices.items():
                if reading in device:
                    now.append((collector, labels, device[reading]))
        for collector, labels in self._polled.get(event.node, ()):
            collector.values.pop(labels, None)
        for collector, labels, value in now:
            collector.set(labels, value)
        self._polled[event.node] = [(collector, labels) for collector, labels, _ in now]
        self._node_up.set({"node": event.node}, int(event.up))

    def render(self, accept: str = "text/plain") -> tuple[bytes, Mapping[str, str]]:
        """The whole exposition and its headers."""
        for series in self._numbers.values():
            series.flush()
        body, headers = render(self._registry, [accept])
        return _as_bytes(body), headers


def _as_bytes(body: Any) -> bytes:
    return body if isinstance(body, bytes) else str(body).encode()
