"""Tokenizers from GGUF metadata and from tokenizer.json, against tokenizers' and transformers' own."""

from __future__ import annotations

import gc
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from cortex.neuron.text.tokenizer import special_tokens, tokenizer_from_file, tokenizer_from_gguf
from cortex.neuron.weights.gguf import read_header
from cortex.wire.errors import LoadFailed

Metadata = Callable[..., dict[str, Any]]
Trained = Callable[[str], Tokenizer]

KINDS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "tekken", "deepseek-coder")
TEXTS = (
    "",
    "Hello world",
    "  leading and trailing  ",
    "def f(x):\n\treturn x**2  # ok\n\n\n",
    "naïve café — “quotes” … ½ ² Ⅷ ١٢٣ 12345 1,234.56  7",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "日本語のテキスト。中文，标点 한국어",
    "   \n \t\n  x\r\n\r\ny\r",
    "I'll we've DON'T it's 'S 'LL ſ K",
    "\u200b\ufeff\u00a0x\u3000y\x00\x7f",
    "<|im_start|>user\nhi<|im_end|>\n<tool_call>{}</tool_call>",
    "[PAD0] [PAD151700]",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𒀀 e\u0301 cafe\u0301",
)
pieces = st.sampled_from(
    [*"abz 019'\"\n\r\t.,;-_éßÜ½日🙂", "  ", "the", "<|im_end|>", "<tool_call>", "e\u0301"]
)
texts = st.one_of(st.text(), st.lists(pieces).map("".join))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_model_s_own_tokenizer(
    kind: str, gguf_metadata: Metadata, trained: Trained
) -> None:
    metadata, reference = gguf_metadata(kind), trained(kind)
    assert len(metadata["tokenizer.ggml.merges"]) > 100
    rebuilt = tokenizer_from_gguf(metadata)

    @given(texts)
    def check(text: str) -> None:
        expected = reference.encode(text, add_special_tokens=False)
        assert rebuilt.encode(text, add_special_tokens=False).ids == expected.ids

    check()
    for text in TEXTS:
        assert rebuilt.encode(text).ids == reference.encode(text).ids, text


def test_kinds_cut_digits_differently(gguf_metadata: Metadata) -> None:
    merges = ["1 2", "12 3", "123 4", "1234 5", "4 5"]
    tokens = [*"12345", *(merge.replace(" ", "") for merge in merges)]

    def digits(kind: str) -> list[str]:
        metadata = gguf_metadata(kind, tokens=tokens, merges=merges, token_type=None)
        return tokenizer_from_gguf(metadata).encode("12345").tokens

    assert digits("gpt-2") == ["12345"]
    for kind in ("llama-bpe", "smaug-bpe", "dbrx", "falcon3", "pixtral"):
        assert digits(kind) == ["123", "45"]
    for kind in ("qwen2", "megrez", "qwen35", "tekken", "smollm", "deepseek-coder"):
        assert digits(kind) == ["1", "2", "3", "4", "5"]


def test_kinds_cut_words_with_marks_and_capitals_differently(gguf_metadata: Metadata) -> None:
    """A mark that no letter takes in stays with its word in some; a capital begins a word in one."""

    def pieces(kind: str, text: str) -> list[str]:
        cutter = tokenizer_from_gguf(gguf_metadata(kind)).pre_tokenizer
        return [text[start:end] for _, (start, end) in cutter.pre_tokenize_str(text)]

    assert pieces("qwen35", "हिन्दी fooBar") == ["हिन्दी", " fooBar"]
    assert pieces("qwen2", "हिन्दी fooBar") == ["ह", "िन", "्द", "ी", " fooBar"]
    assert pieces("tekken", "हिन्दी fooBar") == ["हिन्दी", " foo", "Bar"]


def test_only_some_kinds_take_a_known_piece_whole(gguf_metadata: Metadata) -> None:
    def pieces(kind: str) -> list[str]:
        metadata = gguf_metadata(kind, tokens=[*"abc", "bc", "abc"], merges=["b c"], token_type=None)
        return tokenizer_from_gguf(metadata).encode("abc").tokens

    assert pieces("llama-bpe") == pieces("falcon3") == pieces("pixtral") == ["abc"]
    assert pieces("qwen2") == pieces("gpt-2") == pieces("smaug-bpe") == ["a", "bc"]


def test_a_file_that_names_no_kind_is_cut_as_gpt2(gguf_metadata: Metadata, trained: Trained) -> None:
    rebuilt = tokenizer_from_gguf(gguf_metadata("gpt-2", pre=None))
    assert rebuilt.encode(TEXTS[4]).ids == trained("gpt-2").encode(TEXTS[4]).ids


def test_control_and_user_defined_tokens_are_matched_whole(gguf_metadata: Metadata) -> None:
    metadata = gguf_metadata()
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("a<|im_end|>b<tool_call>c").tokens == ["a", "<|im_end|>", "b", "<tool_call>", "c"]
    tokens = metadata["tokenizer.ggml.tokens"]
    expected = {text: tokens.index(text) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    assert special_tokens(tokenizer) == expected


def test_ids_that_only_pad_the_embedding_are_no_text(gguf_metadata: Metadata) -> None:
    metadata = gguf_metadata("llama-bpe")
    tokenizer = tokenizer_from_gguf(metadata)
    padding = metadata["tokenizer.ggml.tokens"].index("[PAD1]")
    assert tokenizer.id_to_token(padding) is None
    assert padding not in tokenizer.encode("[PAD1]").ids


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "tekken-9"}, ["'tekken-9'", "tokenizer.ggml.pre", "llama-bpe", "qwen2", "smollm"]),
        ({"pre": 7}, ["7", "tokenizer.ggml.pre"]),
        ({"model": "t5"}, ["'t5'", "tokenizer.ggml.model", "'gpt2' and 'llama'"]),
        ({"model": None}, ["no tokenizer", "tokenizer.ggml.model"]),
        ({"tokens": None}, ["tokenizer.ggml.tokens", "missing"]),
        ({"tokens": [1, 2]}, ["tokenizer.ggml.tokens", "no list of texts"]),
        ({"merges": None}, ["tokenizer.ggml.merges", "missing"]),
        ({"merges": "a b"}, ["tokenizer.ggml.merges", "no list of texts"]),
        ({"merges": ["nosuch token"]}, ["vocabulary cannot be used", "nosuch"]),
        ({"merges": ["unsplit"]}, ["vocabulary cannot be used"]),
        ({"token_type": [1, 1]}, ["2 token types"]),
        ({"token_type": 3}, ["tokenizer.ggml.token_type", "no list of integers"]),
        ({"token_type": ["a"]}, ["tokenizer.ggml.token_type", "no list of integers"]),
        ({"merges": 7}, ["tokenizer.ggml.merges", "no list of texts"]),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused_by_name(
    changes: dict[str, Any], words: list[str], gguf_metadata: Metadata
) -> None:
    with pytest.raises(LoadFailed) as refusal:
        tokenizer_from_gguf(gguf_metadata(**changes))
    assert all(word in refusal.value.message for word in words), refusal.value.message


def test_a_tokenizer_json_is_read_without_its_truncation(tmp_path: Path, trained: Trained) -> None:
    reference = Tokenizer.from_str(trained("qwen2").to_str())
    reference.enable_truncation(4)
    reference.enable_padding(length=64)
    path = tmp_path / "tokenizer.json"
    reference.save(str(path))
    tokenizer = tokenizer_from_file(path)
    for text in TEXTS:
        assert tokenizer.encode(text).ids == trained("qwen2").encode(text).ids


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\x00", b"{}", b'{"model": {"type": "X"}}'])
def test_a_missing_or_broken_tokenizer_json_is_refused_with_its_path(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoadFailed, match=r"tokenizer\.json"):
        tokenizer_from_file(path)


# --- real vocabularies ----------------------------------------------------------------------------


def real_texts() -> list[str]:
    """What people send: this file and its neighbours, and the hard cases."""
    sources = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return [*TEXTS, *sources, *(text + "\n" + text.upper() for text in TEXTS)]


@pytest.mark.real_model
@pytest.mark.slow
def test_smollm2_encodes_as_transformers_does(
    smollm2_path: Path, transformers_tokenizer: Callable[[Path], Any]
) -> None:
    reference = Tokenizer.from_str(transformers_tokenizer(smollm2_path).backend_tokenizer.to_str())
    # transformers takes every such file for GPT-2; the model's tokenizer.json parts digits first.
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = tokenizer_from_gguf(read_header(smollm2_path).metadata)
    for text in real_texts():
        assert tokenizer.encode(text).ids == reference.encode(text, add_special_tokens=False).ids, text


@pytest.mark.real_model
@pytest.mark.slow
def test_qwen_coder_encodes_as_transformers_does(
    qwen_coder_path: Path, transformers_tokenizer: Callable[[Path], Any]
) -> None:
    reference = transformers_tokenizer(qwen_coder_path).backend_tokenizer
    tokenizer = tokenizer_from_gguf(read_header(qwen_coder_path).metadata)
    for text in real_texts():
        # transformers leaves out the normalizer that the model's tokenizer.json has.
        expected = reference.encode(unicodedata.normalize("NFC", text), add_special_tokens=False)
        assert tokenizer.encode(text).ids == expected.ids, text


@pytest.mark.real_model
@pytest.mark.slow
def test_a_large_vocabulary_loads_fast_and_gives_its_memory_back(qwen_coder_path: Path) -> None:
    metadata = read_header(qwen_coder_path).metadata
    process = psutil.Process()
    seconds, resident = [], []
    for _ in range(6):
        began = time.process_time()
        tokenizer = tokenizer_from_gguf(metadata)
        seconds.append(time.process_time() - began)
        del tokenizer
        gc.collect()
        resident.append(process.memory_info().rss)
    assert min(seconds) < 0.5
    assert resident[-1] - resident[1] < 16 * 2**20
