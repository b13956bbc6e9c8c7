"""Ids to text, incrementally: bytes per token, and a UTF-8 decoder that waits for whole characters.

Knows how tokenizers spell bytes (the byte-level alphabet; U+2581 for spaces, with byte fallback). Knows
no stop strings and no chat.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from tokenizers import Tokenizer

from cortex.wire.errors import LoadFailed

_SPACE: Final = "\u2581"
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[int, int]:
    """Code point -> byte of GPT-2's alphabet (encoder.py, bytes_to_unicode).

    Bytes that print in Latin-1 stand for themselves, the others follow from U+0100 in their order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {**{byte: byte for byte in printable}, **{0x100 + i: byte for i, byte in enumerate(hidden)}}


_ALPHABET: Final = _byte_alphabet()
_OUTSIDE: Final = re.compile("[^" + "".join(re.escape(chr(code)) for code in _ALPHABET) + "]")


def byte_level(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary spells; any other text is its own UTF-8."""
    if _OUTSIDE.search(token):
        return token.encode()
    return token.translate(_ALPHABET).encode("latin-1")


def spaced(token: str) -> bytes:
    """The bytes of a token that writes spaces as U+2581 and unknown bytes as `<0xE2>`."""
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


class TokenBytes:
    """What each id of a tokenizer adds to the text, in bytes; nothing for special and unknown ids.

    `leading_spaces` is how many spaces at the very start of a text are the tokenizer's own and are
    dropped. Raises LoadFailed for a decoder that is not supported.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token = tokenizer.id_to_token
        self._spell, self.leading_spaces = _spelling(tokenizer)
        # Added tokens are matched as plain text, so plain text is what they stand for; but vocabularies that
        # mark spaces may have runs of marks among them. Where one is matched in normalised text, the mark
        # that a normalizer puts before it is in its name, but not in its content.
        spell = str.encode if self._spell is byte_level else self._spell
        self._added = {
            id: b"" if token.special else spell(self._token(id) or token.content)
            for id, token in tokenizer.get_added_tokens_decoder().items()
        }

    def __call__(self, id: int) -> bytes:
        added = self._added.get(id)
        if added is not None:
            return added
        token = self._token(id)
        return b"" if token is None else self._spell(token)


class IncrementalDetokenizer:
    """The text of one sequence, as far as its characters are whole.

    All that `feed` gives, and `flush` at the end, joined, is the decoding of all ids at once, however
    they were split. Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = token_bytes.leading_spaces

    def feed(self, ids: Sequence[int]) -> str:
        return self._trim(self._decoder.decode(b"".join(map(self._bytes, ids))))

    def flush(self) -> str:
        return self._trim(self._decoder.decode(b"", final=True))

    def _trim(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
            else:
                self._strip -= 1
                text = text[1:]
        return text


def _spelling(tokenizer: Tokenizer) -> tuple[Callable[[str], bytes], int]:
    parts = list(_decoder_parts(tokenizer))
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"]:
        return byte_level, 0
    spaces = 0
    for part in parts:
        match part:
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                spaces = start
            case {"type": "Replace", "pattern": {"String": str(mark)}, "content": " "} if mark == _SPACE:
                pass
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                raise _unsupported(kinds)
    if "Replace" not in kinds:
        raise _unsupported(kinds)
    return spaced, spaces


def _unsupported(kinds: Sequence[Any]) -> LoadFailed:
    names = ", ".join(map(str, kinds)) or "none"
    return LoadFailed(
        f"The tokenizer's decoder ({names}) is not supported; supported: ByteLevel, "
        "and Replace of U+2581 with ByteFallback, Fuse and Strip."
    )


def _decoder_parts(tokenizer: Tokenizer) -> Iterator[Mapping[str, Any]]:
    decoder = tokenizer.decoder
    if decoder is None:
        return
    plain = json.loads(decoder.__getstate__())
    yield from plain["decoders"] if plain["type"] == "Sequence" else [plain]
