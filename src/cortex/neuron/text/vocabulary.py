"""The vocabulary in a GGUF file's metadata: tokens by id, what type each is of, which are matched whole.

Knows no model of merging and no text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer

from cortex.wire.errors import LoadFailed

_log: Final = logging.getLogger("cortex.neuron.text")

END_TOKENS: Final = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|endofturn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<end_of_turn>",
        "<EOT>",
        "<｜end▁of▁sentence｜>",
        "</s>",
    }
)
"""Texts that end a turn or a document in the vocabularies known to us."""
_NEVER_TEXT: Final = END_TOKENS - {"</s>"}
"""But for what is HTML, which Qwen's vocabularies have as an ordinary token."""


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as ggml numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def vocabulary(metadata: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[int]]:
    """Tokens and their types (a TokenType each), by id. Raises LoadFailed if they do not fit together.

    An end that a file has for ordinary text is a control token, as in llama.cpp: converters make such files,
    and their models would talk on behind their own end.
    """
    tokens = strings(metadata, "tokenizer.ggml.tokens")
    if not tokens:
        raise LoadFailed("The file's tokenizer is incomplete: tokenizer.ggml.tokens holds no token.")
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = [int(TokenType.NORMAL)] * len(tokens)
    if not isinstance(types, list) or not all(type(kind) is int for kind in types):
        raise LoadFailed(
            "The file's tokenizer is incomplete: tokenizer.ggml.token_type is no list of integers."
        )
    if len(types) != len(tokens):
        raise LoadFailed(f"The vocabulary has {len(tokens)} tokens but {len(types)} token types.")
    text = (TokenType.NORMAL, TokenType.USER_DEFINED)
    ends = {id for id, token in enumerate(tokens) if token in _NEVER_TEXT and types[id] in text}
    return tokens, [int(TokenType.CONTROL) if id in ends else type for id, type in enumerate(types)]


def strings(metadata: Mapping[str, Any], key: str) -> Sequence[str]:
    """Raises LoadFailed if there are none."""
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        state = "missing" if value is None else "no list of texts"
        raise LoadFailed(f"The file's tokenizer is incomplete: {key} is {state}.")
    found: Sequence[str] = value
    return found


def special_id(metadata: Mapping[str, Any], role: str, count: int) -> int | None:
    """The declared id of a special token among `count` tokens, if there is one. As in llama.cpp, one outside
    of them is none: converters write such for a token that a model does not have. Raises LoadFailed for what
    is no number.
    """
    key = f"tokenizer.ggml.{role}_token_id"
    id = metadata.get(key)
    if id is None:
        return None
    if type(id) is not int:
        raise LoadFailed(f"{key} is {id!r}, which is no id of a token.")
    if 0 <= id < count:
        return id
    _log.warning("%s is %d, which is no id of the %d tokens in the file: it has none", key, id, count)
    return None


def of_type(types: Sequence[int], wanted: TokenType) -> Iterator[int]:
    """The ids of one type."""
    return (id for id, type in enumerate(types) if type == wanted)


def add_whole(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Have control, unknown and user-defined tokens matched whole, as llama.cpp does; all but the last are
    special.
    """
    for wanted in (TokenType.CONTROL, TokenType.UNKNOWN):
        tokenizer.add_special_tokens(_added(tokens, types, wanted, special=True))
    tokenizer.add_tokens(_added(tokens, types, TokenType.USER_DEFINED, special=False))


def _added(
    tokens: Sequence[str], types: Sequence[int], wanted: TokenType, *, special: bool
) -> list[AddedToken]:
    texts = [tokens[id] for id in of_type(types, wanted) if tokens[id]]
    return [AddedToken(text, special=special, normalized=False) for text in texts]
