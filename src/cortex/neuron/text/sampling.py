"""A chat request's parameters, checked: how tokens are chosen, where the reply ends, what is refused.

Knows the ranges and the defaults. Knows neither the prompt nor the engine.
"""

from __future__ import annotations

from typing import Final

from cortex.hookspecs import Sampling, SamplingDefaults
from cortex.wire.chat import ChatRequest
from cortex.wire.errors import BadRequest

MAX_STOPS: Final = 16
_MORE_THAN_ANY: Final = 2**31 - 1
"""Tokens that no model can hold."""

_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
}
"""What this engine does not honour yet, with the values that ask for nothing."""


def refuse_unsupported(request: ChatRequest) -> None:
    """Raises BadRequest that names the first parameter that this engine does not honour yet."""
    for name, neutral in _NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            allowed = " or ".join(repr(item) for item in neutral)
            raise BadRequest(f"{name} is not supported yet; leave it out or send {allowed}.", param=name)


def stop_strings(request: ChatRequest) -> tuple[str, ...]:
    """Raises BadRequest for an empty stop string or too many of them."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"stop has {len(stops)} strings; at most {MAX_STOPS} are possible.", param="stop")
    if "" in stops:
        raise BadRequest("stop holds an empty string, which would end every reply at once.", param="stop")
    return tuple(stops)


def wanted_tokens(request: ChatRequest) -> int | None:
    """The longest reply that the client asks for; None where it did not say."""
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    wanted: int | None = getattr(request, name)
    if wanted is not None and wanted < 1:
        raise BadRequest(f"{name} is {wanted}; it must be at least 1.", param=name)
    return wanted


def sampling(request: ChatRequest, defaults: SamplingDefaults, stop_ids: tuple[int, ...]) -> Sampling:
    """The request's own values, else the model's, else neutral ones.

    `max_tokens` is the client's wish, or more than any model can; what fits is decided with the prompt.
    Raises BadRequest that names a parameter out of its range.
    """
    _within("temperature", request.temperature, 0, 2)
    _within("top_p", request.top_p, 0, 1)
    _within("min_p", request.min_p, 0, 1)
    if request.top_k is not None and request.top_k < -1:
        raise BadRequest(f"top_k is {request.top_k}; it must be positive, or 0 or -1 for off.", param="top_k")
    top_k, top_p = int(_pick(request.top_k, defaults.top_k, 0)), _pick(request.top_p, defaults.top_p, 1)
    if top_p == 0:
        # The smallest nucleus is the likeliest token alone.
        top_k, top_p = 1, 1
    wanted = wanted_tokens(request)
    return Sampling(
        max_tokens=_MORE_THAN_ANY if wanted is None else min(wanted, _MORE_THAN_ANY),
        temperature=float(_pick(request.temperature, defaults.temperature, 1)),
        top_k=max(0, top_k),
        top_p=float(top_p),
        min_p=float(_pick(request.min_p, defaults.min_p, 0)),
        # Any integer is a seed; generators take 63 bits.
        seed=None if request.seed is None else request.seed % 2**63,
        stop_ids=stop_ids,
    )


def _pick(asked: float | None, models: float | None, neutral: float) -> float:
    return asked if asked is not None else models if models is not None else neutral


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise BadRequest(f"{name} is {value:g}; it must be between {low:g} and {high:g}.", param=name)
