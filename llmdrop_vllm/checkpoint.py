"""Checkpoints on disk: whether the safetensors shards hold what a mask keeps, read from their headers alone."""

import re
from pathlib import Path

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from llmdrop_vllm.families import Family, Sublayer
from llmdrop_vllm.mask import DropMask

INDEX_FILE = "model.safetensors.index.json"
# A module has its weight under one of these names, quantized or not; scales and zero points it may have or not.
WEIGHT_NAMES = "weight|qweight|weight_packed"


class ShardIndex(BaseModel):
    """model.safetensors.index.json: tensor name to the file that holds it."""

    weight_map: dict[str, str]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or tensor."""


def check_complete(directory: Path, family: Family, mask: DropMask) -> None:
    """Raise CheckpointError for a damaged shard and for weights that the mask keeps and no shard holds.

    What the mask drops may be there or not, in the shards and in the index. A directory without safetensors passes.
    """
    index = _read_index(directory / INDEX_FILE)
    needed = {name: file for name, file in index.items() if not _is_dropped(name, family, mask)}
    for name, file in needed.items():
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory / file} is missing; {INDEX_FILE} says that it holds {name}")
    files = sorted(set(index.values())) or sorted(path.name for path in directory.glob("*.safetensors"))
    found = {name for file in files if (directory / file).is_file() for name in _names_in(directory / file)}
    missing = {*needed} - found
    for sublayer, dropped in ((family.attention, mask.attention), (family.mlp, mask.mlp)):
        missing |= _missing_modules(found, sublayer, set(range(mask.num_hidden_layers)).difference(dropped))
    if missing:
        names = ", ".join(sorted(missing))
        raise CheckpointError(f"{directory} lacks weights of sublayers that the mask keeps: {names}")


def _read_index(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        return ShardIndex.model_validate_json(path.read_bytes()).weight_map
    except ValidationError as error:
        raise CheckpointError(f"{path} is not a safetensors index: {error}") from error


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: {error}") from error


def _in_sublayer(sublayer: Sublayer) -> re.Pattern[str]:
    """Matches a tensor's name as (everything up to the layer index, the index, the rest)."""
    return re.compile(rf"^(.*?)(\d+)\.((?:{'|'.join(sublayer.names)})\..+)$")


def _is_dropped(name: str, family: Family, mask: DropMask) -> bool:
    for sublayer, dropped in ((family.attention, mask.attention), (family.mlp, mask.mlp)):
        if (match := _in_sublayer(sublayer).match(name)) and int(match[2]) in dropped:
            return True
    return False


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
