"""Quantized checkpoints of the five formats that people download, made of the embedded model or of a tiny one.

Those of compressed-tensors are made by the library itself, a weight at a time. GPTQ and AWQ are packed here, rounded to
nearest: gptqmodel needs a newer torch than vLLM's and has no wheel, AutoAWQ is no longer kept up. How they calibrate
changes which numbers are packed, not how.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

GROUP = 32  # inputs that share a scale: the smallest number that vLLM's kernels for 4 bits take
PRESETS = {"W8A8": "W8A8", "W4A16": "W4A16", "FP8": "FP8_DYNAMIC"}  # as compressed-tensors calls them
FORMATS = (*PRESETS, "GPTQ", "AWQ")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight")
PACKED = {"bits": 4, "group_size": GROUP}
CONFIGS: dict[str, dict[str, Any]] = {
    "GPTQ": PACKED | {"quant_method": "gptq", "sym": True, "desc_act": False, "checkpoint_format": "gptq"},
    "AWQ": PACKED | {"quant_method": "awq", "zero_point": True, "version": "gemm", "modules_to_not_convert": None},
}


def quantize(source: Path, out: Path, form: str, *, spared: tuple[str, ...] = ()) -> Path:
    """A quantized copy of the checkpoint `source`: the matrices of its decoder layers, but for routers and, in the
    formats of compressed-tensors, for the modules whose names begin as one of `spared`.
    """
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text()) | {"dtype": "bfloat16"}
    if form in CONFIGS:
        config["quantization_config"] = CONFIGS[form]
    (out / "config.json").write_text(json.dumps(config))
    if form in CONFIGS:
        packed = {"GPTQ": gptq, "AWQ": awq}[form]
    else:
        packed = partial(compress, scheme := scheme_of(form))
        groups, status = {"group_0": scheme}, QuantizationStatus.COMPRESSED
        ignore = ["lm_head", "re:.*gate$", *(f"re:{each}" for each in spared)]
        said = QuantizationConfig(config_groups=groups, format=scheme.format, quantization_status=status, ignore=ignore)
        ModelCompressor(said).update_config(str(out))
    tensors = rewritten(load_file(out / "model.safetensors"), packed, spared)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def rewritten(
    tensors: dict[str, torch.Tensor],
    packed: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    spared: tuple[str, ...],
) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in tensors.items():
        value = value.bfloat16()
        is_spared = name.endswith(ROUTERS) or any(re.match(each, name) for each in spared)
        if ".layers." in name and value.ndim == 2 and not is_spared:
            module = name.removesuffix(".weight")
            found |= {f"{module}.{part}": each.contiguous() for part, each in packed(value).items()}
        else:
            found[name] = value
    return found


def scheme_of(form: str) -> QuantizationScheme:
    """With the format that the library itself would choose."""
    scheme = preset_name_to_scheme(PRESETS[form], ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size = GROUP
    scheme.format = infer_module_format(torch.nn.Linear, scheme)
    return scheme


def compress(scheme: QuantizationScheme, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As compressed-tensors stores a weight [outputs, inputs] whose scales are those of its smallest and largest."""
    groups = weight.unflatten(1, (-1, scheme.weights.group_size or weight.shape[1]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    state: dict[str, torch.Tensor] = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    return compressor.compress(state, scheme)


def gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eight inputs to a word; symmetric, so that all zero points are 8, which this format stores as 7."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    whole = ((groups / scale).round() + 8).flatten(1).T
    zeros = torch.full((groups.shape[1], len(weight)), 7)
    return {
        "qweight": words(whole.T).T,
        "qzeros": words(zeros),
        "scales": scale.squeeze(-1).T.half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eight outputs to a word, in an order of its own; each group from its smallest number to its largest."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    whole = ((groups / scale).round() + zero).clamp(0, 15).flatten(1).T
    return {
        "qweight": words(whole, AWQ_ORDER),
        "qzeros": words(zero.squeeze(-1).T, AWQ_ORDER),
        "scales": scale.squeeze(-1).T.half(),
    }


def words(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight numbers of four bits along the last dimension to a word, the first in its lowest bits."""
    eights = values.unflatten(-1, (-1, 8)).long()[..., list(order)]
    packed = (eights << torch.arange(0, 32, 4)).sum(-1)
    return packed.where(packed < 1 << 31, packed - (1 << 32)).int()
