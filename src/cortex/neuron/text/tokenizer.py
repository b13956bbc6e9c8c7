"""Tokenizers: read from a tokenizer.json, or rebuilt from the vocabulary in a GGUF file's metadata.

Knows vocabularies and how text is cut before merging. Knows no chat template and does not decide
which tokens end a reply.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cortex.neuron.text.sentencepiece import MODEL, sentencepiece_from_gguf
from cortex.neuron.text.vocabulary import TokenType, add_whole, of_type, strings, vocabulary
from cortex.wire.errors import LoadFailed


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """How one family of byte-level BPE vocabularies treats text (`tokenizer.ggml.pre`)."""

    splits: tuple[str, ...]
    """Regular expressions that cut text one after the other, every match a piece of its own."""
    nfc: bool = False
    """Text is brought to Unicode's composed form first."""
    ignore_merges: bool = False
    """A piece that is in the vocabulary is taken whole, whatever the merges say."""
    add_bos: bool = False
    """Prompts begin with the BOS token unless the metadata say otherwise."""


# The expressions are those of the models' own tokenizer.json files; transformers 5.23 and llama.cpp
# (src/llama-vocab.cpp) use the same ones.
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT: Final = r"\p{N}"
_DEEPSEEK_CODER: Final = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", _DIGIT)

_PLAIN: Final = Kind(splits=(_GPT2,))
_LLAMA: Final = Kind(splits=(_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN: Final = Kind(splits=(_QWEN2,), nfc=True)

KINDS: Final[Mapping[str, Kind]] = {
    "default": _PLAIN,
    "gpt-2": _PLAIN,
    "gpt2": _PLAIN,
    "llama-bpe": _LLAMA,
    "llama-v3": _LLAMA,
    "llama3": _LLAMA,
    "falcon3": _LLAMA,
    "pixtral": _LLAMA,
    "qwen2": _QWEN,
    "megrez": _QWEN,
    "smaug-bpe": Kind(splits=(_LLAMA3,)),
    "dbrx": Kind(splits=(_LLAMA3,)),
    "deepseek-r1-qwen": _QWEN,
    "deepseek-coder": Kind(splits=_DEEPSEEK_CODER),
    "qwen35": Kind(splits=(_QWEN35,), nfc=True),
    "tekken": Kind(splits=(_TEKKEN,), ignore_merges=True, add_bos=True),
    "smollm": Kind(splits=(_DIGIT, _GPT2)),
}


def kind_of(metadata: Mapping[str, Any]) -> Kind:
    """The family of a GGUF file's byte-level vocabulary. Raises LoadFailed for one that is not supported."""
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise LoadFailed("The file holds no tokenizer (tokenizer.ggml.model is missing).")
    if model != "gpt2":
        raise LoadFailed(
            f"The tokenizer model {model!r} (tokenizer.ggml.model) is not supported; "
            f"'gpt2' and {MODEL!r} are."
        )
    name = metadata.get("tokenizer.ggml.pre", "default")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        known = ", ".join(sorted(KINDS))
        raise LoadFailed(
            f"The pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; supported are {known}."
        )
    return kind


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether prompts begin with the BOS token. Raises LoadFailed for a vocabulary that is not supported."""
    is_sentencepiece = metadata.get("tokenizer.ggml.model") == MODEL
    assumed = is_sentencepiece or kind_of(metadata).add_bos
    return bool(metadata.get("tokenizer.ggml.add_bos_token", assumed))


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Rebuild the tokenizer of a GGUF file from its metadata (`tokenizer.ggml.*`).

    Control and unknown tokens become special added tokens, user-defined ones plain added tokens. Unused ids
    (padding of the embedding) stay outside the vocabulary. Raises LoadFailed.
    """
    if metadata.get("tokenizer.ggml.model") == MODEL:
        return sentencepiece_from_gguf(metadata)
    kind = kind_of(metadata)
    tokens, types = vocabulary(metadata)
    merges = strings(metadata, "tokenizer.ggml.merges")
    unused = set(of_type(types, TokenType.UNUSED))
    vocab = {token: id for id, token in enumerate(tokens) if id not in unused}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        # Handed over as objects: through JSON it takes half as long again.
        model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=kind.ignore_merges)
    except Exception as error:  # the Rust side raises bare Exceptions
        raise LoadFailed(f"The file's vocabulary cannot be used: {error}.") from None
    tokenizer = Tokenizer(model)
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in kind.splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    add_whole(tokenizer, tokens, types)
    return tokenizer


def tokenizer_from_file(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises LoadFailed if it is missing or broken."""
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except FileNotFoundError:
        raise LoadFailed(f"{path} is missing; a model directory needs a tokenizer.json.") from None
    except OSError as error:
        raise LoadFailed(f"{path} cannot be read: {error.strerror}.") from None
    except Exception as error:  # the Rust side raises bare Exceptions
        raise LoadFailed(f"{path} is no tokenizer that can be used: {error}.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Text and id of the special tokens."""
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: id for id, token in added.items() if token.special}
