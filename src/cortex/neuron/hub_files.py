"""Which files of a Hugging Face repository make a model, and where its cache keeps them.

Only configuration, tokenizer and weights as data are ever wanted: no pickles, no code. Opens no connection.
Layout of the cache: huggingface_hub's guide "Understand caching".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

import msgspec

from cortex.wire.errors import BadRequest, UnknownModel
from cortex.wire.node import QUANT_FORMS

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
TOKENIZER: Final = "tokenizer.json"
BESIDE: Final = frozenset(
    {
        *("config.json", "generation_config.json", TOKENIZER, "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
        *("chat_template.json", "chat_template.jinja"),
    }
)
"""What comes with safetensors."""
_NAMED_TEMPLATE: Final = re.compile(r"additional_chat_templates/[^/]+\.jinja")
"""And what does where a model has several chat templates."""

_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_REPOSITORY: Final = re.compile(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9][A-Za-z0-9_./-]{{0,99}}))?")
SPLIT: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
"""How the name of one part of a split GGUF file ends: its number and how many there are."""
_QUANT: Final = re.compile(r"(ud-)?(i?q\d|tq\d|mxfp4|nvfp4|bf16|fp?16|fp?32)", re.IGNORECASE)
"""How the name of a quantisation begins."""
_SHARD: Final = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
_QUERY: Final = re.compile(r"(https?://[^\s'\"?]*)\?[^\s'\")>]*")
_IN_SNAPSHOT: Final = re.compile(r"/models--[^/]+/snapshots/[^/]+/(.+)$")


class Repository(msgspec.Struct, frozen=True):
    """`name` is org/name; `revision` a branch, tag or commit; `quant` chooses among GGUF files."""

    name: str
    revision: str = "main"
    quant: str | None = None


class Model(msgspec.Struct, frozen=True):
    """The files of a model; `path` is what to open below the snapshot's folder, "" for the folder itself."""

    files: tuple[str, ...]
    path: str


def parse_repository(text: str, quant: str | None) -> Repository:
    """Of `org/name` or `org/name@revision`. Raises BadRequest."""
    found = _REPOSITORY.fullmatch(text)
    if not found or ".." in text or "--" in found[1]:
        raise BadRequest(
            f"{text!r} names no repository: that is org/name or org/name@revision.", param="source"
        )
    return Repository(found[1], found[2] or "main", quant)


def choose(repository: Repository, names: Collection[str]) -> Model:
    """The model among the files of a repository: what `quant` names, else safetensors, else a lone GGUF.

    A quant that is a form, such as int8, names no file. Raises BadRequest where several would do or nothing
    is of the quant, UnknownModel where nothing can be loaded.
    """
    ggufs = [name for name in names if name.lower().endswith(".gguf") and "mmproj" not in name.lower()]
    shards = _safetensors(names)
    quant = repository.quant
    if quant is not None and quant.lower() not in QUANT_FORMS and (ggufs or shards):
        return _gguf(repository, _of(quant, ggufs, repository.name), shortest=True)
    if shards and "config.json" in names:
        beside = [name for name in names if name in BESIDE or _NAMED_TEMPLATE.fullmatch(name)]
        return Model((*sorted(beside), *shards), "")
    if ggufs:
        return _gguf(repository, ggufs, shortest=False)
    raise UnknownModel(
        f"{repository.name} holds no model that can be loaded: neither safetensors with a config.json "
        f"nor a .gguf file.",
        param="source",
    )


def _of(quant: str, ggufs: list[str], repository: str) -> list[str]:
    """The files that a quant names. One that is named in full is meant alone. Raises BadRequest."""
    if not ggufs:
        raise BadRequest(
            f"{repository} has no GGUF files, of which {quant!r} could choose one. Leave quant out, or say "
            f"with {' or '.join(QUANT_FORMS)} how its safetensors are to be held.",
            param="quant",
        )
    whole = _stem(quant)
    matching = [name for name in ggufs if _stem(name) == whole] or [
        name for name in ggufs if is_of(name, quant)
    ]
    if not matching:
        raise BadRequest(
            f"{repository} has no GGUF file {quant!r}; it has {_listing(ggufs)}. Name one, or what tells it "
            f"apart, as the load's `quant`.",
            param="quant",
        )
    return matching


def _safetensors(names: Collection[str]) -> list[str]:
    """As `weights.safetensors` reads a directory; of what its index names everything is fetched."""
    here = sorted(name for name in names if "/" not in name and name.endswith(".safetensors"))
    if SINGLE in names:
        return [SINGLE]
    if INDEX in names:
        return [INDEX, *(name for name in here if not name.startswith("consolidated"))]
    return here


def _gguf(repository: Repository, names: list[str], *, shortest: bool) -> Model:
    """One file or the parts of one; of several, `shortest` takes the one with nothing else in its name."""
    wholes: dict[str, list[str]] = {}
    for name in sorted(names):
        wholes.setdefault(SPLIT.sub("", name).removesuffix(".gguf"), []).append(name)
    by_length = sorted(wholes, key=len)
    if len(by_length) > 1 and (not shortest or len(by_length[0]) == len(by_length[1])):
        form = "" if shortest or repository.quant is None else " and the form as its `dtype`"
        raise BadRequest(
            f"{repository.name} holds several GGUF files; name one, or what tells it apart, as the load's "
            f"`quant`{form}: {_listing(names)}.",
            param="quant",
        )
    parts = wholes[by_length[0]]
    split = SPLIT.search(parts[0])
    if split and len(parts) != int(split[2]):
        raise UnknownModel(
            f"{repository.name} holds {len(parts)} of the {int(split[2])} parts of {by_length[0]}.",
            param="source",
        )
    return Model(tuple(parts), parts[0])


def is_of(name: str, quant: str) -> bool:
    """Whether a GGUF file of a repository is the one, a part of it, or of the quantisation, that a load
    names; case does not matter.
    """
    wanted, stem = _stem(quant), _stem(name)
    if wanted in (stem, Path(stem).name):
        return True
    parts = "-" + re.sub(r"[./]", "-", stem) + "-"
    before = "[-_]" if _QUANT.match(wanted) else "-"  # anything else could be the end of a quantisation
    forms = {re.escape(wanted), re.escape(wanted.replace("-", "_"))}
    return re.search(f"{before}(?:{'|'.join(sorted(forms))})-", parts) is not None


def _stem(name: str) -> str:
    return SPLIT.sub("", name.lower()).removesuffix(".gguf")


def name_of(path: Path) -> str:
    """What a file in the cache is called in its repository; of any other file its name."""
    found = _IN_SNAPSHOT.search(path.as_posix())
    return found[1] if found else path.name


def cached(repository: Repository, cache: Path) -> Path | None:
    """What to open of a model that the cache holds whole. None also where it holds several that would do:
    what the repository has can only be told with the hub.
    """
    folder = folder_of(repository, cache)
    try:
        commit = (folder / "refs" / repository.revision).read_text().strip()
    except OSError:
        commit = repository.revision
    snapshot = folder / "snapshots" / commit
    names = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    try:
        model = choose(repository, names)
    except (BadRequest, UnknownModel):
        return None
    if not model.path and not _is_whole(snapshot, model, names):
        return None
    return snapshot / model.path


def _is_whole(snapshot: Path, model: Model, names: set[str]) -> bool:
    """Whether a snapshot with safetensors holds all of them, and the tokenizer: other tools fetch parts."""
    if TOKENIZER not in names:
        return False
    if INDEX in model.files:
        return _indexed(snapshot / INDEX) <= names
    ends = [(name, found) for name in model.files if (found := _SHARD.search(name))]
    counts = Counter((name[: found.start()], int(found[1])) for name, found in ends)
    return all(there == count for (_, count), there in counts.items())


def folder_of(repository: Repository, cache: Path) -> Path:
    return cache / f"models--{repository.name.replace('/', '--')}"


def _indexed(index: Path) -> set[str]:
    """The shards that an index names; something that no snapshot holds if it cannot be read."""
    try:
        return set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
    except (OSError, msgspec.DecodeError):
        return {""}


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def without_queries(text: str) -> str:
    """A message with the queries cut off its URLs: those of a hub's storage are signed and open the file."""
    return _QUERY.sub(r"\1", text)


def _listing(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")
