"""Request parameters: ranges, the order of defaults, and refusals that name the parameter."""

from __future__ import annotations

from typing import Any

import pytest

from cortex.hookspecs import Sampling, SamplingDefaults
from cortex.neuron.text.sampling import (
    UNSAID_RESERVE,
    of_choice,
    refuse_unsupported,
    sampling,
    stop_strings,
    wanted_choices,
)
from cortex.testing.scripted import ByteCodec
from cortex.wire.chat import ChatRequest, convert
from cortex.wire.errors import BadRequest

NONE = SamplingDefaults()


def request(**fields: Any) -> ChatRequest:
    return convert(ChatRequest, {"model": "m", "messages": [], **fields})


def read(defaults: SamplingDefaults = NONE, **fields: Any) -> Sampling:
    codec = ByteCodec(defaults)
    codec.stop_ids = (7, 8)
    return sampling(request(**fields), codec)


def test_without_any_word_tokens_are_drawn_as_the_model_gives_them() -> None:
    found = read()
    assert (found.temperature, found.top_k, found.top_p, found.min_p, found.seed) == (1.0, 0, 1.0, 0.0, None)
    assert found.stop_ids == (7, 8)
    assert (found.repetition_penalty, found.presence_penalty, found.frequency_penalty) == (1, 0, 0)
    assert (found.logit_bias, found.logprobs, found.min_tokens) == ({}, None, 0)


def test_the_request_comes_before_the_model_s_defaults() -> None:
    defaults = SamplingDefaults(temperature=0.7, top_k=20, top_p=0.8, min_p=0.1)
    found = read(defaults)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.7, 20, 0.8, 0.1)
    found = read(defaults, temperature=0, top_k=0, top_p=1, min_p=0)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0, 0, 1, 0)
    advised = SamplingDefaults(repetition_penalty=1.05)
    assert read(advised).repetition_penalty == 1.05
    assert read(advised, repetition_penalty=1).repetition_penalty == 1


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
        ("presence_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", 10.5),
        ("top_logprobs", -1),
        ("top_logprobs", 21),
        ("top_logprobs", 10**400),
        ("min_tokens", -1),
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
    [
        ("temperature", 0),
        ("temperature", 2),
        ("top_p", 1),
        ("min_p", 0),
        ("min_p", 1),
        ("top_k", 1),
        ("presence_penalty", -2),
        ("presence_penalty", 2),
        ("frequency_penalty", -2),
        ("frequency_penalty", 2),
        ("repetition_penalty", 0.001),
        ("repetition_penalty", 10),
        ("min_tokens", 0),
    ],
)
def test_the_ends_of_a_range_belong_to_it(name: str, value: float) -> None:
    assert getattr(read(**{name: value}), name) == value


@pytest.mark.parametrize("cold", [1e-6, 1e-39, 1e-320])
def test_a_temperature_too_small_to_divide_by_is_0(cold: float) -> None:
    assert read(temperature=cold).temperature == 0
    assert read(SamplingDefaults(temperature=cold)).temperature == 0
    assert read(temperature=1e-5).temperature == 1e-5


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


# --- length and end -------------------------------------------------------------------------------


def test_a_length_that_was_said_is_set_aside_in_full_and_an_unsaid_one_in_part() -> None:
    assert read(max_tokens=4000).reserve is None
    assert read(max_completion_tokens=4000).reserve is None
    assert read().reserve == UNSAID_RESERVE


def test_min_tokens_may_not_be_more_than_the_reply_can_have() -> None:
    assert read(min_tokens=5, max_tokens=5).min_tokens == 5
    assert read(min_tokens=5).min_tokens == 5
    assert read(min_tokens=10**400).min_tokens < 2**31
    for name in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(BadRequest, match="6, more than the 5") as refusal:
            read(**{"min_tokens": 6, name: 5})
        assert refusal.value.param == "min_tokens"


def test_with_ignore_eos_nothing_the_model_says_ends_the_reply() -> None:
    assert read(ignore_eos=True).stop_ids == ()
    assert read(ignore_eos=False).stop_ids == (7, 8)


# --- logit_bias -----------------------------------------------------------------------------------


def test_logit_bias_names_tokens_by_their_decimal_ids() -> None:
    assert read(logit_bias={"5": 1, "257": -100, "0": 100.0}).logit_bias == {5: 1.0, 257: -100.0, 0: 100.0}


@pytest.mark.parametrize(
    "key", ["", "a", "-1", "1.0", "+1", " 1", "1\n", "\u0665", "258", "4294967296", "99999999999", "9" * 9999]
)
def test_a_bias_of_what_is_no_token_is_refused(key: str) -> None:
    with pytest.raises(BadRequest, match="no token id") as refusal:
        read(logit_bias={"5": 1, key: 1})
    assert refusal.value.param == "logit_bias"
    assert len(refusal.value.message) < 200


@pytest.mark.parametrize("bias", [-100.5, 101])
def test_a_bias_out_of_range_is_refused(bias: float) -> None:
    with pytest.raises(BadRequest, match=r"logit_bias of 5 is .*between -100 and 100") as refusal:
        read(logit_bias={"5": bias})
    assert refusal.value.param == "logit_bias"


def test_too_many_biases_are_refused() -> None:
    with pytest.raises(BadRequest, match="1025 entries; at most 1024") as refusal:
        read(logit_bias={f"{i:010}": 1 for i in range(1025)})
    assert refusal.value.param == "logit_bias"


# --- logprobs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"top_logprobs": 0}, None),
    ],
)
def test_logprobs_are_given_where_they_were_asked_for(fields: dict[str, Any], wanted: int | None) -> None:
    assert read(**fields).logprobs == wanted


@pytest.mark.parametrize("logprobs", [None, False])
def test_top_logprobs_without_logprobs_is_refused(logprobs: bool | None) -> None:
    with pytest.raises(BadRequest, match="logprobs set to true") as refusal:
        read(top_logprobs=3, logprobs=logprobs)
    assert refusal.value.param == "top_logprobs"


# --- choices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "count"), [(None, 1), (1, 1), (16, 16)])
def test_one_choice_or_several(n: int | None, count: int) -> None:
    assert wanted_choices(request(n=n)) == count


@pytest.mark.parametrize("n", [-1, 0, 17, 10**400])
def test_no_choice_and_too_many_are_refused_with_the_bound(n: int) -> None:
    with pytest.raises(BadRequest, match="between 1 and 16") as refusal:
        wanted_choices(request(n=n))
    assert refusal.value.param == "n"


def test_each_choice_has_a_seed_of_its_own() -> None:
    assert [of_choice(read(seed=5), index).seed for index in range(3)] == [5, 6, 7]
    assert of_choice(read(seed=2**63 - 1), 1).seed == 0
    unseeded = read()
    assert of_choice(unseeded, 3) is unseeded


# --- stop strings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "read"),
    [(None, ()), ([], ()), ("END", ("END",)), (["a", "b"], ("a", "b")), (["x"] * 16, ("x",) * 16)],
)
def test_stop_is_one_string_or_several(stop: Any, read: tuple[str, ...]) -> None:
    assert stop_strings(request(stop=stop)) == read


@pytest.mark.parametrize("stop", ["", ["a", ""], ["x"] * 17, "y" * 1001, ["a", "y" * 1001]])
def test_stop_strings_that_are_empty_too_many_or_too_long_are_refused(stop: Any) -> None:
    with pytest.raises(BadRequest) as refusal:
        stop_strings(request(stop=stop))
    assert refusal.value.param == "stop"


# --- what is not honoured yet ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
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
        "ignore_eos": False,
        "min_tokens": 0,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "user": "someone",
        "metadata": {"a": "b"},
    }
    for asked in (neutral, dict.fromkeys(neutral)):
        refuse_unsupported(request(**asked))
        assert read(**asked) == read()
        assert wanted_choices(request(**asked)) == 1
    refuse_unsupported(request(tool_choice="none"))
