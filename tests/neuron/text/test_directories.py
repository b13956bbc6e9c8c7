"""Tokenizers as real model directories have them, encoding and decoding as transformers does.

Every kind gets added tokens with every combination of flags, which decide how spaces, words and letters
around them are taken.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, trainers

from cortex.neuron.text.codec import codec_from_directory

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
FLAGGED = {
    f"<f{i}>": dict(zip(FLAGS, chosen, strict=True))
    for i, chosen in enumerate(itertools.product((False, True), repeat=len(FLAGS)))
}
SPECIAL = {f"<s{i}>": flags for i, flags in enumerate(FLAGGED.values()) if not flags["normalized"]}
MARKS: dict[str, dict[str, Any]] = {
    "a mark before every text": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
    },
    "a mark before the first text": {
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    },
    "no mark before": {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
    },
}
"""What tokenizer.json has of Llama 2 and the first Mistral, of Mistral 7B v0.3, and of Gemma."""
DECODER = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}

letters = st.sampled_from(
    [*" ▁.,ab\n", "  ", " " * 40, "the", "'s", "12", "é", "e\u0301", "\u212a", "日", "🙂", "<0x41>"]
)
whole = st.sampled_from(["<unk>", "<|im_end|>", *FLAGGED, *SPECIAL])


def marked(parts: dict[str, Any]) -> Tokenizer:
    """Of SentencePiece's kind, with bytes for what is no piece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = "the▁quick▁the▁dog ▁the ▁▁ ab ▁a ▁over▁▁there"
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", *bytes_], vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator([words] * 3, trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = plain["added_tokens"][:1]
    strip = [] if parts is MARKS["no mark before"] else [STRIP]
    plain["decoder"] = {"type": "Sequence", "decoders": [*DECODER, *strip]}
    return Tokenizer.from_str(json.dumps(plain | parts))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "llama-bpe", "tekken", "smollm", *MARKS])
def test_texts_are_encoded_and_decoded_as_transformers_does(
    kind: str, trained: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast  # takes a second, so only where it is needed

    tokenizer = marked(MARKS[kind]) if kind in MARKS else Tokenizer.from_str(trained(kind).to_str())
    tokenizer.add_tokens([AddedToken(text, **flags) for text, flags in FLAGGED.items()])
    tokenizer.add_special_tokens([AddedToken(text, **flags) for text, flags in SPECIAL.items()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    # In settings of old this stands; what it asks for would take spaces away that a model has written.
    settings = {"clean_up_tokenization_spaces": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    reference, codec = PreTrainedTokenizerFast.from_pretrained(tmp_path), codec_from_directory(tmp_path)

    @given(st.lists(letters | whole).map("".join))
    def check(text: str) -> None:
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert codec.encode(text) == ids
        streamed = codec.detokenizer()
        shown = "".join(streamed.feed([id]) for id in ids) + streamed.flush()
        assert shown == reference.decode(ids, skip_special_tokens=True)

    check()
