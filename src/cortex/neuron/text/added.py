"""The tokens that a model directory declares beside its tokenizer.json, taken up as transformers does.

They are in tokenizer_config.json, or in older directories in special_tokens_map.json and added_tokens.json.
Reads no file; knows no chat template and not which tokens end a reply.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import AddedToken, Tokenizer

from cortex.wire.errors import LoadFailed

_DECODER: Final = "added_tokens_decoder"
_EXTRA: Final = ("extra_special_tokens", "additional_special_tokens")
"""Special tokens in a list, of which the first counts that is not empty; the former may name them instead."""
_FIRST: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Where several names have new tokens, these get their ids first."""


class _Entry(msgspec.Struct, frozen=True):
    """A token as the files write it."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None
    special: bool = False

    def token(self) -> AddedToken:
        normalized = not self.special if self.normalized is None else self.normalized
        return AddedToken(
            self.content,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
            single_word=self.single_word,
            normalized=normalized,
            special=self.special,
        )


class Declared:
    """What the contents of files of the directory `path` say of tokens. Raises LoadFailed for other tables.

    Where `settings`, of tokenizer_config.json, have added tokens, what older directories keep elsewhere does
    not count; else `names`, of special_tokens_map.json, go before them, and `ids` are of added_tokens.json.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], names: Mapping[str, Any], ids: Mapping[str, Any]
    ) -> None:
        is_recent = _DECODER in settings
        said = settings if is_recent else {**settings, **names}
        self._named = dict(_named(said))
        self._extra = list(_unnamed(said))
        special = {entry.content for entry in (*self._named.values(), *self._extra)}
        try:
            if is_recent:
                by_id = msgspec.convert(settings[_DECODER], dict[int, _Entry], str_keys=True)
            else:
                by_text = msgspec.convert(ids, dict[str, int])
                by_id = {id: _Entry(text, special=text in special) for text, id in by_text.items()}
        except msgspec.ValidationError as error:
            where = (
                f"{path / 'tokenizer_config.json'}: {_DECODER}" if is_recent else path / "added_tokens.json"
            )
            raise LoadFailed(f"{where} is no table of tokens: {error}.") from None
        self._listed = [entry for _, entry in sorted(by_id.items())]

    @property
    def texts(self) -> dict[str, str]:
        """The special tokens' texts by name, such as `eos_token`."""
        return {name: entry.content for name, entry in self._named.items()}

    def take_up(self, tokenizer: Tokenizer) -> None:
        """Have the declared tokens matched whole, the named ones as special tokens.

        New ones get the next ids, as in transformers: the declared ids only order them.
        """
        known = tokenizer.get_added_tokens_decoder().values()
        own = {token.content: msgspec.convert(token, _Entry, from_attributes=True) for token in known}
        entries = own | {entry.content: entry for entry in self._listed}
        for entry in self._named.values():
            entries[entry.content] = msgspec.structs.replace(entries.get(entry.content, entry), special=True)
        for entry in self._extra:
            entries.setdefault(entry.content, msgspec.structs.replace(entry, special=True))
        tokenizer.add_tokens([entry.token() for text, entry in entries.items() if entry != own.get(text)])


def _named(said: Mapping[str, Any]) -> Iterator[tuple[str, _Entry]]:
    extra = said.get(_EXTRA[0])
    values = {name: said.get(name) for name in _FIRST}
    values |= {name: value for name, value in said.items() if name.endswith("_token")}
    values |= extra if isinstance(extra, dict) else {}
    for name, value in values.items():
        if (entry := _entry(value)) is not None:
            yield name, entry


def _unnamed(said: Mapping[str, Any]) -> Iterator[_Entry]:
    values = next((said[key] for key in _EXTRA if said.get(key)), None)
    for value in values if isinstance(values, list) else ():
        if (entry := _entry(value)) is not None:
            yield entry


def _entry(value: Any) -> _Entry | None:
    """None for what is no token: other settings have such names too."""
    try:
        entry = _Entry(value) if isinstance(value, str) else msgspec.convert(value, _Entry)
    except msgspec.ValidationError:
        return None
    return entry if entry.content else None
