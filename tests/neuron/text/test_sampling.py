"""Request parameters: ranges, defaults, and refusals that name the parameter."""

from __future__ import annotations

from typing import Any

import pytest

from cortex.hookspecs import Sampling, SamplingDefaults
from cortex.neuron.text.sampling import refuse_unsupported, sampling, stop_strings
from cortex.wire.chat import ChatRequest, convert
from cortex.wire.errors import BadRequest

NONE = SamplingDefaults()


def request(**fields: Any) -> ChatRequest:
    return convert(ChatRequest, {"model": "m", "messages": [], **fields})


def read(defaults: SamplingDefaults = NONE, **fields: Any) -> Sampling:
    return sampling(request(**fields), defaults, (7, 8))


def test_without_any_word_tokens_are_drawn_as_the_model_gives_them() -> None:
    found = read()
    assert (found.temperature, found.top_k, found.top_p, found.min_p, found.seed) == (1.0, 0, 1.0, 0.0, None)
    assert found.stop_ids == (7, 8)


def test_the_request_comes_before_the_model_s_defaults() -> None:
    defaults = SamplingDefaults(temperature=0.7, top_k=20, top_p=0.8, min_p=0.1)
    found = read(defaults)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.7, 20, 0.8, 0.1)
    found = read(defaults, temperature=0, top_k=0, top_p=1, min_p=0)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0, 0, 1, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("top_k", -2),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_completion_tokens", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(BadRequest, match=name) as refusal:
        read(**{name: value})
    assert refusal.value.param == name
    assert str(value) in refusal.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0), ("temperature", 2), ("top_p", 1), ("min_p", 0), ("min_p", 1), ("top_k", 1)],
)
def test_the_ends_of_a_range_belong_to_it(name: str, value: float) -> None:
    assert getattr(read(**{name: value}), name) == value


@pytest.mark.parametrize("off", [0, -1])
def test_top_k_can_be_off(off: int) -> None:
    assert read(SamplingDefaults(top_k=40), top_k=off).top_k == 0


def test_an_empty_nucleus_is_the_likeliest_token() -> None:
    found = read(top_p=0)
    assert (found.top_k, found.top_p) == (1, 1.0)


@pytest.mark.parametrize("seed", [0, 42, -1, 2**63 - 1, -(2**63)])
def test_any_integer_is_a_seed(seed: int) -> None:
    found = read(seed=seed).seed
    assert found is not None
    assert 0 <= found < 2**63
    assert found == read(seed=seed).seed


def test_max_completion_tokens_wins() -> None:
    assert read(max_tokens=5).max_tokens == 5
    assert read(max_tokens=5, max_completion_tokens=9).max_tokens == 9
    assert read().max_tokens > 10**9


# --- stop strings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "read"),
    [(None, ()), ([], ()), ("END", ("END",)), (["a", "b"], ("a", "b")), (["x"] * 16, ("x",) * 16)],
)
def test_stop_is_one_string_or_several(stop: Any, read: tuple[str, ...]) -> None:
    assert stop_strings(request(stop=stop)) == read


@pytest.mark.parametrize("stop", ["", ["a", ""], ["x"] * 17])
def test_empty_and_too_many_stop_strings_are_refused(stop: Any) -> None:
    with pytest.raises(BadRequest) as refusal:
        stop_strings(request(stop=stop))
    assert refusal.value.param == "stop"


# --- what is not honoured yet ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"50": 1.0}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=name) as refusal:
        refuse_unsupported(request(**{name: value}))
    assert refusal.value.param == name


def test_values_that_ask_for_nothing_are_accepted() -> None:
    neutral = {
        "n": 1,
        "logprobs": False,
        "top_logprobs": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "user": "someone",
        "metadata": {"a": "b"},
    }
    refuse_unsupported(request(**neutral))
    refuse_unsupported(request(**dict.fromkeys(neutral)))
    refuse_unsupported(request(tool_choice="none"))
