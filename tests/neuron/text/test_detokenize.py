"""Ids to text in any split, against tokenizers' own decoding."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from cortex.neuron.text.detokenize import IncrementalDetokenizer, TokenBytes, byte_level
from cortex.neuron.text.tokenizer import tokenizer_from_gguf
from cortex.wire.errors import LoadFailed

Metadata = Callable[..., dict[str, Any]]

SPACED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


@pytest.fixture(scope="module")
def spaced_vocabulary() -> dict[str, int]:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["<s>", "▁", "▁Hello", "▁world", "a", "é", "▁▁", "!"]
    return {token: id for id, token in enumerate([*words, *bytes_])}


def spaced(vocabulary: dict[str, int], *decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(list(decoder)) if len(decoder) != 1 else decoder[0]
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False)])
    return tokenizer


def run(tokenizer: Tokenizer, splits: list[list[int]]) -> list[str]:
    detokenizer = IncrementalDetokenizer(TokenBytes(tokenizer))
    return [*(detokenizer.feed(ids) for ids in splits), detokenizer.flush()]


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[begin:end] for begin, end in pairwise(edges)]


def test_any_split_of_any_ids_is_the_whole_decoding(gguf_metadata: Metadata) -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    size = tokenizer.get_vocab_size()

    @given(st.lists(st.integers(0, size - 1)), st.lists(st.integers(0, 999)))
    def check(ids: list[int], cuts: list[int]) -> None:
        pieces = run(tokenizer, split(ids, cuts))
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)

    check()


def test_text_that_is_out_is_never_taken_back(gguf_metadata: Metadata) -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())

    @given(st.text(min_size=1))
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        shown = ""
        for piece in run(tokenizer, [[id] for id in ids]):
            assert "\ufffd" not in piece or "\ufffd" in text
            shown += piece
            assert whole.startswith(shown)
        assert shown == whole

    check()


def test_a_character_comes_when_its_last_byte_has_come(gguf_metadata: Metadata) -> None:
    metadata = gguf_metadata(merges=[])
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode("é🙂", add_special_tokens=False).ids
    assert len(ids) == 6
    assert run(tokenizer, [[id] for id in ids]) == ["", "é", "", "", "", "🙂", ""]
    assert run(tokenizer, [ids[:-1]]) == ["é", "\ufffd"]


def test_special_tokens_are_silent_and_user_defined_ones_speak(gguf_metadata: Metadata) -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    ids = tokenizer.encode("<|im_start|>a<tool_call>b  \nc<|im_end|>", add_special_tokens=False).ids
    assert "".join(run(tokenizer, [ids])) == "a<tool_call>b  \nc"


def test_a_special_token_inside_a_character_does_not_break_it(gguf_metadata: Metadata) -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata(merges=[]))
    first, second = tokenizer.encode("é", add_special_tokens=False).ids
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    assert "".join(run(tokenizer, [[first], [end], [second]])) == "é"


def test_an_added_token_stands_for_its_own_letters(gguf_metadata: Metadata) -> None:
    metadata = gguf_metadata()
    # In the byte alphabet these letters would be other bytes, as those of an ordinary token are.
    metadata["tokenizer.ggml.tokens"].append("«né»")
    metadata["tokenizer.ggml.token_type"].append(4)
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode("x«né»y").ids
    assert len(ids) == 3
    assert "".join(run(tokenizer, [ids])) == "x«né»y"


def test_ids_outside_the_vocabulary_are_silent(gguf_metadata: Metadata) -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    assert run(tokenizer, [[10**6, tokenizer.token_to_id("a") or 0]]) == ["a", ""]


def test_the_byte_alphabet_covers_every_byte_once() -> None:
    alphabet = sorted({chr(code) for code in range(0x180) if len(byte_level(chr(code))) == 1})
    assert len(alphabet) >= 256
    spelled = [byte_level(letter) for letter in alphabet]
    assert {bytes([byte]) for byte in range(256)} <= set(spelled)
    assert byte_level("Ġcafé") == b" caf\xe9"
    assert byte_level("日") == "日".encode()


# --- U+2581 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "decoder",
    [
        [*SPACED, decoders.Strip(" ", 1, 0)],
        SPACED,
    ],
    ids=["llama", "gemma"],
)
def test_tokens_with_their_own_space_decode_as_tokenizers_decodes_them(
    decoder: list[Any], spaced_vocabulary: dict[str, int]
) -> None:
    tokenizer = spaced(spaced_vocabulary, *decoder)
    words = st.one_of(st.integers(0, 7).map(lambda id: [id]), st.characters().map(in_bytes))

    @given(st.lists(words), st.lists(st.integers(0, 999)))
    def check(items: list[list[int]], cuts: list[int]) -> None:
        ids = [id for item in items for id in item]
        assert "".join(run(tokenizer, split(ids, cuts))) == tokenizer.decode(ids)

    check()


def test_added_runs_of_marks_are_runs_of_spaces(spaced_vocabulary: dict[str, int]) -> None:
    """As in Gemma's tokenizer.json."""
    tokenizer = spaced(spaced_vocabulary, *SPACED)
    tokenizer.add_tokens(["▁▁▁", "<tool>"])
    ids = [tokenizer.token_to_id(token) for token in ("▁▁▁", "<tool>", "▁▁▁")]
    assert "".join(run(tokenizer, [ids])) == tokenizer.decode(ids) == "   <tool>   "


def test_a_token_that_is_matched_with_its_space_is_shown_with_it(spaced_vocabulary: dict[str, int]) -> None:
    """As where a token was added to a tokenizer whose normalizer puts a mark before every text."""
    tokenizer = spaced(spaced_vocabulary, *SPACED, decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_tokens([AddedToken("<think>", normalized=True), AddedToken("<tool>", normalized=False)])
    for text in ("a <think>! <tool>a", "<think>a<tool>", "<tool> <think>"):
        ids = tokenizer.encode(text).ids
        assert "".join(run(tokenizer, [[id] for id in ids])) == tokenizer.decode(ids)
    assert "".join(run(tokenizer, [tokenizer.encode("a <think>!").ids])) == "a <think>!"


def in_bytes(character: str) -> list[int]:
    return [8 + byte for byte in character.encode("utf-8", "replace")]


@pytest.mark.parametrize("decoder", [[decoders.WordPiece()], [decoders.Fuse()], [decoders.Metaspace()], []])
def test_a_decoder_that_is_not_known_is_refused(
    decoder: list[Any], spaced_vocabulary: dict[str, int]
) -> None:
    tokenizer = spaced(spaced_vocabulary, *decoder)
    with pytest.raises(LoadFailed, match=r"decoder \(.*\) is not supported; supported: ByteLevel"):
        TokenBytes(tokenizer)
