"""Stop strings in every split of a text."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cortex.neuron.text.stop import StopStrings

letters = st.text("ab ", max_size=12)
stops = st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3)


def run(stop: list[str], pieces: list[str]) -> tuple[str, str | None]:
    strings = StopStrings(stop)
    text = "".join(strings.feed(piece) for piece in pieces)
    return text + strings.flush(), strings.hit


def first_stop(text: str, stop: list[str]) -> tuple[str, str | None]:
    """By trying every end: the first end of a stop string, and there the longest one."""
    for end in range(len(text) + 1):
        ending = [one for one in stop if text[:end].endswith(one)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(letters, stops, st.lists(st.integers(0, 12)))
def test_the_result_does_not_depend_on_the_split(text: str, stop: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(edges)]
    assert run(stop, pieces) == first_stop(text, stop)


@given(letters, stops)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stop: list[str]) -> None:
    strings = StopStrings(stop)
    shown = ""
    for i, letter in enumerate(text):
        shown += strings.feed(letter)
        if strings.hit is not None:
            return
        held = text[len(shown) : i + 1]
        assert text.startswith(shown)
        assert any(one.startswith(held) and one != held for one in stop) or not held


def test_a_stop_string_across_pieces_never_leaks() -> None:
    strings = StopStrings(["###"])
    assert [strings.feed(piece) for piece in ("one #", "#", " two ##", "# three")] == [
        "one ",
        "",
        "## two ",
        "",
    ]
    assert strings.hit == "###"
    assert strings.feed("more") == strings.flush() == ""


def test_without_stop_strings_nothing_is_held_back() -> None:
    strings = StopStrings([])
    assert strings.feed("abc") == "abc"
    assert strings.flush() == ""
