"""A small byte-level vocabulary, trained here, as GGUF metadata and as tokenizers knows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = (
    "the quick brown fox jumps over the lazy dog; it's 2024 and we've 1234567 of them, I'll say! "
    "def add(first, second):\n    return first + second  # 100 %\n\n"
    "\tnaïve café — “quoted” … ½ £20 日本語 🙂🙂 "
    "ÜBER über İstanbul don't DON'T 3.14159 \r\n"
) * 4
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<tool_call>", "  \n")
UNUSED = ("[PAD0]", "[PAD1]")

MODEL_JSON = {
    "gpt-2": (None, lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": (
        None,
        lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "llama-bpe": (
        None,
        lambda: cut_by(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    ),
    "deepseek-coder": (
        None,
        lambda: pre_tokenizers.Sequence(
            [
                *(
                    pre_tokenizers.Split(Regex(pattern), behavior="isolated")
                    for pattern in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+")
                ),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ),
    "qwen2": (
        normalizers.NFC,
        lambda: cut_by(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    ),
    "qwen35": (
        normalizers.NFC,
        lambda: cut_by(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    ),
    "tekken": (
        None,
        lambda: cut_by(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    ),
}
"""Normalizer and pre-tokenizer of each family as its models' tokenizer.json spells them."""
MODEL_JSON |= dict.fromkeys(("smaug-bpe", "dbrx", "falcon3", "pixtral"), MODEL_JSON["llama-bpe"])
MODEL_JSON["megrez"] = MODEL_JSON["qwen2"]


def cut_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train(kind: str) -> Tokenizer:
    """The reference: merges learnt with the family's own cutting, then its added tokens."""
    normalizer, cutter = MODEL_JSON[kind]
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    if normalizer is not None:
        tokenizer.normalizer = normalizer()
    tokenizer.pre_tokenizer = cutter()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in USER_DEFINED])
    return tokenizer


def metadata_of(tokenizer: Tokenizer, kind: str) -> dict[str, Any]:
    by_id = {id: token for token, id in tokenizer.get_vocab().items()}
    tokens = [by_id[id] for id in range(len(by_id))]
    types = [3 if token in CONTROL else 4 if token in USER_DEFINED else 1 for token in tokens]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": [*tokens, *UNUSED],
        "tokenizer.ggml.token_type": [*types, *(5 for _ in UNUSED)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.fixture(scope="session")
def trained() -> Callable[[str], Tokenizer]:
    """The reference tokenizer of a family, by the family's name."""
    made: dict[str, Tokenizer] = {}

    def get(kind: str) -> Tokenizer:
        if kind not in made:
            made[kind] = train(kind)
        return made[kind]

    return get


@pytest.fixture
def gguf_metadata(trained: Callable[[str], Tokenizer]) -> Callable[..., dict[str, Any]]:
    """The same vocabulary as a GGUF file holds it; keywords replace values, None removes a key."""

    def get(kind: str = "qwen2", **changes: Any) -> dict[str, Any]:
        metadata = metadata_of(trained(kind), kind)
        metadata.update({f"tokenizer.ggml.{name}": value for name, value in changes.items()})
        return {key: value for key, value in metadata.items() if value is not None}

    return get


@pytest.fixture(scope="session")
def transformers_tokenizer() -> Callable[[Path], Any]:
    """What transformers makes of a GGUF file's tokenizer and chat template, by the file's path."""
    made: dict[Path, Any] = {}

    def get(path: Path) -> Any:
        if path not in made:
            from transformers import PreTrainedTokenizerFast  # takes a second, so only where it is needed

            made[path] = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
        return made[path]

    return get
