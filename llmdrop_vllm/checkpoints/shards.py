"""Safetensors files and their index, read by their headers."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from llmdrop_vllm.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
# Transformers' name for another set of weights in the same place: `from_pretrained(..., variant="dropped")`. Stripped
# weights are kept under it, so that a plain from_pretrained finds no weights instead of inventing the dropped ones.
VARIANT = "dropped"
VARIANT_INDEX_FILE = f"model.safetensors.index.{VARIANT}.json"

HEAD_BYTES = 4096


class ShardIndex(BaseModel):
    """model.safetensors.index.json: tensor name to the file that holds it."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are; `start` and `stop` are offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return self.stop - self.start

    def read_into(self, buffer: bytearray) -> None:
        """Fill a buffer of at most `num_bytes` with the tensor's first bytes, little endian as on disk."""
        with self.path.open("rb") as file:
            read_exactly(file, self.start, memoryview(buffer))

    def head(self) -> bytes:
        """Its first HEAD_BYTES, by which weights are told apart."""
        self.read_into(found := bytearray(min(HEAD_BYTES, self.num_bytes)))
        return bytes(found)

    def read_ahead(self) -> None:
        """Ask the system to have the bytes at hand soon; a hint that costs this process no memory."""
        if hasattr(os, "posix_fadvise"):
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), self.start, self.stop - self.start, os.POSIX_FADV_WILLNEED)


def read_exactly(file: BufferedReader, offset: int, buffer: memoryview) -> None:
    """Fill the buffer from this place in a file. Raises CheckpointError naming the file if it ends early."""
    file.seek(offset)
    if file.readinto(buffer) < len(buffer):
        raise CheckpointError(f"{file.name} ended early: it has been cut while it was read")


def index_files(directory: Path) -> tuple[Path, ...]:
    """The index that lists the directory's weights, if it has one."""
    paths = (directory / name for name in (INDEX_FILE, VARIANT_INDEX_FILE))
    return tuple(path for path in paths if path.is_file())[:1]


def read_index(directory: Path) -> tuple[str, dict[str, str]]:
    """(name of the index file, its weight map), empty where there is none."""
    for path in index_files(directory):
        try:
            weight_map = ShardIndex.model_validate_json(path.read_bytes()).weight_map
        except ValidationError as error:
            raise CheckpointError(f"{path} is not a safetensors index: {error}") from error
        for name, file in weight_map.items():
            # A model from elsewhere must not have files read that lie elsewhere; vLLM looks beside the index only.
            if Path(file).name != file:
                raise CheckpointError(f"{path} puts {name} in {file!r}; expected the name of a file beside it")
        return path.name, weight_map
    return INDEX_FILE, {}


def open_shard(path: Path) -> Any:
    """Open with the safetensors library, which checks the header against itself and the file's size."""
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: {error}") from error


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """A shard's tensors in the order of their bytes, which lie end to end behind the header."""
    shard = open_shard(path)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    for name in shard.offset_keys():
        tensor = shard.get_slice(name)
        dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
        stop = start + math.prod(shape) * dtype_bits(dtype) // 8
        yield StoredTensor(name, dtype, shape, path, start, stop)
        start = stop


def dtype_bits(dtype: str) -> int:
    """Of one number: the safetensors names say it (BF16, F8_E4M3), but for BOOL, which takes a byte."""
    return int((re.findall(r"\d+", dtype) or ["8"])[0])
