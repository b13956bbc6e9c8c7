"""Tokens that a model directory declares beside its tokenizer.json, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from cortex.neuron.text.codec import TextCodec, codec_from_directory
from cortex.wire.errors import LoadFailed

Directory = Callable[..., Path]

TEXT = "the <think>a</think> <|x|> b<tool_call> 's<|im_end|>"
USER = {"role": "user", "content": "hi"}
TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ sep_token }}|{{ image_token }}"


@pytest.fixture
def directory(tmp_path: Path, trained: Callable[[str], Tokenizer]) -> Directory:
    """A model directory; keywords are JSON files by name."""

    def make(**files: Any) -> Path:
        trained("qwen2").save(str(tmp_path / "tokenizer.json"))
        files = {"tokenizer_config": {}, **files}
        files["tokenizer_config"]["tokenizer_class"] = "PreTrainedTokenizerFast"
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
        return tmp_path

    return make


def entry(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    return {"content": content, **plain, **flags}


def decoded(codec: TextCodec, ids: list[int]) -> str:
    detokenizer = codec.detokenizer()
    return detokenizer.feed(ids) + detokenizer.flush()


NAMES = {
    "bos_token": "<|x|>",
    "eos_token": {"content": "<tool_call>", "lstrip": True, "normalized": False},
    "additional_special_tokens": ["<think>"],
}
DECLARED: dict[str, dict[str, Any]] = {
    "new tokens": {"added_tokens_decoder": {"1000": entry("<|x|>", special=True), "900": entry("<think>")}},
    "flags": {"added_tokens_decoder": {"0": entry("<tool_call>", special=True, rstrip=True)}},
    "spaces": {
        "added_tokens_decoder": {"0": entry("<think>", lstrip=True), "1": entry("<|x|>", rstrip=True)}
    },
    "whole words": {"added_tokens_decoder": {"0": entry("a", single_word=True), "1": entry("he")}},
    "a text's composed form": {"added_tokens_decoder": {"0": entry("K", normalized=True)}},
    "few members": {"added_tokens_decoder": {"0": {"content": "<think>"}}},
    "names": {"sep_token": "<think>", "image_token": "<|x|>", "pad_token": "<|endoftext|>"},
    "a named ordinary token": {"eos_token": "the"},
    "a named added token": {"eos_token": "<tool_call>"},
    "a name and a list": {"eos_token": "<think>", "added_tokens_decoder": {"0": entry("<think>")}},
    "an old notation": {"eos_token": {"__type": "AddedToken", **entry("<|x|>", lstrip=True)}},
    "unnamed ones": {"additional_special_tokens": ["<think>", "<|x|>", "<tool_call>"]},
    "two lists": {"extra_special_tokens": ["<think>"], "additional_special_tokens": ["<|x|>"]},
    "an empty list": {"extra_special_tokens": [], "additional_special_tokens": ["<|x|>"]},
    "a table of names": {"extra_special_tokens": {"image_token": "<|x|>"}},
    "new ids in order": {
        "pad_token": "<p>",
        "bos_token": "<b>",
        "own_token": "<o>",
        "additional_special_tokens": ["<a>"],
        "added_tokens_decoder": {"2": entry("<2>"), "10": entry("<10>")},
    },
    "nothing": {"eos_token": None, "bos_token": "", "additional_special_tokens": None, "model_max_length": 9},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", DECLARED.values(), ids=DECLARED)
def test_declared_tokens_are_those_of_transformers(settings: dict[str, Any], directory: Directory) -> None:
    check_as_transformers(directory(tokenizer_config=dict(settings)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({}, {"special_tokens_map": NAMES}),
        ({"eos_token": "<|endoftext|>"}, {"special_tokens_map": NAMES}),
        ({"eos_token": "<|endoftext|>", "added_tokens_decoder": {}}, {"special_tokens_map": NAMES}),
        ({"eos_token": "<|x|>"}, {"added_tokens": {"<|x|>": 900, "<think>": 899}}),
        ({"added_tokens_decoder": {}}, {"added_tokens": {"<|x|>": 900}}),
    ],
    ids=["a map", "a map over settings", "a map that does not count", "ids", "ids that do not count"],
)
def test_older_directories_keep_tokens_in_files_of_their_own(
    settings: dict[str, Any], files: dict[str, Any], directory: Directory
) -> None:
    check_as_transformers(directory(tokenizer_config=settings, **files))


def check_as_transformers(path: Path) -> None:
    from transformers import AutoTokenizer  # takes a second, so only where it is needed

    reference, codec = AutoTokenizer.from_pretrained(path), codec_from_directory(path)
    for text in (TEXT, "a he cafe\u0301 \u212ah", "<2><10><o><a><p><b>"):
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert codec.encode(text) == ids, reference.convert_ids_to_tokens(ids)
        assert decoded(codec, ids) == reference.decode(ids, skip_special_tokens=True)
    assert codec.render([USER]) == reference.apply_chat_template([USER], tokenize=False)
    if reference.eos_token_id is not None:
        assert reference.eos_token_id in codec.stop_ids


def test_what_is_declared_as_it_is_already_changes_nothing(
    directory: Directory, trained: Callable[[str], Tokenizer]
) -> None:
    known = trained("qwen2").get_added_tokens_decoder()
    listed = {id: entry(token.content, special=token.special) for id, token in known.items()}
    codec = codec_from_directory(directory(tokenizer_config={"added_tokens_decoder": listed}))
    for text in (TEXT, "<|im_start|>the<|im_end|>"):
        assert codec.encode(text) == trained("qwen2").encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer_config": {"added_tokens_decoder": []}}, r"tokenizer_config\.json: added_tokens_decoder"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": entry("y")}}}, "no table of tokens"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {"special": True}}}}, "`content`"),
        ({"added_tokens": {"x": "y"}}, r"added_tokens\.json is no table of tokens"),
        ({"added_tokens": []}, r"added_tokens\.json must hold a JSON object"),
        ({"special_tokens_map": 7}, r"special_tokens_map\.json must hold a JSON object"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_path(
    files: dict[str, Any], said: str, directory: Directory
) -> None:
    with pytest.raises(LoadFailed, match=said) as refusal:
        codec_from_directory(directory(**files))
    assert str(directory()) in refusal.value.message
