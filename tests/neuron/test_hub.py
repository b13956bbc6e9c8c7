"""Models from a hub of our own on the loopback: downloads, what is kept of them, and every way to fail."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from cortex.neuron import hub as hub_module
from cortex.neuron import hub_process
from cortex.neuron.hub import HubCache
from cortex.neuron.hub_files import Repository, choose, is_of, name_of
from cortex.neuron.hub_process import Order
from cortex.wire.errors import BadRequest, CortexError, Forbidden, LoadFailed, UnknownModel
from cortex.wire.node import Progress

COMMIT = "c0ffee" * 6 + "abcd"
LARGE = bytes(range(256)) * 98304
"""24 MiB; huggingface_hub writes what it gets in runs of 10 MiB."""


class FakeHub(http.server.ThreadingHTTPServer):
    """One repository `org/name`, whose files tests put in; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.refusal: tuple[int, str] | None = None
        self.storage_refuses = False
        """It sends whoever wants a file to a signed URL, where it is not to be had."""
        self.silent = False
        """It takes every question and answers none, until the other side goes away."""
        self.lies: dict[str, str] = {}
        """Hashes that are published though the files have others."""
        self.stop_at: int | None = None
        """A file is sent so far and no further, until the other side goes away."""
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server
        hub.tokens.add(self.headers["Authorization"])
        path = self.path.partition("?")[0]
        if hub.silent:
            self.connection.recv(1)
            return
        if hub.refusal:
            self.send_response(hub.refusal[0])
            self.send_header("X-Error-Code", hub.refusal[1])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path.startswith("/api/models/org/name"):
            self._send(json.dumps(self._info()).encode())
            return
        found = re.fullmatch(rf"/org/name/resolve/{COMMIT}/(.+)", path)
        assert found, path
        hub.asked.append(found[1])
        if hub.storage_refuses:
            self.send_response(500 if "?" in self.path else 302)
            self.send_header("Location", f"{self.path}?X-Amz-Signature=secret&Expires=9")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(hub.files[found[1]])

    def _info(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.server.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git}
            if len(content) > 1000:
                sha256 = self.server.lies.get(name, hashlib.sha256(content).hexdigest())
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"id": "org/name", "sha": COMMIT, "siblings": siblings}

    def _send(self, content: bytes) -> None:
        wanted = self.headers["Range"]
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        start, size = int(first), len(content)
        content = content[: int(last) + 1] if last else content
        if wanted:
            self.server.ranges.append(wanted)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{size}")
        self.end_headers()
        stop = self.server.stop_at
        if stop is not None and len(content) > stop:
            self.wfile.write(content[start:stop])
            self.wfile.flush()
            self.connection.recv(1)
            return
        self.wfile.write(content[start:])


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def safetensors() -> dict[str, bytes]:
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    return {
        "config.json": b"{}",
        "tokenizer.json": b"{ }",
        "model.safetensors.index.json": json.dumps({"weight_map": shards}).encode(),
        "model-1.safetensors": b"1" * 2000,
        "model-2.safetensors": b"2" * 2000,
        "pytorch_model.bin": b"p" * 2000,
        "modeling_name.py": b"import os",
        "original/consolidated.safetensors": b"o" * 2000,
        "README.md": b"read me",
    }


def fetch(hub: FakeHub, cache: Path, quant: str | None = None, revision: str = "main") -> Path:
    """In this process, as the program does it."""
    order = Order(Repository("org/name", revision, quant), hub.endpoint, str(cache))
    return hub_process.fetch(order, lambda done, total: None)


def test_safetensors_come_with_what_belongs_to_them_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = safetensors()
    path = fetch(hub, tmp_path)
    wanted = {
        name for name in hub.files if not name.startswith(("pytorch", "modeling", "original", "README"))
    }
    assert set(hub.asked) == wanted
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {n: hub.files[n] for n in wanted}
    assert path == tmp_path / "models--org--name" / "snapshots" / COMMIT  # where their own tools look
    assert (tmp_path / "models--org--name" / "refs" / "main").read_text() == COMMIT
    hub.asked.clear()
    assert fetch(hub, tmp_path) == path
    assert hub.asked == []


def test_named_templates_come_too_and_one_file_goes_before_an_index() -> None:
    own = ["additional_chat_templates/tool_use.jinja", "config.json", "model.safetensors"]
    more = ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "other/tool_use.jinja"]
    assert choose(Repository("org/name"), [*own, *more]).files == tuple(own)


GGUFS = ("name-Q4_K_M.gguf", "name-Q8_0.gguf", "name-UD-Q4_K_M.gguf", "mmproj-name.gguf")


@pytest.mark.parametrize(
    ("quant", "file"),
    [
        ("q4_k_m", "name-Q4_K_M.gguf"),
        ("Q8-0", "name-Q8_0.gguf"),
        ("ud-q4_k_m", "name-UD-Q4_K_M.gguf"),
        ("NAME-q8_0.gguf", "name-Q8_0.gguf"),
    ],
)
def test_a_quant_chooses_the_file_whatever_its_case(
    hub: FakeHub, tmp_path: Path, quant: str, file: str
) -> None:
    hub.files = {name: name.encode() for name in GGUFS} | safetensors()
    path = fetch(hub, tmp_path, quant)
    assert path.name == file
    assert path.read_bytes() == file.encode()
    assert hub.asked == [file]


@pytest.mark.parametrize(
    ("files", "quant", "chosen"),
    [
        (("model_Q4_K_M.gguf", "model_Q8_0.gguf"), "q4_k_m", ["model_Q4_K_M.gguf"]),
        (("model_IQ4_XS.gguf", "model-xs.gguf"), "xs", ["model-xs.gguf"]),
        (("BF16/m.gguf", "F16/m.gguf"), "F16/m.gguf", ["F16/m.gguf"]),
        (("BF16/m.gguf", "F16/m.gguf"), "f16", ["F16/m.gguf"]),
        (("a-b.gguf", "a.b.gguf"), "A-b.gguf", ["a-b.gguf"]),
        (("m_fp16.gguf", "m_fp32.gguf"), "fp16", ["m_fp16.gguf"]),
        (
            ("q8/m-00001-of-00002.gguf", "q8/m-00002-of-00002.gguf", "q4/m.gguf"),
            "q8/m-00002-of-00002.gguf",
            ["q8/m-00001-of-00002.gguf", "q8/m-00002-of-00002.gguf"],
        ),
    ],
)
def test_a_quant_chooses_by_what_a_listing_says(
    files: tuple[str, ...], quant: str, chosen: list[str]
) -> None:
    model = choose(Repository("org/name", quant=quant), files)
    assert list(model.files) == chosen
    assert is_of(name_of(Path("/cache/models--org--name/snapshots", COMMIT, model.path)), quant)


def test_a_form_of_the_weights_chooses_no_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"name-Q8_0.gguf": b"g", "name-int8.gguf": b"i"} | safetensors()
    assert (fetch(hub, tmp_path, "INT8") / "config.json").is_file()
    assert not [name for name in hub.asked if name.endswith(".gguf")]
    hub.files = {"name-Q8_0.gguf": b"g"}
    assert fetch(hub, tmp_path, "int4").name == "name-Q8_0.gguf"


def test_parts_of_a_split_file_come_together(hub: FakeHub, tmp_path: Path) -> None:
    parts = [f"q8/name-Q8_0-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    hub.files = {name: name.encode() for name in (*parts, "name-Q4_0.gguf")}
    path = fetch(hub, tmp_path, "q8_0")
    assert path.relative_to(path.parents[1]).as_posix() == parts[0]
    assert hub.asked == parts


@pytest.mark.parametrize(
    ("files", "quant", "error", "said"),
    [
        (GGUFS, None, BadRequest, "several GGUF files; name one.*name-Q4_K_M.gguf"),
        (GGUFS, "q3_k_m", BadRequest, "no GGUF file 'q3_k_m'; it has name-Q4_K_M.gguf"),
        (GGUFS, "smallest", BadRequest, "no GGUF file 'smallest'; it has name-Q4_K_M.gguf"),
        (GGUFS, "int8", BadRequest, "several .* as the load's `quant` and the form as its `dtype`: name-Q4"),
        (("model.safetensors", "config.json"), "q4_k_m", BadRequest, "no GGUF files, of which 'q4_k_m'"),
        (("a-00001-of-00002.gguf",), None, UnknownModel, "1 of the 2 parts of a"),
        (("pytorch_model.bin", "config.json"), None, UnknownModel, "neither safetensors"),
        (("../x.gguf", "/etc/y.gguf"), None, UnknownModel, "neither safetensors"),
    ],
)
def test_a_repository_without_one_model_is_told_apart(
    hub: FakeHub,
    tmp_path: Path,
    files: tuple[str, ...],
    quant: str | None,
    error: type[CortexError],
    said: str,
) -> None:
    hub.files = dict.fromkeys(files, b"x")
    with pytest.raises(error, match=said):
        fetch(hub, tmp_path, quant)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("status", "code", "error", "said"),
    [
        (403, "GatedRepo", Forbidden, "org/name is gated: accept .* HF_TOKEN or with `hf auth login`"),
        (401, "RepoNotFound", UnknownModel, "no repository org/name, or it is private .* `hf auth login`"),
        (404, "RepoNotFound", UnknownModel, "no repository org/name"),
        (404, "RevisionNotFound", UnknownModel, "no revision 'main'"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub: FakeHub, tmp_path: Path, status: int, code: str, error: type[CortexError], said: str
) -> None:
    hub.refusal = (status, code)
    with pytest.raises(error, match=said):
        fetch(hub, tmp_path)


@pytest.mark.parametrize(("variable", "used"), [(None, "hf_stored"), ("hf_of_the_node", "hf_of_the_node")])
def test_a_token_that_a_login_stored_is_used_too(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, used: str
) -> None:
    (tmp_path / "token").write_text("hf_stored\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if variable:
        monkeypatch.setenv("HF_TOKEN", variable)
    hub.files = {"name.gguf": b"x"}
    fetch(hub, tmp_path)
    assert hub.tokens == {f"Bearer {used}"}


def test_a_signed_url_is_not_told(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"name.gguf": b"x"}
    hub.storage_refuses = True
    with pytest.raises(LoadFailed, match=r"500.*/resolve/\w+/name\.gguf") as refused:
        fetch(hub, tmp_path)
    assert "?" not in refused.value.message


def test_a_program_that_dies_tells_no_signed_url() -> None:
    complaint = "Trying again\nError: ('https://cdn.org/a?Signature=secret', 'http://c.org/?d#e') x?\n"
    with pytest.raises(LoadFailed, match=r"Error: \('https://cdn\.org/a', 'http://c\.org/'\) x\?\.$"):
        hub_module._outcome({}, complaint, Repository("org/name"))


def test_a_cached_model_needs_no_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = safetensors()
    path = fetch(hub, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.refusal = (500, "")
    assert fetch(hub, tmp_path) == path
    assert fetch(hub, tmp_path, revision=COMMIT) == path
    (path / "model-2.safetensors").unlink()
    with pytest.raises(LoadFailed, match="could not be fetched from the hub, and the cache does not hold it"):
        fetch(hub, tmp_path)


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("names", "is_whole"),
    [
        (GGUFS, False),
        (GGUFS[:1], True),
        (("config.json", "tokenizer.json", "model.safetensors"), True),
        (("config.json", "model.safetensors"), False),
        (("config.json", "tokenizer.json", *SHARDS), True),
        (("config.json", "tokenizer.json", SHARDS[1]), False),
        (("name-Q8_0-00002-of-00002.gguf",), False),
    ],
)
def test_without_the_hub_a_cached_model_must_be_whole_and_alone(
    hub: FakeHub, tmp_path: Path, names: tuple[str, ...], is_whole: bool
) -> None:
    """Whatever other tools have fetched of it."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in names:
        (snapshot / name).write_bytes(b"x")
    hub.refusal = (500, "")
    if is_whole:
        assert fetch(hub, tmp_path, revision=COMMIT).is_relative_to(snapshot)
        return
    with pytest.raises(LoadFailed, match="the cache does not hold it whole, or not it alone"):
        fetch(hub, tmp_path, revision=COMMIT)


def test_a_hub_that_says_nothing_is_given_up_for_the_cache(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = safetensors()
    path = fetch(hub, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    hub.silent = True
    assert fetch(hub, tmp_path) == path
    with pytest.raises(LoadFailed, match="could not be fetched from the hub, and the cache"):
        fetch(hub, tmp_path / "empty")


def test_a_file_with_another_hash_is_not_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"name.gguf": LARGE}
    hub.lies = {"name.gguf": "0" * 64}
    with pytest.raises(LoadFailed, match="does not have the hash that the hub publishes"):
        fetch(hub, tmp_path)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size]


def test_a_very_large_file_is_asked_for_in_ranges(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 5000)
    monkeypatch.setattr(hub_process, "RANGE_BYTES", 4096)
    hub.files = {"name.gguf": LARGE[:10000]}
    assert fetch(hub, tmp_path).read_bytes() == LARGE[:10000]
    assert hub.ranges == ["bytes=0-4095", "bytes=4096-8191", "bytes=8192-"]


def test_a_damaged_file_in_the_cache_is_fetched_anew(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = safetensors()
    shard = fetch(hub, tmp_path) / "model-2.safetensors"
    shard.resolve().write_bytes(b"2" * 500)
    hub.asked.clear()
    synced: list[int] = []
    monkeypatch.setattr(hub_process.os, "fsync", synced.append)
    assert fetch(hub, tmp_path) == shard.parent
    assert shard.read_bytes() == hub.files["model-2.safetensors"]
    assert hub.asked == ["model-2.safetensors"]
    assert len(synced) == 1


def test_a_full_disk_is_said_before_anything_is_fetched(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = {"name.gguf": LARGE}
    usage = hub_process.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hub_process.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(LoadFailed, match=r"needs 25,165,824 more bytes and 1,000 are free"):
        fetch(hub, tmp_path)
    assert hub.asked == []


@pytest.mark.slow
async def test_a_download_that_was_ended_goes_on_where_it_stopped(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With progress in bytes, and the token of the environment."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_node")
    hub.files = {"name.gguf": LARGE}
    hub.stop_at = 22 * 2**20
    cache = HubCache(endpoint=hub.endpoint, folder=tmp_path)
    told: list[Progress] = []
    halfway = asyncio.Event()

    def report(progress: Progress) -> None:
        told.append(progress)
        if progress.done >= 2**22:
            halfway.set()

    task = asyncio.create_task(cache.fetch(Repository("org/name"), report))
    await asyncio.wait_for(halfway.wait(), 15)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    hub.stop_at = None
    path = await cache.fetch(Repository("org/name"), report)
    assert path.read_bytes() == LARGE
    assert len(hub.ranges) == 1
    assert int(re.findall(r"\d+", hub.ranges[0])[0]) > 2**22
    assert {progress.total for progress in told} == {len(LARGE)}
    assert told[-1].done == len(LARGE)
    assert hub.tokens == {"Bearer hf_of_the_node"}


@pytest.mark.slow
async def test_a_hub_that_cannot_be_reached_is_a_failed_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoadFailed, match="org/name could not be fetched from the hub, and the cache"):
        await HubCache(endpoint="http://127.0.0.1:9", folder=tmp_path).fetch(
            Repository("org/name"), lambda progress: None
        )
