"""Log probabilities: OpenAI's shape, with the chunk that shows their text, whatever the tokens cut."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion as OpenAICompletion
from openai.types.chat import ChatCompletionChunk as OpenAIChunk

from cortex.hookspecs import Sampling, TokenBatch, TokenEngine, TokenLogprobs
from cortex.neuron.text.chat import TextChat
from cortex.neuron.text.choices import collect
from cortex.testing.scripted import TURN_START, ByteCodec, ScriptedEngine
from cortex.wire.chat import ChatChunk, ChatCompletion, ChatRequest, convert, encode, to_plain
from cortex.wire.errors import BadRequest
from cortex.wire.node import Limit

WIDE = Limit(context=4096, input=4096, output=4096)


def request(**fields: Any) -> ChatRequest:
    fields = {"logprobs": True, "stream": True} | fields
    return convert(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "h"}], **fields})


def steps(*pieces: bytes | list[int]) -> ScriptedEngine:
    """An engine each of whose steps gives one piece."""
    return ScriptedEngine(lambda ids, sampling: [list(piece) for piece in pieces])


def said(engine: TokenEngine, **fields: Any) -> AsyncIterator[ChatChunk]:
    return TextChat(engine, ByteCodec(), WIDE, "m").chat("r", request(**fields))


async def stream(engine: TokenEngine, **fields: Any) -> list[ChatChunk]:
    return [chunk async for chunk in said(engine, **fields)]


async def whole(engine: TokenEngine, **fields: Any) -> ChatCompletion:
    return await collect(said(engine, stream=None, **fields))


def pairs(chunks: Sequence[ChatChunk]) -> list[tuple[str, bytes]]:
    """Of each chunk its text, and the bytes of the tokens that it reports."""
    found = []
    for chunk in chunks:
        (choice,) = chunk.choices
        if choice.finish_reason is None:
            assert choice.logprobs is not None
            tokens = choice.logprobs.content or []
            found.append((str(choice.delta.content), b"".join(bytes(token.bytes or []) for token in tokens)))
        else:
            assert choice.logprobs is None
    return found


# --- the shape ------------------------------------------------------------------------------------


async def test_a_whole_reply_has_them_in_the_shape_of_openai() -> None:
    plain = to_plain(await whole(steps(b"a", b"b"), top_logprobs=2))
    a, b, c = (
        {"token": letter, "logprob": -0.5, "bytes": [ord(letter)]} for letter in "abc"
    )  # The scripted engine finds the next byte likely, too.
    assert plain["choices"][0]["logprobs"] == {
        "content": [
            {**a, "top_logprobs": [a, {**b, "logprob": -1.5}]},
            {**b, "top_logprobs": [b, {**c, "logprob": -1.5}]},
        ],
        "refusal": None,
    }
    read = OpenAICompletion.model_validate(plain).choices[0].logprobs
    assert read is not None
    assert [token.token for token in read.content or []] == ["a", "b"]


async def test_a_stream_has_them_with_the_text_of_each_token() -> None:
    chunks = await stream(steps(b"a", b"bc"))
    assert pairs(chunks) == [("a", b"a"), ("bc", b"bc")]
    assert to_plain(chunks[0])["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    for chunk in chunks:
        OpenAIChunk.model_validate(to_plain(chunk))


async def test_without_being_asked_for_there_are_none() -> None:
    chunks = await stream(steps(b"a"), logprobs=None)
    assert [chunk.choices[0].logprobs for chunk in chunks] == [None, None]
    assert (await whole(steps(b"a"), logprobs=False)).choices[0].logprobs is None


async def test_an_empty_reply_has_an_empty_list() -> None:
    assert to_plain(await whole(steps()))["choices"][0]["logprobs"] == {"content": [], "refusal": None}


async def test_every_choice_has_its_own() -> None:
    engine = ScriptedEngine(lambda ids, sampling: [[ord("a") + (sampling.seed or 0)]])
    reply = await whole(engine, n=2, seed=0)
    logprobs = [choice.logprobs for choice in reply.choices]
    assert [[token.token for token in found.content or []] for found in logprobs if found] == [["a"], ["b"]]


class Fixed:
    """An engine whose one batch is what the test says."""

    def __init__(self, ids: list[int], logprobs: list[TokenLogprobs] | None) -> None:
        self.batch = TokenBatch(ids=ids, finish="stop", logprobs=logprobs)

    async def generate(
        self, request_id: str, ids: Sequence[int], sampling: Sampling
    ) -> AsyncIterator[TokenBatch]:
        yield self.batch


async def test_what_is_impossible_is_a_number_in_json() -> None:
    token = TokenLogprobs(97, -12000.0, [(98, -0.1), (999, float("-inf"))])
    reply = await whole(Fixed([97], [token]), top_logprobs=2)
    body = encode(reply)
    read = OpenAICompletion.model_validate_json(body).choices[0].logprobs
    assert read is not None
    (entry,) = read.content or []
    assert entry.logprob == -9999.0
    assert [(top.token, top.logprob, top.bytes) for top in entry.top_logprobs] == [
        ("b", -0.1, [98]),
        ("", -9999.0, None),
    ]


@pytest.mark.parametrize("logprobs", [None, []])
async def test_an_engine_that_has_none_is_a_refusal_before_the_first_chunk(logprobs: Any) -> None:
    with pytest.raises(BadRequest, match="no log probabilities") as refusal:
        await stream(Fixed([97], logprobs))
    assert refusal.value.param == "logprobs"


# --- characters and tokens ------------------------------------------------------------------------


async def test_tokens_of_one_character_leave_with_the_character() -> None:
    chunks = await stream(steps(b"a", *(bytes([byte]) for byte in "🙂".encode()), b"b"))
    assert pairs(chunks) == [("a", b"a"), ("🙂", "🙂".encode()), ("b", b"b")]
    logprobs = chunks[1].choices[0].logprobs
    assert logprobs is not None
    assert [token.token for token in logprobs.content or []] == ["\ufffd"] * 4


async def test_a_token_with_the_end_of_one_character_and_half_of_the_next() -> None:
    first, second = "é".encode()
    chunks = await stream(steps([first], [second, *b"x", first], [second]))
    assert pairs(chunks) == [("", b""), ("éx", "éx".encode()), ("é", "é".encode())]


async def test_half_a_character_at_the_end_is_reported_with_its_replacement() -> None:
    assert pairs(await stream(steps(b"a", "é".encode()[:1]))) == [("a", b"a"), ("\ufffd", "é".encode()[:1])]


async def test_tokens_without_text_are_reported_in_their_place() -> None:
    silent = b"<|im_start|>"
    chunks = await stream(steps(b"a", [TURN_START], b"b", [TURN_START]))
    assert pairs(chunks) == [("a", b"a"), ("b", silent + b"b"), ("", silent)]


# --- stop strings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces", [(b"one STOP two",), (b"one ", b"STOP", b" two"), (b"o", b"ne S", b"TO", b"P two")]
)
async def test_tokens_that_a_stop_string_cut_off_are_not_reported(pieces: tuple[bytes, ...]) -> None:
    reply = await whole(steps(*pieces), stop="STOP")
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert [token.token for token in logprobs.content or []] == ["o", "n", "e", " "]
    assert reply.choices[0].message.content == "one "


class Words(ByteCodec):
    """Ids from 1000 on are whole words, as most tokens are."""

    words = ("one ST", "OP", "AND", " more", "P")

    def token_bytes(self, id: int) -> bytes:
        return self.words[id - 1000].encode() if id >= 1000 else super().token_bytes(id)

    def detokenizer(self) -> Any:
        inner = super().detokenizer()

        class Spelled:
            def feed(self, ids: Sequence[int]) -> str:
                return inner.feed([byte for id in ids for byte in Words().token_bytes(id)])

            def flush(self) -> str:
                return inner.flush()

        return Spelled()


async def words(*ids: int, **fields: Any) -> list[tuple[str, bytes]]:
    chat = TextChat(steps(*([id] for id in ids)), Words(), WIDE, "m")
    return pairs([chunk async for chunk in chat.chat("r", request(**fields))])


async def test_a_token_of_which_something_was_shown_is_reported() -> None:
    assert await words(1000, 1001, 1003, stop="STOP") == [("one ", b"one ST")]


async def test_what_only_looked_like_a_stop_string_comes_with_its_tokens() -> None:
    assert await words(1000, 1002, 1003, stop="STOP") == [
        ("one ", b"one ST"),
        ("STAND", b"AND"),
        (" more", b" more"),
    ]
    held = await words(ord("S"), ord("T"), stop="STOP")
    assert held == [("", b""), ("ST", b"ST")]


@given(st.text("aé🙂 S", max_size=12), st.lists(st.integers(0, 40), max_size=6), st.sampled_from(["S", "aS"]))
async def test_the_bytes_of_the_reported_tokens_are_the_text(text: str, cuts: list[int], stop: str) -> None:
    data = text.encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    engine = steps(*(data[begin:end] for begin, end in pairwise(edges)))
    shown = pairs(await stream(engine, stop=stop))
    assert b"".join(tokens for _, tokens in shown).decode() == text.partition(stop)[0]
    assert all(tokens.decode() == piece for piece, tokens in shown)
