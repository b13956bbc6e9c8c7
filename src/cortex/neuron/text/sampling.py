"""A chat request's parameters, checked: how tokens are chosen, where the reply ends, what is refused.

Knows the ranges and the defaults, and asks the codec which ids are tokens. Knows neither the prompt nor
the engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from cortex.hookspecs import Codec, Sampling
from cortex.wire.chat import ChatRequest
from cortex.wire.errors import BadRequest

MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 1000
"""In each: whether the end of the text begins one is looked at with every token."""
MAX_BIASES: Final = 1024
MAX_REPETITION_PENALTY: Final = 10
MIN_TEMPERATURE: Final = 1e-5
"""Below, the likeliest token is chosen, as at 0: fp32 has no room for the quotients."""
MAX_CHOICES: Final = 16
"""Each is a sequence of the engine, and all of a request's run at the same time."""
UNSAID_RESERVE: Final = 512
"""Tokens of cache set aside for a reply whose length nobody said. Few replies are as long as the context
would allow, so setting all of that aside would keep others waiting for nothing; the rare longer one may
outgrow this, and then risks to be preempted and resumed."""

_MORE_THAN_ANY: Final = 2**31 - 1
"""Tokens that no model can hold."""
_SEEDS: Final = 2**63
"""Any integer is a seed; generators take 63 bits."""
_TOKEN_ID: Final = re.compile("[0-9]{1,10}")

_RANGES: Final[dict[str, tuple[int, int]]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "top_logprobs": (0, 20),
}
_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
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
    """Raises BadRequest for stop strings that are empty or too long, or too many of them."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"stop has {len(stops)} strings; at most {MAX_STOPS} are possible.", param="stop")
    if "" in stops:
        raise BadRequest("stop holds an empty string, which would end every reply at once.", param="stop")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_CHARS:
        raise BadRequest(
            f"stop holds a string of {longest} characters; at most {MAX_STOP_CHARS} are possible.",
            param="stop",
        )
    return tuple(stops)


def wanted_choices(request: ChatRequest) -> int:
    """How many replies the client asks for. Raises BadRequest for none or too many."""
    count = 1 if request.n is None else request.n
    if not 1 <= count <= MAX_CHOICES:
        raise BadRequest(f"n is {count}; it must be between 1 and {MAX_CHOICES}.", param="n")
    return count


def wanted_tokens(request: ChatRequest) -> int | None:
    """The longest reply that the client asks for; None where it did not say."""
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    wanted: int | None = getattr(request, name)
    if wanted is not None and wanted < 1:
        raise BadRequest(f"{name} is {wanted}; it must be at least 1.", param=name)
    return wanted


def sampling(request: ChatRequest, codec: Codec) -> Sampling:
    """The request's own values, else the model's, else neutral ones.

    `max_tokens` is the client's wish, or more than any model can; what fits is decided with the prompt.
    Raises BadRequest that names a parameter out of its range.
    """
    _check_ranges(request)
    defaults = codec.defaults
    top_k, top_p = int(_pick(request.top_k, defaults.top_k, 0)), _pick(request.top_p, defaults.top_p, 1)
    if top_p == 0:
        # The smallest nucleus is the likeliest token alone.
        top_k, top_p = 1, 1
    wanted = wanted_tokens(request)
    temperature = float(_pick(request.temperature, defaults.temperature, 1))
    return Sampling(
        max_tokens=_MORE_THAN_ANY if wanted is None else min(wanted, _MORE_THAN_ANY),
        reserve=UNSAID_RESERVE if wanted is None else None,
        min_tokens=_least_tokens(request, wanted),
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_k=min(max(0, top_k), _MORE_THAN_ANY),
        top_p=float(top_p),
        min_p=float(_pick(request.min_p, defaults.min_p, 0)),
        repetition_penalty=float(_pick(request.repetition_penalty, defaults.repetition_penalty, 1)),
        presence_penalty=float(request.presence_penalty or 0),
        frequency_penalty=float(request.frequency_penalty or 0),
        logit_bias=_biases(request.logit_bias or {}, codec),
        logprobs=_likeliest(request),
        seed=None if request.seed is None else request.seed % _SEEDS,
        stop_ids=() if request.ignore_eos else codec.stop_ids,
    )


def of_choice(sampling: Sampling, index: int) -> Sampling:
    """`sampling` for one of several choices, which would all be the same with the same seed."""
    if sampling.seed is None or index == 0:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + index) % _SEEDS)


def _pick(asked: float | None, models: float | None, neutral: float) -> float:
    return asked if asked is not None else models if models is not None else neutral


def _check_ranges(request: ChatRequest) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(request, name)
        if value is not None and not low <= value <= high:
            raise BadRequest(f"{name} is {_shown(value)}; it must be between {low} and {high}.", param=name)
    top_k, penalty = request.top_k, request.repetition_penalty
    if top_k is not None and top_k < -1:
        raise BadRequest(f"top_k is {top_k}; it must be positive, or 0 or -1 for off.", param="top_k")
    if penalty is not None and not 0 < penalty <= MAX_REPETITION_PENALTY:
        raise BadRequest(
            f"repetition_penalty is {_shown(penalty)}; it must be above 0 and at most "
            f"{MAX_REPETITION_PENALTY}.",
            param="repetition_penalty",
        )


def _least_tokens(request: ChatRequest, wanted: int | None) -> int:
    least = request.min_tokens or 0
    if least < 0:
        raise BadRequest(f"min_tokens is {least}; it must be at least 0.", param="min_tokens")
    if wanted is not None and least > wanted:
        raise BadRequest(
            f"min_tokens is {least}, more than the {wanted} tokens that the reply may have.",
            param="min_tokens",
        )
    return min(least, _MORE_THAN_ANY)


def _likeliest(request: ChatRequest) -> int | None:
    if request.top_logprobs and not request.logprobs:
        raise BadRequest("top_logprobs is only possible with logprobs set to true.", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


def _biases(asked: Mapping[str, float], codec: Codec) -> dict[int, float]:
    if len(asked) > MAX_BIASES:
        raise BadRequest(
            f"logit_bias has {len(asked)} entries; at most {MAX_BIASES} are possible.", param="logit_bias"
        )
    for key, bias in asked.items():
        known = _TOKEN_ID.fullmatch(key) and int(key) <= _MORE_THAN_ANY and codec.token_bytes(int(key))
        if not known:
            raise BadRequest(f"logit_bias names {key[:40]!r}, which is no token id.", param="logit_bias")
        if not -100 <= bias <= 100:
            raise BadRequest(
                f"logit_bias of {key} is {_shown(bias)}; it must be between -100 and 100.", param="logit_bias"
            )
    return {int(key): float(bias) for key, bias in asked.items()}


def _shown(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
