"""The text side of a model from a GGUF file's metadata and from a model directory."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from cortex.hookspecs import SamplingDefaults
from cortex.neuron.text.codec import TextCodec, codec_from_directory, codec_from_gguf
from cortex.neuron.text.vocabulary import TokenType
from cortex.neuron.weights.gguf import read_header
from cortex.wire.errors import BadRequest, LoadFailed

Metadata = Callable[..., dict[str, Any]]
USER = {"role": "user", "content": "hi"}


def names(codec: TextCodec, metadata: dict[str, Any]) -> list[str]:
    return [metadata["tokenizer.ggml.tokens"][id] for id in codec.stop_ids]


# --- GGUF -----------------------------------------------------------------------------------------


def test_every_declared_end_and_every_well_known_one_stops(gguf_metadata: Metadata) -> None:
    metadata = gguf_metadata()
    assert set(names(codec_from_gguf(metadata), metadata)) == {"<|im_end|>", "<|endoftext|>"}
    metadata["tokenizer.ggml.eot_token_id"] = metadata["tokenizer.ggml.tokens"].index("a")
    assert set(names(codec_from_gguf(metadata), metadata)) == {"<|im_end|>", "<|endoftext|>", "a"}


@pytest.mark.parametrize("kind", [TokenType.NORMAL, TokenType.USER_DEFINED])
def test_an_end_that_a_gguf_file_has_for_text_is_a_control_token_all_the_same(
    kind: TokenType, gguf_metadata: Metadata
) -> None:
    """As in llama.cpp: it stops, is matched whole, and is not shown."""
    metadata = gguf_metadata()
    end = metadata["tokenizer.ggml.tokens"].index("<|endoftext|>")
    metadata["tokenizer.ggml.token_type"][end] = int(kind)
    codec = codec_from_gguf(metadata)
    assert end in codec.stop_ids
    assert codec.encode("<|endoftext|>") == [end]
    assert codec.detokenizer().feed([end]) == ""


def test_html_that_ends_texts_elsewhere_stays_text(gguf_metadata: Metadata) -> None:
    metadata = gguf_metadata()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    codec = codec_from_gguf(gguf_metadata(tokens=[*tokens, "</s>"], token_type=[*types, 1]))
    assert len(tokens) not in codec.stop_ids
    assert codec.detokenizer().feed([len(tokens)]) == "</s>"


@pytest.mark.parametrize("role", ["bos", "eos", "eot", "padding", "unknown"])
@pytest.mark.parametrize("id", [10**6, -1, 2**32 - 1])
def test_a_special_id_outside_the_vocabulary_is_none_and_told_of(
    role: str, id: int, gguf_metadata: Metadata, caplog: pytest.LogCaptureFixture
) -> None:
    codec = codec_from_gguf(gguf_metadata(**{f"{role}_token_id": id}))
    assert id not in codec.stop_ids
    assert codec.encode("ab")
    assert f"tokenizer.ggml.{role}_token_id is {id}" in caplog.text


@pytest.mark.parametrize("role", ["bos", "eos", "eot", "padding"])
def test_a_special_id_that_is_no_number_is_refused(role: str, gguf_metadata: Metadata) -> None:
    with pytest.raises(LoadFailed, match=f"tokenizer.ggml.{role}_token_id is '7'"):
        codec_from_gguf(gguf_metadata(**{f"{role}_token_id": "7"}))


@pytest.mark.parametrize(
    ("kind", "flag", "adds"),
    [
        ("qwen2", True, True),
        ("qwen2", False, False),
        ("qwen2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("tekken", None, True),
        ("qwen35", None, False),
    ],
)
def test_bos_is_added_where_the_model_demands_it_and_never_twice(
    kind: str, flag: bool | None, adds: bool, gguf_metadata: Metadata
) -> None:
    metadata = gguf_metadata(kind, add_bos_token=flag)
    codec = codec_from_gguf(metadata)
    bos = metadata["tokenizer.ggml.bos_token_id"]
    plain = metadata["tokenizer.ggml.tokens"].index("a")
    assert codec.encode("a") == ([bos, plain] if adds else [plain])
    assert codec.encode("<|im_start|>a") == [bos, plain]
    assert codec.encode("") == ([bos] if adds else [])


def test_templates_see_the_special_tokens(gguf_metadata: Metadata) -> None:
    metadata = gguf_metadata() | {
        "tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}"
    }
    assert codec_from_gguf(metadata).render([USER]) == "<|im_start|>|<|im_end|>|"


def test_named_templates_are_found(gguf_metadata: Metadata) -> None:
    metadata = gguf_metadata() | {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_templates": ["tool_use", "gone"],
        "tokenizer.chat_template.tool_use": "tools",
    }
    codec = codec_from_gguf(metadata)
    assert codec.render([USER]) == "plain"
    assert codec.render([USER], tools=[{"type": "function"}]) == "tools"


def test_without_a_template_only_chat_is_refused(gguf_metadata: Metadata) -> None:
    codec = codec_from_gguf(gguf_metadata())
    assert codec.encode("the")
    with pytest.raises(BadRequest, match="no chat template"):
        codec.render([USER])


def test_recommended_sampling_is_read(gguf_metadata: Metadata) -> None:
    assert codec_from_gguf(gguf_metadata()).defaults == SamplingDefaults()
    recommended = {"temp": 0.5, "top_k": 20, "top_p": "odd", "min_p": 0.05, "penalty_repeat": 1.1}
    metadata = gguf_metadata() | {f"general.sampling.{name}": value for name, value in recommended.items()}
    assert codec_from_gguf(metadata).defaults == SamplingDefaults(
        temperature=0.5, top_k=20, min_p=0.05, repetition_penalty=1.1
    )


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "odd"])
def test_a_recommended_penalty_that_makes_no_sense_is_ignored(value: Any, gguf_metadata: Metadata) -> None:
    metadata = gguf_metadata() | {"general.sampling.penalty_repeat": value}
    assert codec_from_gguf(metadata).defaults == SamplingDefaults()


def test_a_token_spells_its_bytes_and_a_special_one_its_name(gguf_metadata: Metadata) -> None:
    metadata = gguf_metadata()
    codec, tokens = codec_from_gguf(metadata), metadata["tokenizer.ggml.tokens"]
    assert b"".join(map(codec.token_bytes, codec.encode("Grüße 🙂!"))) == "Grüße 🙂!".encode()
    assert codec.token_bytes(tokens.index("<|im_end|>")) == b"<|im_end|>"
    assert codec.token_bytes(tokens.index("<tool_call>")) == b"<tool_call>"
    assert [codec.token_bytes(id) for id in (tokens.index("[PAD0]"), len(tokens), 10**9)] == [b"", b"", b""]


def test_a_lone_surrogate_is_a_bad_request(gguf_metadata: Metadata) -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        codec_from_gguf(gguf_metadata()).encode("a\ud800b")


@pytest.mark.slow
def test_others_go_on_while_a_long_text_is_encoded(gguf_metadata: Metadata) -> None:
    """Python would take a thread's turn away only after an hour: what goes on was let go on."""
    codec, begun, done = codec_from_gguf(gguf_metadata()), threading.Event(), []

    def encode() -> None:
        begun.set()
        codec.encode("the other one " * 100_000)
        done.append(True)

    thread = threading.Thread(target=encode)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    try:
        thread.start()
        begun.wait()
        went_on = not done
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert went_on


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "ends"),
    [("smollm2_path", {"<|endoftext|>", "<|im_end|>"}), ("qwen_coder_path", {"<|endoftext|>", "<|im_end|>"})],
)
def test_a_real_file_gives_a_codec(model: str, ends: set[str], request: pytest.FixtureRequest) -> None:
    metadata = read_header(request.getfixturevalue(model)).metadata
    codec = codec_from_gguf(metadata)
    assert set(names(codec, metadata)) == ends
    prompt = codec.render([USER], add_generation_prompt=True)
    ids = codec.encode(prompt)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert "".join(tokens[id] for id in ids).endswith("<|im_end|>Ċ<|im_start|>assistantĊ")
    spoken = codec.detokenizer()
    assert "".join(spoken.feed([id]) for id in codec.encode("Grüße 🙂!")) + spoken.flush() == "Grüße 🙂!"


LIES: list[Any] = [0, -1, 7, 2**63, 1.5, float("nan"), float("inf"), True, "", "x", "\0{{", [], ["x"], [[]]]
LIES += [[2**63] * 3, [None], ["{{ x"]]


def test_whatever_metadata_say_there_is_a_codec_or_a_refusal(gguf_metadata: Metadata) -> None:
    more = {"bos_token_id": 1, "eot_token_id": 2, "add_bos_token": True, "padding_token_id": 3}
    truth = gguf_metadata("gpt-2", **more) | {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.5,
    }
    refused = 0
    for key in truth:
        for lie in LIES:
            try:
                codec_from_gguf({**truth, key: lie}).encode("the")
            except LoadFailed as error:
                refused += 1
                assert "tokenizer" in error.message or "vocabulary" in error.message
    assert refused > 4 * len(LIES)


# --- directories ----------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path, trained: Callable[[str], Tokenizer]) -> Callable[..., Path]:
    """A model directory; keywords are JSON files by name, or text for a .jinja file."""

    def make(**files: Any) -> Path:
        trained("qwen2").save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            suffix = ".jinja" if name == "chat_template" and isinstance(content, str) else ".json"
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}{suffix}").write_text(text)
        return tmp_path

    return make


def id_of(token: str, path: Path) -> int:
    found = Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id(token)
    assert found is not None
    return found


def test_a_directory_with_only_a_tokenizer_is_enough(directory: Callable[..., Path]) -> None:
    path = directory()
    codec = codec_from_directory(path)
    assert set(codec.stop_ids) == {id_of("<|im_end|>", path), id_of("<|endoftext|>", path)}
    assert codec.encode("a<|im_end|>") == [id_of("a", path), id_of("<|im_end|>", path)]
    assert codec.defaults == SamplingDefaults()


def test_an_end_that_is_only_text_does_not_stop(directory: Callable[..., Path]) -> None:
    """A tokenizer.json says itself what is special; its model may write about any text."""
    path = directory()
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = token["content"] != "<|endoftext|>"
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert codec_from_directory(path).stop_ids == (id_of("<|im_end|>", path),)


def test_ends_come_from_every_file_that_names_some(directory: Callable[..., Path]) -> None:
    path = directory()
    a, b, c, d = (id_of(token, path) for token in "abcd")
    directory(
        config={"eos_token_id": a, "text_config": {"eos_token_id": [b]}},
        generation_config={
            "eos_token_id": [c, id_of("<|im_end|>", path)],
            "temperature": 0.6,
            "top_k": 50,
            "repetition_penalty": 1.05,
        },
        tokenizer_config={"eos_token": {"content": "d", "special": True}},
    )
    codec = codec_from_directory(path)
    assert set(codec.stop_ids) == {a, b, c, d, id_of("<|im_end|>", path), id_of("<|endoftext|>", path)}
    assert codec.defaults == SamplingDefaults(temperature=0.6, top_k=50, repetition_penalty=1.05)


def test_a_directory_adds_bos_only_where_it_says_so(directory: Callable[..., Path]) -> None:
    path = directory(tokenizer_config={"bos_token": "<|im_start|>"})
    assert codec_from_directory(path).encode("a") == [id_of("a", path)]
    directory(tokenizer_config={"bos_token": "<|im_start|>", "add_bos_token": True})
    expected = [id_of("<|im_start|>", path), id_of("a", path)]
    assert codec_from_directory(path).encode("a") == expected
    assert codec_from_directory(path).encode("<|im_start|>a") == expected


def test_space_that_a_template_writes_before_bos_does_not_double_it(directory: Callable[..., Path]) -> None:
    codec = codec_from_directory(
        directory(tokenizer_config={"bos_token": "<|im_start|>", "add_bos_token": True})
    )
    bos = codec.encode("")[0]
    assert codec.encode("\n <|im_start|>a").count(bos) == 1
    assert codec.encode("\n a")[0] == bos
    assert codec.encode("a<|im_start|>a").count(bos) == 2


def test_named_templates_may_be_files_of_their_own(directory: Callable[..., Path]) -> None:
    """As transformers 5 saves them."""
    path = directory(chat_template="plain")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    assert codec_from_directory(path).render([USER]) == "plain"
    assert codec_from_directory(path).render([USER], tools=[{}]) == "for tools"


def test_the_template_s_own_file_comes_first(directory: Callable[..., Path]) -> None:
    listed = [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "for tools"}, {}]
    path = directory(tokenizer_config={"chat_template": listed})
    assert codec_from_directory(path).render([USER]) == "listed"
    assert codec_from_directory(path).render([USER], tools=[{}]) == "for tools"
    directory(tokenizer_config={"chat_template": "in config {{ eos_token }}", "eos_token": "<|im_end|>"})
    assert codec_from_directory(path).render([USER]) == "in config <|im_end|>"
    directory(chat_template={"chat_template": "in json"})
    assert codec_from_directory(path).render([USER]) == "in json"
    directory(chat_template="in jinja")
    assert codec_from_directory(path).render([USER]) == "in jinja"


def test_whatever_files_say_beside_the_tokenizer_there_is_a_codec_or_a_refusal(
    directory: Callable[..., Path],
) -> None:
    files: dict[str, dict[str, Any]] = {
        "config": {"eos_token_id": 3, "text_config": {"eos_token_id": [2]}},
        "generation_config": {"eos_token_id": [1], "top_k": 3, "repetition_penalty": 1.5},
        "tokenizer_config": {
            "bos_token": {"content": "a"},
            "eos_token": "b",
            "add_bos_token": True,
            "chat_template": [{"name": "default", "template": "x"}],
            "added_tokens_decoder": {"500": {"content": "<x>"}},
            "extra_special_tokens": ["<y>"],
        },
        "special_tokens_map": {"eos_token": "<z>", "extra_special_tokens": {"own": "<y>"}},
        "added_tokens": {"<x>": 500},
    }
    lies = [lie for lie in LIES if lie == lie and lie not in (float("inf"), 7)]
    for name, content in files.items():
        for key in content:
            for lie in [*lies, {}, {"content": []}, [{"name": [], "template": 3}], 10**400, "\ud800"]:
                with contextlib.suppress(LoadFailed):
                    codec = codec_from_directory(directory(**{name: json.dumps({**content, key: lie})}))
                    assert all(0 <= id < 2**31 for id in codec.stop_ids)
        (directory() / f"{name}.json").unlink()


@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config"])
@pytest.mark.parametrize("content", ["{", "[]", "7"])
def test_a_broken_file_is_refused_with_its_path(
    name: str, content: str, directory: Callable[..., Path]
) -> None:
    path = directory(**{name: content})
    with pytest.raises(LoadFailed, match=rf"{name}\.json"):
        codec_from_directory(path)


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"tokenizer\.json is missing"):
        codec_from_directory(tmp_path)
