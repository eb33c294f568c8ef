"""Which tensors of a checkpoint belong to which sublayer, told by their names."""

import re
from collections.abc import Iterable

from llmdrop_vllm.architectures.family import Family, Sublayer
from llmdrop_vllm.architectures.names import BEFORE_LAYER
from llmdrop_vllm.masks.mask import DropMask

# A module has its weight under one of these names, quantized or not; scales and zero points it may have or not.
WEIGHT_NAMES = "weight|qweight|weight_packed|_weight_qdata"  # the last is torchao's


def in_dropped_sublayer(name: str, family: Family, mask: DropMask) -> bool:
    """Whether a tensor belongs to a sublayer that the mask drops."""
    return any(
        (match := _in_sublayer(sublayer).match(name)) and int(match[2]) in dropped
        for sublayer, dropped in family.sublayers(mask)
    )


def missing_weights(names: Iterable[str], family: Family, mask: DropMask) -> set[str]:
    """Weights of kept sublayers that are not among these tensor names, judged by what the other layers have."""
    names, depth = set(names), mask.num_hidden_layers
    mixers = [
        (each, alike, mask.attention) for each, having in family.mixers(range(depth)) for alike in family.alike(having)
    ]
    mlps = [(each, {*having}, mask.mlp) for each, having in family.mlps(range(depth))]
    return set().union(*(_missing_modules(names, *each) for each in mixers + mlps))


def _in_sublayer(sublayer: Sublayer) -> re.Pattern[str]:
    """Matches a tensor's name as (everything up to the layer index, the index, the rest)."""
    return re.compile(rf"^({BEFORE_LAYER})(\d+)\.((?:{'|'.join(sublayer.names)})\..+)$")


def _missing_modules(names: set[str], sublayer: Sublayer, having: set[int], dropped: Iterable[int]) -> set[str]:
    """Weights that one kept layer's sublayer lacks and another layer's sublayer of the same kind has; `having` are the
    layers with such a one, dropped or not.

    Layers may differ in kind (dense and mixture-of-experts MLPs in one model), so only a layer whose modules are a part
    of another's counts as incomplete.
    """
    modules: dict[int, set[str]] = {layer: set() for layer in having}
    pattern, weight, prefix = _in_sublayer(sublayer), re.compile(rf"^(.+)\.(?:{WEIGHT_NAMES})$"), ""
    for name in names:
        if (match := pattern.match(name)) and int(match[2]) in having and (module := weight.match(match[3])):
            prefix = match[1]
            modules[int(match[2])].add(module[1])
    missing = set()
    for layer in having.difference(dropped):
        whole = max((its for its in modules.values() if modules[layer] < its), key=len, default=modules[layer])
        missing |= {f"{prefix}{layer}.{module}.weight" for module in whole - modules[layer]}
    return missing
