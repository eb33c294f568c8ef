"""A checkpoint that compressed-tensors has quantized, with plain weights: the library unpacks each when it is read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.hf_weights import READABLE, TORCH_DTYPES, read_tensor
from llmdrop_vllm.checkpoints.shards import StoredTensor
from llmdrop_vllm.errors import CheckpointError

METHOD = "compressed-tensors"
LINEAR = nn.Linear(1, 1, device="meta")  # a mixture's experts are such in the checkpoint's names
# Whose tensors the library's two compressors below unpack; a name for all of a model's is none of a module's.
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class DequantizedTensor(StoredTensor):
    """A plain weight whose bytes are in no file; `parts` are by their names in the module, `shape` is unpacked.

    `path`, `start` and `stop` are of the quantized numbers.
    """

    parts: Mapping[str, StoredTensor]
    unpack: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize

    def read_into(self, buffer: bytearray) -> None:
        """Fill a buffer of `num_bytes` with the weight, little endian."""
        weight = self.unpack({name: read_tensor(part) for name, part in self.parts.items()})["weight"]
        torch.frombuffer(buffer, dtype=TORCH_DTYPES[self.dtype]).view(self.shape).copy_(weight)


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with plain weights in place of quantized ones, in the dtype that its config names; itself where
    none are. It is for reading weights: which checkpoint they are of, only the original tells.

    Raises CheckpointError for other quantizers' weights, and for formats of compressed-tensors that are more than a
    scale for each number.
    """
    if not checkpoint.is_quantized:
        return checkpoint
    method = checkpoint.quantization.get("quant_method", "a tool that the config does not name")
    if method != METHOD:
        raise _refused(checkpoint, f"by {method}")
    config, tensors = _config_of(checkpoint), dict(checkpoint.tensors)
    for name, stored in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight_packed" or (part == "weight" and stored.dtype not in TORCH_DTYPES):
            del tensors[name]
            tensors[f"{module}.weight"] = _plain(checkpoint, config, module, stored)
    return replace(checkpoint, tensors=MappingProxyType(tensors))


def _config_of(checkpoint: Checkpoint) -> Any:
    """How the checkpoint's modules are quantized, read by the library."""
    from compressed_tensors.quantization import QuantizationConfig

    said = checkpoint.quantization
    if (said.get("transform_config") or {}).get("config_groups"):
        raise _refused(checkpoint, "with rotations that the model makes while it runs")
    try:
        return QuantizationConfig.model_validate(dict(said))
    except (ValueError, KeyError) as error:  # the latter of a preset that it does not know
        raise CheckpointError(f"{checkpoint.directory}: compressed-tensors cannot read its config: {error}") from error


def _plain(checkpoint: Checkpoint, config: Any, module: str, stored: StoredTensor) -> DequantizedTensor:
    """The weight of a module, of which the quantized numbers are given."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.utils import match_targets

    by_target = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    if not (targets := match_targets(module, LINEAR, by_target)):
        raise CheckpointError(f"{stored.name} in {stored.path} is quantized, and the config says nothing of how")
    scheme = by_target[targets[0]]
    form = scheme.format or config.format
    if (form := str(getattr(form, "value", form))) not in FORMATS:
        raise _refused(checkpoint, f"in the format {form}")
    is_packed = stored.name.endswith("_packed")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized" if is_packed else "naive-quantized")
    parts = {}
    for name in compressor.compression_param_names(scheme):
        part = checkpoint.tensors.get(f"{module}.{name}")
        if part is None or part.dtype not in READABLE:
            found = "nothing" if part is None else part.dtype
            raise CheckpointError(f"{stored.path}: {module}.{name} is {found}; its quantized weight needs it")
        parts[name] = part
    dtype = next(name for name, each in TORCH_DTYPES.items() if each == getattr(torch, checkpoint.dtype))
    shape = tuple(read_tensor(parts["weight_shape"]).tolist()) if is_packed else stored.shape
    place, unpack = (stored.path, stored.start, stored.stop), partial(compressor.decompress, scheme=scheme)
    return DequantizedTensor(f"{module}.weight", dtype, shape, *place, parts, unpack)


def _refused(checkpoint: Checkpoint, how: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.directory} is quantized {how}, which cannot be read as plain weights; score the full-precision "
        "model, and give its mask to `llmdrop apply --other-model`"
    )
