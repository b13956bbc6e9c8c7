"""Fetches a model from a Hugging Face hub into its cache: a program of its own, for `hub` to run and to end.

Prints one JSON object a line: `done` and `total` bytes, in the end `path`, or `error` and `message`. What is
fetched of a file is kept when it is cut short and checked when it is whole. Knows nothing of the node.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from huggingface_hub import HfApi, constants, errors, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # loaded lazily

from cortex.neuron.hub_files import Repository, cached, choose, folder_of, without_queries
from cortex.wire.errors import CortexError, Forbidden, LoadFailed, UnknownModel

TOLD_BYTES: Final = 2**20
"""Bytes between two reports of a download."""
RANGE_BYTES: Final = 2**35
"""The most to ask for at once: of files over 50 GB the hub's storage gives only ranges, and `http_get`
refuses to begin."""
_CHUNK: Final = 2**20


class Order(msgspec.Struct):
    """What to fetch. Without endpoint and cache the environment says (HF_ENDPOINT, HF_HUB_CACHE, HF_HOME)."""

    repository: Repository
    endpoint: str | None = None
    cache: str | None = None


class File(msgspec.Struct):
    """A file of the repository at a commit. `blob`, its name in the cache, is its sha256 or git's hash."""

    name: str
    size: int
    blob: str


Tell = Callable[[int, int], None]


def fetch(order: Order, tell: Tell) -> Path:
    """What to open of the model, from the hub or, where that cannot be asked, from the cache.

    Raises CortexError.
    """
    cache = Path(order.cache or constants.HF_HUB_CACHE)
    try:
        commit, files, path = _look(order)
    except CortexError:
        raise
    except Exception as error:  # which library speaks HTTP depends on the release of huggingface_hub
        found = cached(order.repository, cache)
        if found is None:
            then = "and the cache does not hold it whole, or not it alone"
            raise _refusal(error, order.repository, then) from None
        return found
    try:
        folder = folder_of(order.repository, cache)
        _fetch_all(order, commit, files, folder / "blobs", tell)
        for file in files:
            _link(folder, commit, file)
        reference = folder / "refs" / order.repository.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
        return folder / "snapshots" / commit / path
    except CortexError:
        raise
    except Exception as error:
        raise _refusal(error, order.repository, "load again to go on where this one stopped") from None


def _look(order: Order) -> tuple[str, list[File], str]:
    """The commit, the files of the model and what to open."""
    wanted = order.repository
    api = HfApi(endpoint=order.endpoint)
    patience = constants.HF_HUB_ETAG_TIMEOUT  # without one, a hub that says nothing is waited for for ever
    info = api.model_info(wanted.name, revision=wanted.revision, files_metadata=True, timeout=patience)
    found = {}
    for sibling in info.siblings or ():
        blob = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if blob and blob.isalnum() and sibling.size is not None and _is_plain(sibling.rfilename):
            found[sibling.rfilename] = File(sibling.rfilename, sibling.size, blob)
    model = choose(wanted, found)
    if not str(info.sha).isalnum():
        raise LoadFailed(f"The hub names no commit of {wanted.name}.")
    return str(info.sha), [found[name] for name in model.files], model.path


def _is_plain(name: str) -> bool:
    """Whether it can only be a file below the snapshot, whatever hub says it."""
    return all(part not in ("", ".", "..") for part in name.split("/")) and "\0" not in name


def _fetch_all(order: Order, commit: str, files: list[File], blobs: Path, tell: Tell) -> None:
    blobs.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if not _is_whole(blobs, file)]
    total = sum(file.size for file in files)
    done = total - sum(file.size for file in missing)
    needed = sum(file.size - _size(_part(blobs, file)) for file in missing)
    free = shutil.disk_usage(blobs).free
    if needed > free:
        raise LoadFailed(
            f"The disk of {blobs} is full: the model needs {needed:,} more bytes and {free:,} are free."
        )
    tell(done, total)
    for file in missing:
        with _alone(_part(blobs, file)) as part:
            if not _is_whole(blobs, file):
                (blobs / file.blob).unlink(missing_ok=True)
                _download(order, commit, file, part, functools.partial(_tell_more, tell, done, total))
                part.rename(blobs / file.blob)
        done += file.size
        tell(done, total)


def _is_whole(blobs: Path, file: File) -> bool:
    """Whether the cache holds it. A power cut, or a tool of others, may have left it shorter."""
    blob = blobs / file.blob
    return blob.is_file() and blob.stat().st_size == file.size


def _tell_more(tell: Tell, done: int, total: int, size: int) -> None:
    tell(done + size, total)


def _download(order: Order, commit: str, file: File, part: Path, tell: Callable[[int], None]) -> None:
    """The rest of a file after what `part` holds of it."""
    if _size(part) > file.size:
        part.unlink()
    url = hf_hub_url(order.repository.name, file.name, revision=commit, endpoint=order.endpoint)
    with _Told(part, tell) as out:
        while (start := out.tell()) < file.size:
            stop = min(file.size, (start // RANGE_BYTES + 1) * RANGE_BYTES)
            headers = build_hf_headers()
            if stop < file.size:
                headers["Range"] = f"bytes=0-{stop - 1}"  # http_get moves its start to what is there
            http_get(url, out, resume_size=start, headers=headers, expected_size=stop)
        out.flush()
        os.fsync(out.fileno())  # its final name is a promise that it is whole
    if _digest(part, file) != file.blob:
        part.unlink()
        raise LoadFailed(
            f"{file.name} of {order.repository.name} does not have the hash that the hub publishes; "
            f"load again to fetch it anew."
        )


class _Told(io.BufferedWriter):
    """Appends to a file and tells its size now and then."""

    def __init__(self, path: Path, tell: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._tell = tell
        self._told = self.tell()

    def write(self, data: Any) -> int:
        written = super().write(data)
        size = self.tell()
        if size - self._told >= TOLD_BYTES:
            self._told = size
            self._tell(size)
        return written


def _digest(path: Path, file: File) -> str:
    """sha256 of large files, git's hash of a blob of the others."""
    is_sha256 = len(file.blob) == 64
    digest = hashlib.sha256() if is_sha256 else hashlib.sha1(f"blob {file.size}\0".encode())
    with path.open("rb") as content:
        while block := content.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _link(folder: Path, commit: str, file: File) -> None:
    """Give a blob its name in the snapshot of a commit."""
    name = folder / "snapshots" / commit / file.name
    name.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        name.symlink_to(os.path.relpath(folder / "blobs" / file.blob, name.parent))


def _part(blobs: Path, file: File) -> Path:
    return blobs / f"{file.blob}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[Path]:
    """Hold a file's download against others of it, of this node or another."""
    lock = part.with_suffix(".lock")
    with lock.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield part
    lock.unlink(missing_ok=True)


def _refusal(error: Exception, repository: Repository, then: str) -> CortexError:
    name = repository.name
    if isinstance(error, errors.GatedRepoError):
        return Forbidden(
            f"{name} is gated: accept its terms on its page on the hub, and give the node a token of that "
            f"account, as HF_TOKEN or with `hf auth login`.",
            param="source",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UnknownModel(
            f"The hub has no repository {name}, or it is private and the node's token (HF_TOKEN, or else "
            f"that of `hf auth login`) may not read it.",
            param="source",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UnknownModel(f"{name} has no revision {repository.revision!r}.", param="source")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LoadFailed(f"The disk of the Hugging Face cache is full; make room and load {name} again.")
    said = without_queries(str(error).strip().partition("\n")[0]) or type(error).__name__
    return LoadFailed(f"{name} could not be fetched from the hub, {then} ({said}).")


def main() -> None:
    order = msgspec.json.decode(sys.argv[1], type=Order)
    try:
        said = {"path": str(fetch(order, lambda done, total: _say({"done": done, "total": total})))}
    except CortexError as error:
        said = {"error": type(error).__name__, "message": error.message, "param": error.param or ""}
    _say(said)


def _say(event: dict[str, Any]) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
