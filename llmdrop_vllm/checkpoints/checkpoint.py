"""Checkpoints on disk: config.json and safetensors shards, judged by their headers before any weight is read."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
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

    `config` is config.json as it is; `decoder` is what it says of the layers. `remarks` are for the user to read: what
    is odd about the files, and does no harm.
    """

    directory: Path
    config: Mapping[str, Any]
    decoder: Decoder
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
        remarks = []
        if index and (unlisted := sorted({*tensors} - {*index})):  # engines load whatever a file that is listed holds
            remarks.append(f"the index does not list {unlisted[0]} ({len(unlisted)} such tensors); they come along")
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
        found = cls(directory, MappingProxyType(config), decoder, MappingProxyType(tensors), metadata, tuple(remarks))
        found._check_layers()
        found._check_index(index)
        return found

    @property
    def family(self) -> Family:
        """How the layers name their sublayers."""
        assert self.decoder.family is not None, "without a row there is no checkpoint"
        return self.decoder.family

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
        name = str(next(self._said("dtype", "torch_dtype"), "bfloat16"))
        return name if name in DTYPE_BYTES else "bfloat16"

    @property
    def kv_dtype(self) -> str:
        """Of keys and values as vLLM stores them by itself: the weights', unless a quantizer left scales for FP8."""
        scheme = self.quantization.get("kv_cache_scheme")
        return "fp8" if isinstance(scheme, Mapping) and scheme.get("num_bits") == 8 else self.dtype

    @property
    def quantization(self) -> Mapping[str, Any]:
        """What the config says of how the weights are stored; empty where it says nothing."""
        return next((each for each in self._said(*QUANTIZED_KEYS) if isinstance(each, Mapping)), {})

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
        lacks_a_kind = any(MaskedCheckpoint(self, each).loses_nothing for each in kinds)
        return not lacks_a_kind and not self.under(self.decoder.whole).missing

    @cached_property
    def fingerprint(self) -> str:
        """Which weights these are: a hash of every tensor's name, dtype, shape and first 4 KiB."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            digest.update(tensor.head())
        return digest.hexdigest()[:16]

    def under(self, mask: DropMask) -> "MaskedCheckpoint":
        """What a mask means for this checkpoint. Raises MaskError for one that does not fit the layers."""
        self.decoder.check(mask)
        return MaskedCheckpoint(self, mask)

    def _said(self, *keys: str) -> Iterator[Any]:
        """What the config says under these keys, on top and then beside its decoder's layers."""
        return (entries[key] for entries in (self.config, self.decoder.config) for key in keys if entries.get(key))

    def _check_layers(self) -> None:
        """Raise CheckpointError where there is nothing of a layer that the config and its mask keep."""
        found = {layer for name in self.tensors if (layer := layer_in(name)) is not None}
        if not found:
            name = min(self.tensors, default="none")
            hint = f"; it holds {ADAPTER}" if name.startswith("base_model.") else ""
            raise CheckpointError(f"{self.directory} has no decoder layers, only tensors like {name}{hint}")
        depth, number = self.mask.num_hidden_layers, max(found) + 1
        without_mixer, without_mlp = self.family.absent(self.mask)
        if not (lacking := {*range(depth)} - found - (without_mixer & without_mlp)):
            return
        said = f"{self.directory} has weights of layers {ranges(found)}, and config.json says {depth} layers: "
        if min(lacking) >= number:
            raise CheckpointError(f"{said}{ranges(lacking)} are missing; set the number to {number}, or find them")
        # Whoever cut layers out and left the numbers has a model with a mask.
        gone = sorted({*range(number)} - found)
        entries = ", ".join(f'"{key}": {gone}' for key in ("drop_attn_list", "drop_mlp_list"))
        raise CheckpointError(
            f"{said}{ranges(gone)} were cut out, and the others kept their numbers. Say so in config.json: set the "
            f"number to {number} and add {entries}; then `llmdrop convert {self.directory} OUT --renumber` makes an "
            f"ordinary model of {len(found)} layers"
        )

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, file in index.items():
            if (tensor := self.tensors.get(name)) is not None:
                if tensor.path.name != file:
                    raise CheckpointError(f"{name} is in {tensor.path}; the index puts it in {file}")
            # A stripped checkpoint whose index still lists what is gone says nothing wrong about what is there.
            elif not in_dropped_sublayer(name, self.family, self.mask):
                raise CheckpointError(f"{self.directory}: the index puts {name} in {file}, which does not hold it")


@dataclass(frozen=True)
class MaskedCheckpoint:
    """A checkpoint and a mask, and what the one means for the other: which tensors stay, and what they cost."""

    checkpoint: Checkpoint
    mask: DropMask

    @cached_property
    def kept(self) -> Mapping[str, StoredTensor]:
        """The checkpoint's tensors but those of dropped sublayers."""
        tensors, family = self.checkpoint.tensors.items(), self.checkpoint.family
        kept = {name: tensor for name, tensor in tensors if not in_dropped_sublayer(name, family, self.mask)}
        return MappingProxyType(kept)

    @property
    def weight_bytes(self) -> int:
        """Of what is kept, as it is stored."""
        return sum(tensor.num_bytes for tensor in self.kept.values())

    @property
    def loses_nothing(self) -> bool:
        """Whether the checkpoint has no tensor that the mask drops."""
        return len(self.kept) == len(self.checkpoint.tensors)

    @cached_property
    def missing(self) -> set[str]:
        """Weights of kept sublayers that the checkpoint lacks."""
        return missing_weights(self.checkpoint.tensors, self.checkpoint.family, self.mask)

    def check_complete(self) -> None:
        """Raise CheckpointError where weights of kept sublayers are not there."""
        if self.missing:
            own = self.checkpoint.mask.summary()
            raise CheckpointError(f"{_lacking(self.checkpoint.directory, self.missing)}; its config says: {own}")

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


def check_complete(directory: Path, family: Family, mask: DropMask) -> None:
    """Raise CheckpointError for a damaged shard and for weights that the mask keeps and no shard holds.

    What the mask drops may be there or not, in the shards and in the index. A directory without safetensors passes.
    """
    index_file, index = read_index(directory)
    needed = {name: file for name, file in index.items() if not in_dropped_sublayer(name, family, mask)}
    for name, file in needed.items():
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory / file} is missing; {index_file} says that it holds {name}")
    files = sorted({directory / file for file in index.values()} or directory.glob("*.safetensors"))
    found = {name for file in files if file.is_file() for name in open_shard(file).offset_keys()}
    if missing := ({*needed} - found) | missing_weights(found, family, mask):
        raise CheckpointError(_lacking(directory, missing))


def _lacking(directory: Path, missing: Iterable[str]) -> str:
    return f"{directory} lacks weights of sublayers that the mask keeps: {listed(missing)}"
