"""`cortex chat` without a terminal: history, one message, lines of stdin, errors."""

import pytest

from cortex.wire.errors import BadRequest, Busy

CARD = {"id": "m", "loaded": True}


def messages(endpoint) -> list:
    return [body["messages"] for method, _, body in endpoint.asked if method == "POST"]


def test_one_message_prints_the_answer_and_nothing_else(endpoint, cortex) -> None:
    endpoint.speak("Hel", "lo")
    result = cortex(
        "chat", "m", "-m", "Hi", "--system", "Be kind.", "--temperature", "0", "--max-tokens", "5"
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello\n", "")
    [(_, _, body)] = endpoint.asked
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        "stream": True,
        "temperature": 0.0,
        "max_tokens": 5,
    }


def test_nothing_is_set_that_was_not_asked_for(endpoint, cortex) -> None:
    endpoint.speak("x")
    cortex("chat", "m", "-m", "Hi")
    assert endpoint.asked[0][2].keys() == {"model", "messages", "stream"}


def test_lines_of_stdin_are_turns_of_one_conversation(endpoint, cortex) -> None:
    endpoint.speak("Hello")
    result = cortex("chat", "m", input="One\n\n  Two \n")
    assert result.stdout == "Hello\nHello\n"
    assert messages(endpoint)[1] == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Two"},
    ]


def test_clear_forgets_all_but_the_system_message_and_quit_leaves(endpoint, cortex) -> None:
    endpoint.speak("Hello")
    cortex("chat", "m", "--system", "S", input="One\n/clear\nTwo\n/quit\nThree\n")
    assert messages(endpoint)[1:] == [
        [{"role": "system", "content": "S"}, {"role": "user", "content": "Two"}]
    ]


def test_bytes_that_are_no_text_are_replaced(endpoint, cortex) -> None:
    endpoint.speak("x")
    cortex("chat", "m", input=b"caf\xe9\n")
    assert messages(endpoint)[0][0]["content"] == "caf\ufffd"


@pytest.mark.parametrize(
    ("cards", "model"),
    [
        ([CARD], "m"),
        ([CARD, {"id": "cold"}, {"id": "nick", "loaded": True, "alias_of": "m"}], "m"),
        ([{"id": "cold"}], "cold"),
    ],
)
def test_without_a_name_the_one_model_that_is_meant_is_found(endpoint, cortex, cards, model) -> None:
    endpoint.on("GET", "/v1/models", {"data": cards}).speak("x")
    assert cortex("chat", "-m", "Hi").exit_code == 0
    assert endpoint.asked[-1][2]["model"] == model


@pytest.mark.parametrize(
    ("cards", "complaint"),
    [
        ([], "there is no model to talk to; `cortex load MODEL` loads one."),
        ([CARD, {"id": "n", "loaded": True}], "say which model: cortex chat MODEL, one of m, n."),
    ],
)
def test_without_a_name_doubt_is_one_line(endpoint, cortex, cards, complaint) -> None:
    endpoint.on("GET", "/v1/models", {"data": cards})
    result = cortex("chat", "-m", "Hi")
    assert (result.exit_code, result.stderr) == (1, f"error: {complaint}\n")


def test_a_refusal_is_one_line(endpoint, cortex) -> None:
    endpoint.on("POST", "/v1/chat/completions", BadRequest("The prompt is too long."))
    result = cortex("chat", "m", "-m", "Hi")
    assert (result.exit_code, result.stderr) == (1, "error: The prompt is too long.\n")


def test_an_error_in_the_middle_follows_what_was_said(endpoint, cortex) -> None:
    endpoint.stream(
        "/v1/chat/completions",
        {"choices": [{"index": 0, "delta": {"content": "Hel"}}]},
        Busy("The worker died."),
    )
    result = cortex("chat", "m", "-m", "Hi")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "Hel\n", "error: The worker died.\n")


def test_a_stream_that_breaks_off_is_an_error(endpoint, cortex) -> None:
    endpoint.speak("Hel", finish=None)
    result = cortex("chat", "m", "-m", "Hi")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: the connection ended in the middle of the answer.\n",
    )


def test_reasoning_stays_out_of_a_pipe(endpoint, cortex) -> None:
    endpoint.stream(
        "/v1/chat/completions",
        {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"index": 0, "delta": {"content": "Yes"}, "finish_reason": "stop"}]},
        b"data: [DONE]\n\n",
    )
    assert cortex("chat", "m", "-m", "Hi").stdout == "Yes\n"
