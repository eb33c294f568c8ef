"""Checkpoints on disk: config.json and safetensors shards, judged by their headers before any weight is read."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from llmdrop_vllm.architectures.families import EXPLICIT_PREFIX, family_of, no_row
from llmdrop_vllm.architectures.family import Family
from llmdrop_vllm.checkpoints.nemotron import plain
from llmdrop_vllm.checkpoints.shards import INDEX_FILE, VARIANT, StoredTensor, open_shard, read_index, stored_tensors
from llmdrop_vllm.checkpoints.sublayer_tensors import in_dropped_sublayer, missing_weights
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.masks.mask import DropMask

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length")  # Llama's, GPT-2's, ChatGLM's
# The same weights in other formats, next to the shards in many repositories; nothing here reads or copies them.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "consolidated*.safetensors")


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
            metadata[path] = dict(open_shard(path).metadata() or {})
            for tensor in stored_tensors(path):
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
        return names[0].removeprefix(EXPLICIT_PREFIX)

    @cached_property
    def family(self) -> Family:
        """The architecture's row in the family table."""
        family = family_of(self.architecture, self.plain_config)
        if family is None:
            raise CheckpointError(f"{self.directory}: {no_row(self.architecture)}")
        return family

    @cached_property
    def mask(self) -> DropMask:
        """What the config drops."""
        return DropMask.from_config(self.config)

    @property
    def context(self) -> int | None:
        """Tokens that the model takes at most; None where the config does not say."""
        return next((int(self.config[key]) for key in CONTEXT_KEYS if self.config.get(key)), None)

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
            tensor.read_into(head := bytearray(min(4096, tensor.num_bytes)))
            digest.update(head)
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
    index_file, index = read_index(directory)
    needed = {name: file for name, file in index.items() if not in_dropped_sublayer(name, family, mask)}
    for name, file in needed.items():
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory / file} is missing; {index_file} says that it holds {name}")
    files = sorted(set(index.values())) or sorted(path.name for path in directory.glob("*.safetensors"))
    found = {
        name for file in files if (directory / file).is_file() for name in open_shard(directory / file).offset_keys()
    }
    missing = ({*needed} - found) | missing_weights(found, family, mask)
    if missing:
        names = ", ".join(sorted(missing))
        raise CheckpointError(f"{directory} lacks weights of sublayers that the mask keeps: {names}")


def check_model_name(model: str | Path) -> None:
    """Raise CheckpointError for what is neither a directory nor looks like a hub id."""
    path = Path(model)
    if path.is_dir():
        return
    if isinstance(model, Path) or path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise CheckpointError(f"{model} is not a directory; expected a checkpoint directory or a hub id like org/name")


def _local_directory(model: str | Path) -> Path:
    check_model_name(model)
    directory = Path(model)
    if directory.is_dir():
        return directory
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
    index_file, index = read_index(directory)
    numbered = {path.name for path in directory.glob("model*-of-*.safetensors")}
    if listed := sorted(set(index.values())):
        for file in listed:
            if not (directory / file).is_file():
                raise CheckpointError(f"{directory / file} is missing; {index_file} lists it")
        if extra := sorted(numbered.difference(listed)):
            raise CheckpointError(f"{directory / extra[0]} is not listed in {index_file}")
        return [directory / file for file in listed], index
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
    raise CheckpointError(
        f"{directory} has no model.safetensors and no {INDEX_FILE}; weights in other formats (.bin, .gguf) are not read"
    )
