"""Dropping by substitution: while vLLM builds its own model, dropped sublayers are replaced as they are assigned."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.distributed.parallel_state import get_pp_group
from vllm.distributed.utils import get_pp_indices

from llmdrop_vllm.families import Family
from llmdrop_vllm.mask import DropMask
from llmdrop_vllm.serving.kv_cache import KVBytes
from llmdrop_vllm.serving.passthrough import DroppedNorm, DroppedSublayer

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LAYER_INDEX = re.compile(r"\.(\d+)(?:\.|$)")


class SubstitutionError(RuntimeError):
    """vLLM built the model otherwise than the family table says; serving it would drop the wrong thing or nothing."""


@dataclass
class Dropping:
    """One construction of one model: what was seen and what was replaced."""

    mask: DropMask
    family: Family
    vllm_config: "VllmConfig"
    kv_bytes: KVBytes = field(default_factory=KVBytes)
    # Decoder layers under construction: their index, and which attribute names are to be replaced by what.
    layer_index: dict[nn.Module, int] = field(default_factory=dict)
    substitutes: dict[nn.Module, dict[str, type[nn.Module]]] = field(default_factory=dict)
    replaced: set[tuple[int, str]] = field(default_factory=set)

    def __call__(self, parent: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
        """The module-registration hook: `parent.name = module` is under way; what is returned is assigned instead."""
        if module is None:
            return None
        for sublayer, dropped in self.family.sublayers(self.mask):
            if name == sublayer.module and (index := _layer_index(module)) is not None:
                self.layer_index[parent] = index
                if index in dropped:
                    norm = sublayer.pre_norm
                    self.substitutes.setdefault(parent, {}).update({name: DroppedSublayer, norm: DroppedNorm})
                    # Most layers assign their norms after the sublayers; where it was before, assign it again.
                    if (assigned := getattr(parent, norm, None)) is not None:
                        setattr(parent, norm, assigned)
        substitute = self.substitutes.get(parent, {}).get(name)
        if substitute is None:
            return None
        self.replaced.add((self.layer_index[parent], name))
        self._forget(module)
        return substitute()

    def _forget(self, module: nn.Module) -> None:
        """Give back a dropped module's KV cache entry and its weights.

        vLLM gives KV cache to every layer in the static forward context. The storage is freed by hand because modules
        with reference cycles would otherwise hold it until the garbage collector runs.
        """
        context = self.vllm_config.compilation_config.static_forward_context
        for child in module.modules():
            layer_name = getattr(child, "layer_name", None)
            if context.get(layer_name) is child:
                self.kv_bytes.add_dropped(child, self.vllm_config)
                del context[layer_name]
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)

    def finish(self, model: nn.Module) -> None:
        """Raise SubstitutionError unless this rank built its layers and replaced all that the mask asks for there."""
        group = get_pp_group()
        start, end = get_pp_indices(self.mask.num_hidden_layers, group.rank_in_group, group.world_size)
        built = set(self.layer_index.values())
        expected = {
            (layer, name)
            for sublayer, dropped in self.family.sublayers(self.mask)
            for layer in dropped
            if start <= layer < end
            for name in sublayer.names
        }
        if built != set(range(start, end)) or self.replaced != expected:
            raise SubstitutionError(
                f"{type(model).__name__} was not built as the family table's row {self.family.name!r} says: "
                f"layers {start} to {end - 1} expected, {sorted(built)} seen; "
                f"not replaced: {sorted(expected - self.replaced)}, "
                f"replaced unasked: {sorted(self.replaced - expected)}"
            )
        self.kv_bytes.add_kept(model, self.vllm_config)


@contextmanager
def dropping(mask: DropMask, family: Family, vllm_config: "VllmConfig") -> Iterator[Dropping]:
    """Within this context, a model of the family is built without the sublayers that the mask drops."""
    hook = Dropping(mask, family, vllm_config)
    handle = register_module_module_registration_hook(hook)
    try:
        yield hook
    finally:
        handle.remove()


def _layer_index(module: nn.Module) -> int | None:
    """The decoder layer that a sublayer was built for, from the dotted name that vLLM gives its parts."""
    for child in module.modules():
        for attribute in ("layer_name", "prefix"):
            name = getattr(child, attribute, None)
            if isinstance(name, str) and (match := LAYER_INDEX.search(name)):
                return int(match.group(1))
    return None
