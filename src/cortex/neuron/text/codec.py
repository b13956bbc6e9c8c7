"""The text side of a model from its files: tokenizer, chat template, end tokens, sampling defaults.

Knows where a GGUF file and a model directory keep these facts. Knows no requests and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer

from cortex.hookspecs import Detokenizer, SamplingDefaults
from cortex.neuron.text.added import Declared
from cortex.neuron.text.detokenize import IncrementalDetokenizer, TokenBytes
from cortex.neuron.text.template import DEFAULT, ChatTemplate
from cortex.neuron.text.tokenizer import adds_bos, special_tokens, tokenizer_from_file, tokenizer_from_gguf
from cortex.neuron.text.vocabulary import END_TOKENS, special_id, vocabulary
from cortex.wire.errors import BadRequest, LoadFailed

NAMED_TEMPLATES: Final = "additional_chat_templates"
"""The folder in which transformers 5 keeps a directory's templates but the default one, each in a file."""
_ROLES: Final = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Template variable -> the name of its id in GGUF metadata."""
_END_ROLES: Final = ("eos", "eot", "eom")
"""Names of ids there that end a turn or a text."""


class TextCodec:
    """The Codec of a model whose text runs through `tokenizers`.

    Stop ids are the declared ends plus every special token whose text is one of END_TOKENS: files often
    declare only one of several. `bos` is the id that prompts must begin with, if any; it is added where
    the template has not put it there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        ends: frozenset[int],
        bos: int | None,
        defaults: SamplingDefaults,
    ) -> None:
        known = {id for text, id in special_tokens(tokenizer).items() if text in END_TOKENS}
        self._tokenizer = tokenizer
        self._template = template
        self._stop_ids = tuple(sorted(ends | known))
        self._bos = bos
        self._defaults = defaults
        self._bytes = TokenBytes(tokenizer)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    @property
    def defaults(self) -> SamplingDefaults:
        return self._defaults

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt for a conversation. Raises BadRequest with the template's own complaint."""
        return self._template.render(messages, **variables)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt; special tokens in the text count. Raises BadRequest for lone surrogates."""
        try:
            # Of a batch, because only then other threads of Python go on meanwhile; and without offsets.
            (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            raise BadRequest("The prompt holds a lone surrogate, which is no character.") from None
        ids: list[int] = found.ids
        if self._bos is None or ids[:1] == [self._bos] or self._begins_with_bos(text, ids):
            return ids
        return [self._bos, *ids]

    def _begins_with_bos(self, text: str, ids: Sequence[int]) -> bool:
        """Templates are laid out for people, and may leave space before it."""
        name = None if self._bos is None else self._tokenizer.id_to_token(self._bos)
        return name is not None and self._bos in ids and text.lstrip().startswith(name)

    def token_bytes(self, id: int) -> bytes:
        """What one id spells, a special token its name; b"" for an id that is no token."""
        return self._bytes(id) or (self._tokenizer.id_to_token(id) or "").encode()

    def detokenizer(self) -> Detokenizer:
        return IncrementalDetokenizer(self._bytes)


def codec_from_gguf(metadata: Mapping[str, Any], *, now: Callable[[], datetime] = datetime.now) -> TextCodec:
    """From a GGUF file's metadata. Raises LoadFailed for a tokenizer that is broken or not supported."""
    tokens, _ = vocabulary(metadata)

    roles = {*_ROLES.values(), *_END_ROLES}
    ids = {role: id for role in roles if (id := special_id(metadata, role, len(tokens))) is not None}
    texts = {name: tokens[ids[role]] for name, role in _ROLES.items() if role in ids}
    return TextCodec(
        tokenizer_from_gguf(metadata),
        ChatTemplate(_gguf_templates(metadata), special_tokens=texts, now=now),
        ends=frozenset(ids[role] for role in _END_ROLES if role in ids),
        bos=ids.get("bos") if adds_bos(metadata) else None,
        defaults=_defaults(metadata, "general.sampling.", temperature="temp", penalty="penalty_repeat"),
    )


def codec_from_directory(path: Path, *, now: Callable[[], datetime] = datetime.now) -> TextCodec:
    """From the files of a model directory in Hugging Face's layout.

    Reads tokenizer.json and what is declared beside it (see `added`), config.json, generation_config.json and
    the chat template (chat_template.jinja and what is named beside it, before chat_template.json, before
    tokenizer_config.json). Raises LoadFailed.
    """
    tokenizer = tokenizer_from_file(path / "tokenizer.json")
    config, settings, generation, names, ids = (
        _read_json(path / f"{name}.json")
        for name in (
            *("config", "tokenizer_config", "generation_config"),
            *("special_tokens_map", "added_tokens"),
        )
    )
    declared = Declared(path, settings, names, ids)
    declared.take_up(tokenizer)
    texts = declared.texts
    ends = {id for source in (config, config.get("text_config"), generation) for id in _end_ids(source)}
    eos = tokenizer.token_to_id(texts["eos_token"]) if "eos_token" in texts else None
    bos = tokenizer.token_to_id(texts["bos_token"]) if "bos_token" in texts else None
    return TextCodec(
        tokenizer,
        ChatTemplate(_directory_templates(path, settings), special_tokens=texts, now=now),
        ends=frozenset(ends if eos is None else ends | {eos}),
        bos=bos if settings.get("add_bos_token") is True else None,
        defaults=_defaults(generation, "", temperature="temperature", penalty="repetition_penalty"),
    )


def _defaults(found: Mapping[str, Any], prefix: str, *, temperature: str, penalty: str) -> SamplingDefaults:
    """Values that make no sense are left out: a recommendation is no reason to refuse a model."""

    def number(name: str) -> float | None:
        value = found.get(name)
        return value if isinstance(value, int | float) and abs(value) < 2**31 else None

    top_k, repetition = number(f"{prefix}top_k"), number(f"{prefix}{penalty}")
    return SamplingDefaults(
        temperature=number(f"{prefix}{temperature}"),
        top_k=None if top_k is None else int(top_k),
        top_p=number(f"{prefix}top_p"),
        min_p=number(f"{prefix}min_p"),
        repetition_penalty=repetition if repetition is not None and repetition > 0 else None,
    )


def _gguf_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    listed = metadata.get("tokenizer.chat_templates")
    names = (
        {name: f"{key}.{name}" for name in listed if isinstance(name, str)}
        if isinstance(listed, list)
        else {}
    )
    names[DEFAULT] = key
    return {name: source for name, key in names.items() if isinstance(source := metadata.get(key), str)}


def _directory_templates(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    jinja = path / "chat_template.jinja"
    named = {file.stem: file for file in sorted((path / NAMED_TEMPLATES).glob("*.jinja"))}
    files = {**named, DEFAULT: jinja} if jinja.is_file() else named
    if files:
        return {name: _read(file).decode("utf-8", "replace") for name, file in files.items()}
    found = _read_json(path / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    return dict(_named_templates(found)) if isinstance(found, list) else {}


def _named_templates(entries: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for entry in entries:
        match entry:
            case {"name": str(name), "template": str(source)}:
                yield name, source


def _end_ids(source: Any) -> list[int]:
    found = source.get("eos_token_id") if isinstance(source, dict) else None
    listed = found if isinstance(found, list) else [found]
    return [id for id in listed if type(id) is int and 0 <= id < 2**31]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} if the file is not there. Raises LoadFailed if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        value = msgspec.json.decode(_read(path))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LoadFailed(f"{path} is no valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise LoadFailed(f"{path} must hold a JSON object.")
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LoadFailed(f"{path} cannot be read: {error.strerror}.") from None
