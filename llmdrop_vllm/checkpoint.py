"""Checkpoints on disk: config.json and safetensors shards, judged by their headers before any weight is read."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.families import BY_ARCHITECTURE, Family, Sublayer, family_of
from llmdrop_vllm.mask import DropMask
from llmdrop_vllm.nemotron import plain

INDEX_FILE = "model.safetensors.index.json"
# Transformers' name for another set of weights in the same place: `from_pretrained(..., variant="dropped")`. Stripped
# weights are kept under it, so that a plain from_pretrained finds no weights instead of inventing the dropped ones.
VARIANT = "dropped"
VARIANT_INDEX_FILE = f"model.safetensors.index.{VARIANT}.json"
# The same weights in other formats, next to the shards in many repositories; nothing here reads or copies them.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "consolidated*.safetensors")
# A module has its weight under one of these names, quantized or not; scales and zero points it may have or not.
WEIGHT_NAMES = "weight|qweight|weight_packed"


class ShardIndex(BaseModel):
    """model.safetensors.index.json: tensor name to the file that holds it."""

    weight_map: dict[str, str]


class TensorHeader(BaseModel):
    """One tensor's entry in a shard's header; `data_offsets` are bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


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

    def read(self) -> bytearray:
        """The tensor's bytes, little endian as on disk."""
        buffer = bytearray(self.num_bytes)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            view, done = memoryview(buffer), 0
            while done < len(buffer):
                done += file.readinto(view[done:]) or _raise_truncated(self.path)
        return buffer

    def read_ahead(self) -> None:
        """Ask the system to have the bytes at hand soon; a hint that costs this process no memory."""
        if hasattr(os, "posix_fadvise"):
            with self.path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), self.start, self.num_bytes, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True)
class Checkpoint:
    """A directory with config.json and safetensors whose index, shards and headers agree."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[Path, Mapping[str, str]]

    @classmethod
    def open(cls, model: str | Path) -> Self:
        """Open a local directory, or a hub repository's files after downloading them.

        Raises CheckpointError for anything that is missing, damaged or contradictory.
        """
        directory = _local_directory(model)
        config = read_config(directory)
        paths, index = _shards(directory)
        tensors: dict[str, StoredTensor] = {}
        metadata = {}
        for path in paths:
            metadata[path] = dict(_open_shard(path).metadata() or {})
            for tensor in _stored_tensors(path):
                if (first := tensors.get(tensor.name)) is not None:
                    raise CheckpointError(f"{tensor.name} is in {first.path.name} and again in {path.name}")
                tensors[tensor.name] = tensor
        checkpoint = cls(directory, MappingProxyType(config), MappingProxyType(tensors), metadata)
        checkpoint._check_index(index)
        return checkpoint

    @cached_property
    def plain_config(self) -> Mapping[str, Any]:
        """The config under the model's own architecture, where it was renamed for the dialect nemotron-nas."""
        return MappingProxyType(plain(self.config))

    @property
    def architecture(self) -> str:
        """The config's architecture name, without our prefix for dropped models."""
        names = self.plain_config.get("architectures")
        if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
            raise CheckpointError(f"{self.directory}/config.json has architectures {names!r}; expected one name")
        return names[0].removeprefix("Dropped")

    @property
    def family(self) -> Family:
        """The architecture's row in the family table."""
        family = family_of(self.architecture)
        if family is None:
            known = ", ".join(sorted(BY_ARCHITECTURE))
            raise CheckpointError(f"{self.architecture} has no row in the family table; supported: {known}")
        return family

    @property
    def mask(self) -> DropMask:
        """What the config drops."""
        return DropMask.from_config(self.config)

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are stored in a quantized form, and tensors differ from the architecture's."""
        return bool(self.config.get("quantization_config") or self.config.get("compression_config"))

    @property
    def is_stripped(self) -> bool:
        """Whether the weights of sublayers that the mask drops are gone."""
        return bool(self.mask) and not any(in_dropped_sublayer(name, self.family, self.mask) for name in self.tensors)

    @cached_property
    def fingerprint(self) -> str:
        """Which weights these are: a hash of every tensor's name, dtype, shape and first 4 KiB."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            with tensor.path.open("rb", buffering=0) as file:
                file.seek(tensor.start)
                digest.update(file.read(min(4096, tensor.num_bytes)))
        return digest.hexdigest()[:16]

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, file in index.items():
            tensor = self.tensors.get(name)
            if tensor is None:
                # A stripped checkpoint whose index still lists what is gone says nothing wrong about what is there.
                if not in_dropped_sublayer(name, self.family, self.mask):
                    raise CheckpointError(f"{self.directory}: the index puts {name} in {file}, which does not hold it")
            elif tensor.path.name != file:
                raise CheckpointError(f"{name} is in {tensor.path}; the index puts it in {file}")
        if index and (unlisted := sorted({*self.tensors} - {*index})):
            tensor = self.tensors[unlisted[0]]
            raise CheckpointError(
                f"{tensor.path} holds {tensor.name}, which the index does not list ({len(unlisted)} such tensors)"
            )


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it is on disk. Raises CheckpointError where there is none."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no config.json; expected a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds {type(config).__name__}; expected an object")
    return config


def check_complete(directory: Path, family: Family, mask: DropMask) -> None:
    """Raise CheckpointError for a damaged shard and for weights that the mask keeps and no shard holds.

    What the mask drops may be there or not, in the shards and in the index. A directory without safetensors passes.
    """
    index_file, index = _read_index(directory)
    needed = {name: file for name, file in index.items() if not in_dropped_sublayer(name, family, mask)}
    for name, file in needed.items():
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory / file} is missing; {index_file} says that it holds {name}")
    files = sorted(set(index.values())) or sorted(path.name for path in directory.glob("*.safetensors"))
    found = {
        name for file in files if (directory / file).is_file() for name in _open_shard(directory / file).offset_keys()
    }
    missing = ({*needed} - found) | missing_weights(found, family, mask)
    if missing:
        names = ", ".join(sorted(missing))
        raise CheckpointError(f"{directory} lacks weights of sublayers that the mask keeps: {names}")


def in_dropped_sublayer(name: str, family: Family, mask: DropMask) -> bool:
    """Whether a tensor belongs to a sublayer that the mask drops."""
    return any(
        (match := _in_sublayer(sublayer).match(name)) and int(match[2]) in dropped
        for sublayer, dropped in family.sublayers(mask)
    )


def missing_weights(names: Iterable[str], family: Family, mask: DropMask) -> set[str]:
    """Weights of kept sublayers that are not among these tensor names, judged by what the other layers have."""
    layers = set(range(mask.num_hidden_layers))
    names = set(names)
    missing = (
        _missing_modules(names, sublayer, layers.difference(dropped)) for sublayer, dropped in family.sublayers(mask)
    )
    return set().union(*missing)


def _local_directory(model: str | Path) -> Path:
    directory = Path(model)
    if directory.is_dir():
        return directory
    if isinstance(model, Path) or directory.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise CheckpointError(f"{model} is not a directory; expected a checkpoint directory or a hub id like org/name")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(model, ignore_patterns=[*OTHER_WEIGHTS, "original/*"])
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{model} is neither a directory nor a hub repository that can be read: {error}"
        ) from None
    return Path(found)


def _shards(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and what the index says is in them; without an index, every safetensors file of its kind."""
    index_file, index = _read_index(directory)
    numbered = {path.name for path in directory.glob("model*-of-*.safetensors")}
    if index:
        for file in sorted(set(index.values())):
            if not (directory / file).is_file():
                raise CheckpointError(f"{directory / file} is missing; {index_file} lists it")
        if extra := sorted(numbered - set(index.values())):
            raise CheckpointError(f"{directory / extra[0]} is not listed in {index_file}")
        return [directory / file for file in sorted(set(index.values()))], index
    if numbered:
        raise CheckpointError(f"{directory} has shards like {min(numbered)} and no {INDEX_FILE}")
    for name in ("model.safetensors", f"model.{VARIANT}.safetensors"):
        if (directory / name).is_file():
            return [directory / name], {}
    others = [path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern)]
    if others:
        raise CheckpointError(
            f"{directory} has its weights as {min(others)}; only safetensors are read, for pickle files can run code. "
            f'Convert: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}', dtype='auto').save_pretrained('{directory}-safetensors')\""
        )
    raise CheckpointError(f"{directory} has no model.safetensors and no {INDEX_FILE}")


def _read_index(directory: Path) -> tuple[str, dict[str, str]]:
    """(name of the index file, its weight map), empty where there is none."""
    for name in (INDEX_FILE, VARIANT_INDEX_FILE):
        path = directory / name
        if path.is_file():
            try:
                return name, ShardIndex.model_validate_json(path.read_bytes()).weight_map
            except ValidationError as error:
                raise CheckpointError(f"{path} is not a safetensors index: {error}") from error
    return INDEX_FILE, {}


def _open_shard(path: Path) -> Any:
    """Open with the safetensors library, which checks the header against itself and the file's size."""
    try:
        return safe_open(path, framework="numpy").__enter__()  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: {error}") from error


def _stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """A shard's tensors in the order of their bytes; the library has checked the header, but does not tell offsets."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    entries = {name: TensorHeader.model_validate(entry) for name, entry in header.items()}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = (8 + header_bytes + offset for offset in entry.data_offsets)
        yield StoredTensor(name, entry.dtype, entry.shape, path, start, stop)


def _raise_truncated(path: Path) -> int:
    raise CheckpointError(f"{path} ended early: it has been cut while it was read")


def _in_sublayer(sublayer: Sublayer) -> re.Pattern[str]:
    """Matches a tensor's name as (everything up to the layer index, the index, the rest)."""
    return re.compile(rf"^(.*?)(\d+)\.((?:{'|'.join(sublayer.names)})\..+)$")


def _missing_modules(names: set[str], sublayer: Sublayer, kept: set[int]) -> set[str]:
    """Weights that one kept layer's sublayer lacks and another layer's sublayer of the same kind has.

    Layers may differ in kind (dense and mixture-of-experts MLPs in one model), so only a layer whose modules are a part
    of another's counts as incomplete.
    """
    modules: dict[int, set[str]] = {layer: set() for layer in kept}
    pattern, weight, prefix = _in_sublayer(sublayer), re.compile(rf"^(.+)\.(?:{WEIGHT_NAMES})$"), ""
    for name in names:
        if (match := pattern.match(name)) and (module := weight.match(match[3])):
            prefix = match[1]
            modules.setdefault(int(match[2]), set()).add(module[1])
    missing = set()
    for layer in kept:
        whole = max((its for its in modules.values() if modules[layer] < its), key=len, default=modules[layer])
        missing |= {f"{prefix}{layer}.{module}.weight" for module in whole - modules[layer]}
    return missing
