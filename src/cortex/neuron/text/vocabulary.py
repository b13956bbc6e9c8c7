"""The vocabulary in a GGUF file's metadata: tokens by id, what type each is of, which are matched whole.

Knows no model of merging and no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Tokenizer

from cortex.wire.errors import LoadFailed


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as ggml numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def vocabulary(metadata: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[int]]:
    """Tokens and their types (a TokenType each), by id. Raises LoadFailed if they do not fit together."""
    tokens = strings(metadata, "tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = [int(TokenType.NORMAL)] * len(tokens)
    if not isinstance(types, list) or not all(type(kind) is int for kind in types):
        raise LoadFailed(
            "The file's tokenizer is incomplete: tokenizer.ggml.token_type is no list of integers."
        )
    if len(types) != len(tokens):
        raise LoadFailed(f"The vocabulary has {len(tokens)} tokens but {len(types)} token types.")
    return tokens, types


def strings(metadata: Mapping[str, Any], key: str) -> Sequence[str]:
    """Raises LoadFailed if there are none."""
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        state = "missing" if value is None else "no list of texts"
        raise LoadFailed(f"The file's tokenizer is incomplete: {key} is {state}.")
    found: Sequence[str] = value
    return found


def of_type(types: Sequence[int], wanted: TokenType) -> Iterator[int]:
    """The ids of one type."""
    return (id for id, type in enumerate(types) if type == wanted)


def add_whole(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Have control and user-defined tokens matched whole; the former become special."""
    tokenizer.add_special_tokens(_added(tokens, types, TokenType.CONTROL))
    tokenizer.add_tokens(_added(tokens, types, TokenType.USER_DEFINED))


def _added(tokens: Sequence[str], types: Sequence[int], wanted: TokenType) -> list[AddedToken]:
    special = wanted is TokenType.CONTROL
    texts = [tokens[id] for id in of_type(types, wanted) if tokens[id]]
    return [AddedToken(text, special=special, normalized=False) for text in texts]
