"""Checkpoints on disk: which tensors the safetensors shards hold, read from their headers alone."""

import re
from pathlib import Path

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from llmdrop_vllm.families import Family
from llmdrop_vllm.mask import DropMask

INDEX_FILE = "model.safetensors.index.json"


class ShardIndex(BaseModel):
    """model.safetensors.index.json: tensor name to the file that holds it."""

    weight_map: dict[str, str]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or tensor."""


def tensor_names(directory: Path) -> dict[str, str]:
    """Tensor name to the file that holds it, for every safetensors shard of a checkpoint.

    Only headers are read. Raises CheckpointError for a truncated shard, for one that the index names and the directory
    lacks, and for a tensor that is not where the index says. Empty where there are no safetensors at all.
    """
    index_path = directory / INDEX_FILE
    index: dict[str, str] = {}
    if index_path.is_file():
        try:
            index = ShardIndex.model_validate_json(index_path.read_bytes()).weight_map
        except ValidationError as error:
            raise CheckpointError(f"{index_path} is not a safetensors index: {error}") from error
    files = sorted(set(index.values())) or sorted(path.name for path in directory.glob("model*.safetensors"))
    found = {name: file for file in files for name in _names_in(directory / file)}
    for name, file in index.items():
        if found.get(name) != file:
            raise CheckpointError(f"{index_path} says that {name} is in {file}; it is in {found.get(name, 'no shard')}")
    return found


def _names_in(path: Path) -> list[str]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {INDEX_FILE} names it")
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: {error}") from error


def missing_tensors(names: set[str], family: Family, mask: DropMask) -> list[str]:
    """Tensors that a kept sublayer lacks and another layer's sublayer of the same kind has.

    Layers may differ in kind (dense and mixture-of-experts MLPs in one model), so only a layer whose tensors are a part
    of another's counts as incomplete.
    """
    missing = []
    for sublayer, dropped in ((family.attention, mask.attention), (family.mlp, mask.mlp)):
        tensors: dict[int, set[str]] = {layer: set() for layer in range(mask.num_hidden_layers)}
        pattern = re.compile(rf"^(.*?)(\d+)\.((?:{'|'.join(sublayer.names)})\..+)$")
        prefix = ""
        for name in names:
            if (match := pattern.match(name)) and int(match[2]) in tensors:
                prefix = match[1]
                tensors[int(match[2])].add(match[3])
        for layer in set(tensors).difference(dropped):
            whole = max(
                (other for other in tensors.values() if tensors[layer] < other), key=len, default=tensors[layer]
            )
            missing += [f"{prefix}{layer}.{suffix}" for suffix in sorted(whole - tensors[layer])]
    return missing
