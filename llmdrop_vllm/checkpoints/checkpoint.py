"""Checkpoints on disk: config.json and safetensors shards, judged by their headers before any weight is read."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from llmdrop_vllm.architectures.families import no_row
from llmdrop_vllm.architectures.family import Family
from llmdrop_vllm.architectures.names import layer_in
from llmdrop_vllm.checkpoints.any_model import as_base
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.checkpoints.directory import ADAPTER, local_directory, read_config, weight_files
from llmdrop_vllm.checkpoints.nemotron import plain
from llmdrop_vllm.checkpoints.shards import StoredTensor, open_shard, read_index, stored_tensors
from llmdrop_vllm.checkpoints.sublayer_tensors import in_dropped_sublayer, missing_weights
from llmdrop_vllm.checkpoints.tower import tower_of
from llmdrop_vllm.errors import CheckpointError, listed
from llmdrop_vllm.kv_cache.kinds import DTYPE_BYTES
from llmdrop_vllm.kv_cache.layout import KVLayout
from llmdrop_vllm.masks.dialects import Windows
from llmdrop_vllm.masks.mask import DropMask, ranges

# Draft heads that are published beside the model, in a file that its index may not list.
DRAFT_HEADS = "*mtp*.safetensors"
# Where vLLM looks for how the weights are stored; ModelOpt before 0.31 says it in a file beside the config.
QUANTIZED_KEYS, QUANTIZED_FILE = ("quantization_config", "compression_config"), "hf_quant_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A directory with config.json and safetensors whose index, shards and headers agree.

    `config` is config.json as it is; `decoder` and `family` are what it says of the layers. `remarks` are for the user
    to read: what is odd about the files, and does no harm.
    """

    directory: Path
    config: Mapping[str, Any]
    decoder: Decoder
    family: Family
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[Path, Mapping[str, str]]
    remarks: tuple[str, ...] = ()

    @classmethod
    def open(cls, model: str | Path) -> Self:
        """Open a local directory, or a hub repository's files after downloading them.

        Raises CheckpointError for anything that is missing, damaged or contradictory, MaskError for a mask that cannot
        be read.
        """
        directory = local_directory(model)
        config = read_config(directory)
        paths, index = weight_files(directory)
        tensors, metadata = _read(paths)
        remarks = _unlisted(tensors, index)
        for path in sorted({*directory.glob(DRAFT_HEADS)} - {*paths}):
            head, its_metadata = _read([path])
            if not head.keys() & tensors.keys():
                remarks.append(f"{path.name} comes along, though no index lists it")
                tensors, metadata = tensors | head, metadata | its_metadata
        # Under the model's own architecture, where it was renamed for the dialect nemotron-nas.
        entries = plain(as_base(config))
        names = entries.get("architectures")
        if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
            raise CheckpointError(f"{directory}/config.json has architectures {names!r}; expected one name")
        decoder = Decoder.of(MappingProxyType(entries), names[0])
        if decoder.family is None:
            raise CheckpointError(f"{directory}: {no_row(tower_of(entries, names[0])[0] or names[0])}")
        _check_layers(directory, tensors, decoder.family, decoder.mask)
        whole, found = MappingProxyType(config), MappingProxyType(tensors)
        checkpoint = cls(directory, whole, decoder, decoder.family, found, metadata, tuple(remarks))
        checkpoint._check_index(index)
        return checkpoint

    @property
    def architecture(self) -> str:
        """The config's architecture name, without our prefix for dropped models."""
        return self.decoder.architecture

    @property
    def mask(self) -> DropMask:
        """What the config drops."""
        return self.decoder.mask

    def seeing(self, windows: Windows) -> Self:
        """As though its config had these windows, if any. Raises MaskError where attention is dropped or takes none."""
        mask = self.mask.seeing(windows)
        self.decoder.check(mask)
        return replace(self, decoder=replace(self.decoder, mask=mask)) if windows else self

    @property
    def context(self) -> int | None:
        """Tokens that the model takes at most; None where the config does not say."""
        return self.decoder.context

    @property
    def dtype(self) -> str:
        """Of the weights, as the config names it; bfloat16 where it names none that a KV cache can have."""
        said = (config.get(key) for config in (self.config, self.decoder.config) for key in ("dtype", "torch_dtype"))
        name = str(next(filter(None, said), "bfloat16"))
        return name if name in DTYPE_BYTES else "bfloat16"

    @property
    def kv_dtype(self) -> str:
        """Of keys and values as vLLM stores them by itself: the weights', unless a quantizer left scales for FP8."""
        scheme = self.quantization.get("kv_cache_scheme")
        return "fp8" if isinstance(scheme, Mapping) and scheme.get("num_bits") == 8 else self.dtype

    @property
    def quantization(self) -> Mapping[str, Any]:
        """What the config says of how the weights are stored; empty where it says nothing."""
        said = (entries.get(key) for entries in (self.config, self.decoder.config) for key in QUANTIZED_KEYS)
        return next((each for each in said if isinstance(each, Mapping) and each), {})

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are stored in a quantized form, and tensors differ from the architecture's."""
        return bool(self.quantization) or (self.directory / QUANTIZED_FILE).is_file()

    @property
    def is_stripped(self) -> bool:
        """Whether the weights of sublayers that the mask drops are gone."""
        return any(self.mask.dropped) and self.under(self.mask).loses_nothing

    @cached_property
    def is_whole(self) -> bool:
        """Whether there are weights of every sublayer."""
        layers = tuple(range(self.mask.num_hidden_layers))
        # Where all sublayers of a kind are gone, no other layer shows what is missing.
        kinds = (DropMask(len(layers), attention=layers), DropMask(len(layers), mlp=layers))
        return not any(MaskedCheckpoint(self, each).loses_nothing for each in kinds) and not (
            self.under(self.decoder.whole).missing
        )

    @cached_property
    def fingerprint(self) -> str:
        """Which weights these are: a hash of every tensor's name, dtype, shape and first 4 KiB."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            digest.update(tensor.head())
        return digest.hexdigest()[:16]

    def under(self, mask: DropMask) -> "MaskedCheckpoint":
        """What a mask means for this checkpoint. Raises MaskError for one that does not fit the layers."""
        self.decoder.check(mask)
        return MaskedCheckpoint(self, mask)

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, file in index.items():
            tensor = self.tensors.get(name)
            if tensor is None:
                # A stripped checkpoint whose index still lists what is gone says nothing wrong about what is there.
                if not in_dropped_sublayer(name, self.family, self.mask):
                    raise CheckpointError(f"{self.directory}: the index puts {name} in {file}, which does not hold it")
            elif tensor.path.name != file:
                raise CheckpointError(f"{name} is in {tensor.path}; the index puts it in {file}")


@dataclass(frozen=True)
class MaskedCheckpoint:
    """A checkpoint and a mask, and what the one means for the other: which tensors stay, and what they cost."""

    checkpoint: Checkpoint
    mask: DropMask

    @cached_property
    def kept(self) -> Mapping[str, StoredTensor]:
        """The checkpoint's tensors but those of dropped sublayers."""
        tensors, family = self.checkpoint.tensors.items(), self.checkpoint.family
        return MappingProxyType(
            {name: tensor for name, tensor in tensors if not in_dropped_sublayer(name, family, self.mask)}
        )

    @property
    def weight_bytes(self) -> int:
        """Of what is kept, as it is stored."""
        return sum(tensor.num_bytes for tensor in self.kept.values())

    @property
    def loses_nothing(self) -> bool:
        """Whether the checkpoint has no tensor that the mask drops."""
        return len(self.kept) == len(self.checkpoint.tensors)

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Weights of kept sublayers that the checkpoint lacks."""
        return tuple(sorted(missing_weights(self.checkpoint.tensors, self.checkpoint.family, self.mask)))

    def check_complete(self) -> None:
        """Raise CheckpointError where weights of kept sublayers are not there."""
        if self.missing:
            directory, own = self.checkpoint.directory, self.checkpoint.mask
            raise CheckpointError(
                f"{directory} lacks weights of sublayers that the mask keeps: {listed(self.missing)}; "
                f"its config says: {own.summary()}"
            )

    @cached_property
    def layout(self) -> KVLayout:
        """How vLLM stores the KV cache of the attention that is kept."""
        return self.checkpoint.decoder.layout(self.mask)


def _read(paths: Iterable[Path]) -> tuple[dict[str, StoredTensor], dict[Path, Mapping[str, str]]]:
    """(tensors by name, metadata by file). Raises CheckpointError for a damaged file and a tensor that is in two."""
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[Path, Mapping[str, str]] = {}
    for path in paths:
        metadata[path] = dict(open_shard(path).metadata() or {})
        for tensor in stored_tensors(path):
            if (first := tensors.get(tensor.name)) is not None:
                raise CheckpointError(f"{tensor.name} is in {first.path.name} and again in {path.name}")
            tensors[tensor.name] = tensor
    return tensors, metadata


def _unlisted(tensors: Iterable[str], index: Mapping[str, str]) -> list[str]:
    """Engines load whatever a file that is listed holds."""
    names = sorted({*tensors} - {*index}) if index else []
    return [f"the index does not list {names[0]} ({len(names)} such tensors); they come along"] if names else []


def _check_layers(directory: Path, names: Iterable[str], family: Family, mask: DropMask) -> None:
    """Raise CheckpointError where there is nothing of a layer that the config and its mask keep."""
    names = {*names}
    found = {layer for name in names if (layer := layer_in(name)) is not None}
    if not found:
        name = min(names, default="none")
        hint = f"; it holds {ADAPTER}" if name.startswith("base_model.") else ""
        raise CheckpointError(f"{directory} has no decoder layers, only tensors like {name}{hint}")
    depth = mask.num_hidden_layers
    without_mixer, without_mlp = family.absent(mask)
    if not (lacking := {*range(depth)} - found - (without_mixer & without_mlp)):
        return
    said = f"{directory} has weights of layers {ranges(found)}, and config.json says {depth} layers: "
    if min(lacking) > max(found):
        raise CheckpointError(f"{said}{ranges(lacking)} are missing; set the number to {max(found) + 1}, or find them")
    # Whoever cut layers out and left the numbers has a model with a mask.
    gone = sorted({*range(max(found) + 1)} - found)
    entries = ", ".join(f'"{key}": {gone}' for key in ("drop_attn_list", "drop_mlp_list"))
    raise CheckpointError(
        f"{said}{ranges(gone)} were cut out, and the others kept their numbers. Say so in config.json: set the number "
        f"to {max(found) + 1} and add {entries}; then `llmdrop convert {directory} OUT --renumber` makes an ordinary "
        f"model of {len(found)} layers"
    )


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
        raise CheckpointError(f"{directory} lacks weights of sublayers that the mask keeps: {listed(missing)}")
