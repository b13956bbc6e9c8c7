"""The node's Prometheus collectors, and the one place that names them.

Models are labelled by the ids that the node has loaded, refusals by codes of the error tree: never by
anything that a client wrote. Counts only; how a model stands now is told to it at each scrape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from aioprometheus.collectors import Counter, Gauge, Histogram, Registry
from aioprometheus.renderer import render

from cortex.hookspecs import EngineStep
from cortex.web.buckets import INTER_TOKEN_LATENCY, REQUEST_DURATION, TIME_TO_FIRST_TOKEN
from cortex.web.series import Distributions, Numbers
from cortex.wire.node import ModelLoad

COUNTERS: Final[Mapping[str, tuple[str, str]]] = {
    "neuron_prompt_tokens_total": ("model", "Prompt tokens of requests that got a first token."),
    "neuron_generation_tokens_total": ("model", "Tokens that have been generated."),
    "neuron_prefill_tokens_total": ("model", "Tokens computed in prefill."),
    "neuron_decode_tokens_total": ("model", "Tokens computed in decode."),
    "neuron_prefix_cache_queried_tokens_total": ("model", "Prompt tokens looked up in the prefix cache."),
    "neuron_prefix_cache_hit_tokens_total": ("model", "Prompt tokens found in the prefix cache."),
    "neuron_preemptions_total": ("model", "Sequences that gave their cache up and started again."),
    "neuron_draft_tokens_total": ("model", "Tokens computed in case a sequence goes on with them."),
    "neuron_accepted_draft_tokens_total": ("model", "Those of them that the sequence went on with."),
    "neuron_refusals_total": ("reason", "Requests that got an error instead of a token."),
}
HISTOGRAMS: Final[Mapping[str, tuple[str, Sequence[float]]]] = {
    "neuron_time_to_first_token_seconds": (
        "From a request's arrival to its first token.",
        TIME_TO_FIRST_TOKEN,
    ),
    "neuron_inter_token_latency_seconds": ("Mean gap between the tokens of a request.", INTER_TOKEN_LATENCY),
    # A step is what lies between two tokens, so the same buckets make the two comparable.
    "neuron_step_seconds": ("Time of one step of the engine.", INTER_TOKEN_LATENCY),
    "neuron_load_seconds": ("Time to load a model.", REQUEST_DURATION),
}


class NeuronMetrics:
    """Durations are in seconds."""

    def __init__(self) -> None:
        registry = self._registry = Registry()
        counters = self._counters = {
            name: Numbers(Counter(name, text, registry=registry), label)
            for name, (label, text) in COUNTERS.items()
        }
        histograms = {
            name: Distributions(Histogram(name, text, registry=registry, buckets=buckets), "model")
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self._prompt = counters["neuron_prompt_tokens_total"]
        self._generation = counters["neuron_generation_tokens_total"]
        self._prefill = counters["neuron_prefill_tokens_total"]
        self._decode = counters["neuron_decode_tokens_total"]
        self._queried = counters["neuron_prefix_cache_queried_tokens_total"]
        self._hit = counters["neuron_prefix_cache_hit_tokens_total"]
        self._preemptions = counters["neuron_preemptions_total"]
        self._drafted = counters["neuron_draft_tokens_total"]
        self._accepted = counters["neuron_accepted_draft_tokens_total"]
        self._refusals = counters["neuron_refusals_total"]
        self._ttft = histograms["neuron_time_to_first_token_seconds"]
        self._itl = histograms["neuron_inter_token_latency_seconds"]
        self._steps = histograms["neuron_step_seconds"]
        self._loads = histograms["neuron_load_seconds"]
        self._running = Gauge(
            "neuron_requests_running", "Sequences that a model works on.", registry=registry
        )
        self._waiting = Gauge("neuron_requests_waiting", "Sequences in line for a model.", registry=registry)
        self._cache_usage = Gauge(
            "neuron_cache_usage_ratio", "How much of the cache running sequences hold.", registry=registry
        )
        self._loaded = Gauge("neuron_models_loaded", "Models that are loaded.", registry=registry)

    def first_token(self, model: str, seconds: float, prompt_tokens: int) -> None:
        self._ttft.observe((model,), seconds)
        self._prompt.add((model,), prompt_tokens)

    def generated(self, model: str, tokens: int, seconds: float) -> None:
        """A sequence is over, complete or not; `seconds` lie between its first and its last token."""
        self._generation.add((model,), tokens)
        if tokens > 1:
            self._itl.observe((model,), seconds / (tokens - 1))

    def step(self, model: str, step: EngineStep) -> None:
        """An engine has made a step. Comes a hundred times a second and costs microseconds."""
        key = (model,)
        self._steps.observe(key, step.seconds)
        self._prefill.add(key, step.prefill_tokens)
        self._decode.add(key, step.decode_tokens)
        self._queried.add(key, step.prefix_queried_tokens)
        self._hit.add(key, step.prefix_hit_tokens)
        self._preemptions.add(key, step.preemptions)
        self._drafted.add(key, step.draft_tokens)
        self._accepted.add(key, step.accepted_draft_tokens)

    def refused(self, reason: str) -> None:
        self._refusals.add((reason,))

    def loaded(self, model: str, seconds: float) -> None:
        self._loads.observe((model,), seconds)

    def render(self, loads: Sequence[ModelLoad], accept: str) -> tuple[bytes, str]:
        """The whole exposition and its content type; `loads` are those of the models that are loaded."""
        for series in self._counters.values():
            series.flush()
        for gauge in (self._running, self._waiting, self._cache_usage):
            gauge.values.clear()
        for load in loads:
            labels = {"model": load.id}
            self._running.set(labels, load.in_flight)
            self._waiting.set(labels, load.queue_depth)
            if load.cache_usage_ratio is not None:
                self._cache_usage.set(labels, load.cache_usage_ratio)
        self._loaded.set({}, len(loads))
        body, headers = render(self._registry, [accept])
        return _as_bytes(body), _content_type(headers)


def _as_bytes(body: Any) -> bytes:
    return body if isinstance(body, bytes) else str(body).encode()


def _content_type(headers: Mapping[str, str]) -> str:
    return headers["Content-Type"]
