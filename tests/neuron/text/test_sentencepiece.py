"""Tokenizers of SentencePiece's kind against its algorithm, and Gemma's against transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cortex.neuron.text.codec import codec_from_gguf
from cortex.neuron.text.tokenizer import tokenizer_from_gguf
from cortex.neuron.weights.gguf import read_header
from cortex.wire.errors import LoadFailed

SPECIAL = ["<unk>", "<s>", "</s>", "<mask>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [*"▁abcdé", "ab", "▁a", "bc", "abc", "▁ab", "cd", "▁abc", "dd", "▁▁", "bcd", "dddd"]
"""The best first, but for the letters."""


def metadata_of(**changes: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "model": "llama",
        "tokens": [*SPECIAL, "  ", *BYTES, *PIECES],
        "token_type": [2, 3, 3, 4, 4, *[6] * 256, *[1] * len(PIECES)],
        "scores": [0.0] * 5 + [0.0] * 256 + [-float(rank) for rank in range(len(PIECES))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def by_the_algorithm(text: str) -> list[str]:
    """SentencePiece's: of neighbours that make a piece, the best merge first, the leftmost of equals."""
    symbols = list(text.replace(" ", "▁"))
    while True:
        joined = ["".join(pair) for pair in itertools.pairwise(symbols)]
        known = [(PIECES.index(piece), at) for at, piece in enumerate(joined) if piece in PIECES]
        if not known:
            break
        _, at = min(known)
        symbols[at : at + 2] = [joined[at]]
    return [
        token
        for symbol in symbols
        for token in ([symbol] if symbol in PIECES else [f"<0x{byte:02X}>" for byte in symbol.encode()])
    ]


@given(st.text(alphabet="aabbccdd éx日"))
def test_pieces_merge_by_their_scores(text: str) -> None:
    """Without runs of spaces, which are matched whole."""
    text = " ".join(text.split())
    assert WITHOUT_PREFIX.encode(text).tokens == by_the_algorithm(text)
    assert WITH_PREFIX.encode(text).tokens == (by_the_algorithm(f" {text}") if text else [])


WITHOUT_PREFIX = tokenizer_from_gguf(metadata_of(add_space_prefix=False))
WITH_PREFIX = tokenizer_from_gguf(metadata_of())


def test_control_and_user_defined_tokens_are_matched_whole() -> None:
    assert WITHOUT_PREFIX.encode("ab<mask>a  b</s>").tokens == ["ab", "<mask>", "a", "  ", "b", "</s>"]


def test_the_unknown_token_is_matched_whole_and_not_shown() -> None:
    """As in llama.cpp, though its type is not that of control tokens."""
    assert WITHOUT_PREFIX.encode("ab<unk>a").tokens == ["ab", "<unk>", "a"]
    detokenizer = codec_from_gguf(metadata_of()).detokenizer()
    assert detokenizer.feed([0, *WITH_PREFIX.encode("ab").ids, 0]) == "ab"


def test_characters_that_neither_pieces_nor_bytes_spell_are_unknown() -> None:
    without_bytes = metadata_of(
        tokens=[*SPECIAL, *PIECES],
        token_type=[2, 3, 3, 4, *[1] * len(PIECES)],
        scores=[0.0] * 4 + [-float(rank) for rank in range(len(PIECES))],
    )
    assert tokenizer_from_gguf(without_bytes).encode("ab日本 xa").tokens == [
        "▁ab",
        "<unk>",
        "▁",
        "<unk>",
        "a",
    ]


@pytest.mark.slow
def test_texts_are_encoded_and_decoded_as_transformers_does(
    tmp_path: Path, transformers_tokenizer: Callable[[Path], Any]
) -> None:
    """Phi-3's, as for others it has no space before a text behind a whole token, unlike llama.cpp."""
    metadata = metadata_of()
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "phi3")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_scores(metadata["tokenizer.ggml.scores"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    reference, codec = transformers_tokenizer(path), codec_from_gguf(metadata)
    texts = ["", " ", "ab cd", "  a   b", "é x日🙂", "▁a", "<0x41>\n", "<s>ab", "a<s>"]
    texts += [f"ab{token}{text}" for token in SPECIAL for text in ("", "cd", " cd", token)]
    for text in texts:
        ids = reference(text)["input_ids"]
        assert codec.encode(text) == (ids[1:] if text.startswith("<s>") else ids), text
        detokenizer = codec.detokenizer()
        shown = detokenizer.feed(ids) + detokenizer.flush()
        assert shown == reference.decode(ids, skip_special_tokens=True)


@given(st.text(alphabet="abcd éx日🙂\n"))
def test_texts_come_back(text: str) -> None:
    codec = codec_from_gguf(metadata_of())
    ids = codec.encode(text)
    assert ids[0] == 1
    detokenizer = codec.detokenizer()
    assert detokenizer.feed(ids) + detokenizer.flush() == text


def test_no_bos_where_the_file_says_so() -> None:
    assert codec_from_gguf(metadata_of(add_bos_token=False, add_space_prefix=False)).encode("ab") != []
    assert 1 not in codec_from_gguf(metadata_of(add_bos_token=False)).encode("ab")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scores": None}, "scores are not one for each"),
        ({"scores": [0.0]}, "scores are not one for each"),
        ({"scores": ["a"] * (5 + 256 + len(PIECES))}, "scores are not one for each"),
        ({"unknown_token_id": "x"}, "unknown_token_id is 'x'"),
        ({"tokens": [], "scores": [], "token_type": []}, "no token"),
        ({"tokens": None}, "tokenizer.ggml.tokens"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(LoadFailed, match=said):
        tokenizer_from_gguf(metadata_of(**changes))


def test_an_unknown_token_outside_the_vocabulary_is_the_first_one() -> None:
    text = "a\U0001f984b"
    usual = tokenizer_from_gguf(metadata_of()).encode(text).ids
    assert tokenizer_from_gguf(metadata_of(unknown_token_id=2**32 - 1)).encode(text).ids == usual


@pytest.mark.real_model
@pytest.mark.long
@pytest.mark.slow
def test_gemma_encodes_as_transformers_does(
    gemma_path: Path, transformers_tokenizer: Callable[[Path], Any]
) -> None:
    reference: Tokenizer = transformers_tokenizer(gemma_path).backend_tokenizer
    tokenizer = tokenizer_from_gguf(read_header(gemma_path).metadata)
    # Where a text has the mark of spaces itself, transformers takes runs of it for runs of spaces.
    texts = [path.read_text().replace("▁", "") for path in sorted(Path(__file__).parent.glob("*.py"))]
    texts += ["", "Hello world", "  a   b\n\n\n c\t", "日本語🙂 naïve café", "<bos>x<end_of_turn>"]
    for text in texts:
        assert tokenizer.encode(text).ids == reference.encode(text, add_special_tokens=False).ids, text
