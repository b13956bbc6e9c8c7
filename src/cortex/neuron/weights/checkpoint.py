"""A checkpoint on disk, whatever its format: its tensors, its configuration, and its rows as bytes.

Files are mapped only for those who ask for all of a file's bytes. Knows no torch and no model.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

from cortex.neuron.weights import gguf, safetensors
from cortex.neuron.weights.files import OpenFile, cut_short, map_file, read_json
from cortex.neuron.weights.layout import TensorInfo, damaged
from cortex.neuron.weights.scaling import read_blocks, with_scales
from cortex.wire.errors import LoadFailed

CONFIG: Final = "config.json"
_PART: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
"""How the name of one part of a split GGUF file ends, as llama-gguf-split names them."""


class Checkpoint:
    """Tensors and configuration of a model. Close it, or use it as a context manager.

    `architecture` is as the file has it: GGUF's general.architecture or config.json's model_type.
    `config` is config.json or {}; `metadata` is GGUF's key-values or {}.
    """

    def __init__(
        self,
        kind: Literal["gguf", "safetensors"],
        path: Path,
        architecture: str,
        tensors: Mapping[str, TensorInfo],
        *,
        config: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.kind: Final = kind
        self.path: Final = path
        self.architecture: Final = architecture
        self.tensors: Final = tensors
        self.config: Final = config or {}
        self.metadata: Final = metadata or {}
        self._maps: dict[Path, mmap.mmap] = {}

    def rows(self, name: str, start: int, stop: int) -> bytes:
        """The stored bytes of rows [start, stop) of a tensor, few of them: a copy.

        Raises LoadFailed if the file has become shorter or cannot be read any more.
        """
        tensor = self.tensors[name]
        with OpenFile(tensor.file) as file:
            return file.read(tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)

    def data(self, file: Path) -> memoryview:
        """All bytes of one of the checkpoint's files, without a copy. Raises LoadFailed as `rows` does.

        The process that looks at them ends if the file is cut short afterwards.
        """
        return memoryview(self._map(file))

    def read_ahead(self, name: str, start: int, stop: int) -> None:
        """Have the system fetch rows [start, stop) of a tensor from the disk, without waiting for them.

        Raises LoadFailed as `rows` does.
        """
        tensor = self.tensors[name]
        begin = tensor.offset + start * tensor.row_bytes
        end = tensor.offset + stop * tensor.row_bytes
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._map(tensor.file).madvise(mmap.MADV_WILLNEED, page, end - page)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            mapped = map_file(file)
            if len(mapped) < max(t.offset + t.nbytes for t in self.tensors.values() if t.file == file):
                mapped.close()
                raise cut_short(file)
            self._maps[file] = mapped
        return self._maps[file]

    def close(self) -> None:
        """Unmaps the files; one that is still read from goes when its last reader does."""
        while self._maps:
            _, mapped = self._maps.popitem()
            try:
                mapped.close()
            except BufferError:
                del mapped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a `.gguf` file, or of a directory with config.json and *.safetensors.

    A split GGUF file is named by any of its parts.

    Raises LoadFailed: nothing there, neither format, a header that does not hold together, or weights that
    are quantised in a way that cannot be read.
    """
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise LoadFailed(f"{path} cannot be read: {error.strerror or error}.") from None
    if is_directory:
        config = read_json(path / CONFIG, dict[str, Any], "the configuration")
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            raise LoadFailed(f"{path / CONFIG} names no model_type.")
        blocks = read_blocks(config, path / CONFIG)
        tensors = with_scales(safetensors.read_directory(path), blocks)
        return Checkpoint("safetensors", path, model_type, tensors, config=config)
    if not is_file:
        raise LoadFailed(f"{path} does not exist; a .gguf file or a directory with safetensors is needed.")
    header, tensors = _parts(path)
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise damaged(path, "the metadata lacks general.architecture")
    return Checkpoint("gguf", path, architecture, tensors, metadata=header.metadata)


def _parts(path: Path) -> tuple[gguf.Header, dict[str, TensorInfo]]:
    """The header of a GGUF file and its tensors; of a split one the first header, and all parts' tensors."""
    header = gguf.read_header(path)
    count = header.metadata.get("split.count", 1)
    if count in (0, 1):
        return header, header.tensors
    ending = _PART.search(path.name)
    if not ending or int(ending[2]) != count:
        raise LoadFailed(
            f"{path} is one of {count} parts, and its name does not say so: the first of nine is called "
            f"name-00001-of-00009.gguf."
        )
    tensors: dict[str, TensorInfo] = {}
    headers = []
    for number in range(1, int(count) + 1):
        part = path.with_name(f"{path.name[: ending.start()]}-{number:05}-of-{ending[2]}.gguf")
        headers.append(gguf.read_header(part))
        if headers[-1].metadata.get("split.no") != number - 1:
            raise LoadFailed(f"{part} is not part {number} of {count}, as its name says.")
        for name, tensor in headers[-1].tensors.items():
            if name in tensors:
                raise LoadFailed(f"Tensor {name} is both in {tensors[name].file} and in {part}.")
            tensors[name] = tensor
    return headers[0], tensors
