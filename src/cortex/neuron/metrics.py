"""The node's Prometheus collectors, and the one place that names them.

Models are labelled by the ids that the node has loaded, refusals by codes of the error tree: never by
anything that a client wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aioprometheus.collectors import Counter, Gauge, Histogram, Registry
from aioprometheus.renderer import render

from cortex.web.buckets import INTER_TOKEN_LATENCY, REQUEST_DURATION, TIME_TO_FIRST_TOKEN
from cortex.wire.node import ModelLoad


class NeuronMetrics:
    """Durations are in seconds."""

    def __init__(self) -> None:
        registry = self._registry = Registry()

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, registry=registry, buckets=buckets)

        self._running = gauge("neuron_requests_running", "Requests that a model works on.")
        self._waiting = gauge("neuron_requests_waiting", "Requests in line for a model.")
        self._loaded = gauge("neuron_models_loaded", "Models that are loaded.")
        self._prompt = counter("neuron_prompt_tokens_total", "Prompt tokens that have been prefilled.")
        self._generation = counter("neuron_generation_tokens_total", "Tokens that have been generated.")
        self._ttft = histogram(
            "neuron_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            TIME_TO_FIRST_TOKEN,
        )
        self._itl = histogram(
            "neuron_inter_token_latency_seconds",
            "Mean gap between the tokens of a request.",
            INTER_TOKEN_LATENCY,
        )
        self._refusals = counter("neuron_refusals_total", "Requests that got an error instead of a token.")
        self._loads = histogram("neuron_load_seconds", "Time to load a model.", REQUEST_DURATION)

    def first_token(self, model: str, seconds: float, prompt_tokens: int) -> None:
        self._ttft.observe({"model": model}, seconds)
        self._prompt.add({"model": model}, prompt_tokens)

    def generated(self, model: str, tokens: int, seconds: float) -> None:
        """A sequence is over, complete or not; `seconds` lie between its first and its last token."""
        self._generation.add({"model": model}, tokens)
        if tokens > 1:
            self._itl.observe({"model": model}, seconds / (tokens - 1))

    def refused(self, reason: str) -> None:
        self._refusals.inc({"reason": reason})

    def loaded(self, model: str, seconds: float) -> None:
        self._loads.observe({"model": model}, seconds)

    def render(self, loads: Sequence[ModelLoad], accept: str) -> tuple[bytes, str]:
        """The whole exposition and its content type; `loads` are those of the models that are loaded."""
        self._running.values.clear()
        self._waiting.values.clear()
        for load in loads:
            self._running.set({"model": load.id}, load.in_flight)
            self._waiting.set({"model": load.id}, load.queue_depth)
        self._loaded.set({}, len(loads))
        body, headers = render(self._registry, [accept])
        return _as_bytes(body), _content_type(headers)


def _as_bytes(body: Any) -> bytes:
    return body if isinstance(body, bytes) else str(body).encode()


def _content_type(headers: Mapping[str, str]) -> str:
    return headers["Content-Type"]
