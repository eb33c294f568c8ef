"""Dropping by substitution: while vLLM builds its own model, dropped sublayers are replaced as they are assigned."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from inspect import isfunction

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.v1.kv_cache_interface import MambaSpec

from llmdrop_vllm.architectures.family import Sublayer
from llmdrop_vllm.architectures.names import is_layer_list, layer_in
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.checkpoints.nemotron import ARCHITECTURE as NEMOTRON_NAS
from llmdrop_vllm.serving.nemotron_nas import with_all_widths
from llmdrop_vllm.serving.passthrough import AddingNorm, DroppedNorm, DroppedPostNorm, DroppedSublayer, ZeroSublayer
from llmdrop_vllm.serving.windows import keeps_a_window, windowed

# Whether a model that drops is being built.
is_dropping: ContextVar[bool] = ContextVar("is_dropping", default=False)
# By attribute name in a decoder layer: what makes the module that stands in for a dropped one.
Substitutes = dict[str, Callable[[], nn.Module]]


class SubstitutionError(RuntimeError):
    """vLLM built the model otherwise than the family table says; serving it would drop the wrong thing or nothing."""


@dataclass
class Dropping:
    """One construction of one model: what was seen and what was replaced."""

    decoder: Decoder
    vllm_config: VllmConfig
    # Bytes on this rank: see `_stored`.
    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    # Decoder layers under construction: their index, and which attribute names are to be replaced by what.
    layer_index: dict[nn.Module, int] = field(default_factory=dict)
    substitutes: dict[nn.Module, Substitutes] = field(default_factory=dict)
    replaced: set[tuple[int, str]] = field(default_factory=set)
    windowed: dict[int, Attention] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.decoder.family is not None, f"{self.decoder.architecture} has a mask and no row that fits"
        self.mask, self.family = self.decoder.mask, self.decoder.family
        self.gone = [*self.family.sublayers(self.mask)]

    def __call__(self, parent: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
        """The module-registration hook: `parent.name = module` is under way; what is returned is assigned instead."""
        if module is None or isinstance(module, PPMissingLayer):
            return None
        for sublayer, dropped in self.gone:
            if name not in sublayer.vllm_modules:
                continue
            index = self.layer_index.get(parent, _layer_index(module))
            # Of a layer's two mixers, vLLM names the second one's parts as if it stood in a layer behind the last one.
            if index is not None and index < self.mask.num_hidden_layers:
                self.layer_index[parent] = index
                if index in dropped:
                    self._substitute(parent, sublayer)
        substitute = self.substitutes.get(parent, {}).get(name)
        if substitute is None:
            return None
        self.replaced.add((self.layer_index[parent], name))
        self.forget(module)
        return standing_in(substitute(), module)

    def _substitute(self, layer: nn.Module, sublayer: Sublayer) -> None:
        """Note what stands in for the sublayer's parts, and put it where the layer has assigned one already."""
        parts = self.substitutes_of(sublayer)
        self.substitutes.setdefault(layer, {}).update(parts)
        for name in parts:
            if (assigned := getattr(layer, name, None)) is not None:
                setattr(layer, name, assigned)

    def forget(self, module: nn.Module) -> None:
        """Give back a dropped module's weights, and note its KV cache entry.

        vLLM gives KV cache to every layer in the static forward context, where recurrent ones stand under names that
        they do not know, and may find experts by counting those in a list. Until the model is built, layers that read
        another's keys and values look for that one there. The storage is freed by hand because modules with reference
        cycles would otherwise hold it until the garbage collector runs.
        """
        compilation = self.vllm_config.compilation_config
        context, experts = compilation.static_forward_context, compilation.static_all_moe_layers
        parts = {*module.modules()}
        for name in [name for name, layer in context.items() if layer in parts]:
            self.dropped += self._stored([context[name]])
            self.forgotten.append(name)
            if name in experts:
                experts.remove(name)
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)

    def stage_layers(self) -> range:
        """The decoder layers of this rank's pipeline stage."""
        group = get_pp_group()
        return range(*get_pp_indices(self.mask.num_hidden_layers, group.rank_in_group, group.world_size))

    def substitutes_of(self, sublayer: Sublayer) -> Substitutes:
        """What stands in for each part of a dropped sublayer, by its name in vLLM's decoder layer."""
        several = len(sublayer.vllm_modules) > 1
        module = ZeroSublayer if sublayer.pre_norm is None or several else DroppedSublayer
        stand_in = partial(module, sublayer.vllm_tuple, sublayer.vllm_fills)
        found: Substitutes = dict.fromkeys(sublayer.vllm_modules, stand_in)
        found |= {name: partial(ZeroSublayer, tuple_length) for name, tuple_length in sublayer.vllm_parts}
        if sublayer.pre_norm is not None:
            found[sublayer.pre_norm] = AddingNorm if self.family.scales_outputs or several else DroppedNorm
        if sublayer.post_norm is not None:
            found[sublayer.post_norm] = DroppedPostNorm
        return found

    def finish(self, model: nn.Module) -> None:
        """Give back the KV cache of what is gone. Raise SubstitutionError unless this rank built its layers and
        replaced all that the mask asks for there.
        """
        for name in self.forgotten:
            self.vllm_config.compilation_config.static_forward_context.pop(name)
        stage = self.stage_layers()
        built = set(self.layer_index.values())
        expected = {
            (layer, name)
            for sublayer, dropped in self.gone
            for layer in dropped
            if layer in stage
            for name in self.substitutes_of(sublayer)
            if name not in sublayer.optional or (layer, name) in self.replaced
        }
        if built != set(stage) or self.replaced != expected:
            raise SubstitutionError(
                f"{type(model).__name__} was not built as the family table's row {self.family.name!r} says: "
                f"layers {stage[0]} to {stage[-1]} expected, {sorted(built)} seen; "
                f"not replaced: {sorted(expected - self.replaced)}, "
                f"replaced unasked: {sorted(self.replaced - expected)}"
            )
        for name, module in model.named_modules():
            if module in self.substitutes and layer_in(name) != self.layer_index[module]:
                raise SubstitutionError(f"{name} was taken for decoder layer {self.layer_index[module]}")
        for layer, tokens in self.mask.windows:
            attention = self.windowed.get(layer)
            if layer in stage and not (attention and keeps_a_window(attention, tokens, self.vllm_config)):
                found = "no attention that takes one" if attention is None else type(attention).__name__
                raise SubstitutionError(f"layer {layer} was to have a window of {tokens} tokens; built was {found}")
        self.kept = self._stored(model.modules())
        if self.family.recurrent is not None and not self.kept["request"]:
            # vLLM would look for the states that this asks it to keep for prefixes. Stages have a config each.
            self.vllm_config.cache_config.mamba_cache_mode = "none"

    def kv_summary(self) -> str:
        """For people: `KV cache 98,304 bytes/token, 75% of the full model`, and the same of states, if any."""
        said = []
        for what, unit in (("KV cache", "token"), ("recurrent state", "request")):
            kept, full = self.kept[unit], self.kept[unit] + self.dropped[unit]
            if full or unit == "token":
                said.append(f"{what} {kept:,} bytes/{unit}, {kept / full if full else 1:.0%} of the full model")
        return ", ".join(said)

    def _stored(self, modules: Iterable[nn.Module]) -> Counter[str]:
        """Bytes that they keep for each `token`, keys and values, and `request`, states, by vLLM's own specs."""
        stored: Counter[str] = Counter()
        for module in modules:
            reads_another = getattr(module, "kv_sharing_target_layer_name", None) is not None  # and stores nothing
            if isinstance(module, AttentionLayerBase) and not reads_another:
                spec = module.get_kv_cache_spec(self.vllm_config)
                if isinstance(spec, MambaSpec):
                    stored["request"] += spec.state_content_size_bytes
                elif spec:
                    stored["token"] += spec.page_size_bytes // spec.block_size
        return stored


@contextmanager
def dropping(hook: Dropping) -> Iterator[Dropping]:
    """Within this context, a model of the family is built without the sublayers that the mask drops."""
    is_nemotron_nas = hook.decoder.architecture == NEMOTRON_NAS
    widths = with_all_widths(hook.vllm_config.model_config.hf_config) if is_nemotron_nas else nullcontext()
    handle, token = register_module_module_registration_hook(hook), is_dropping.set(True)
    try:
        with widths, windowed(dict(hook.mask.windows)) as hook.windowed:
            yield hook
    finally:
        handle.remove()
        is_dropping.reset(token)


def decoder_layers(model: nn.Module, depth: int) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its dotted name. Raises SubstitutionError where there is none of so many."""
    for name, module in model.named_modules():
        if is_layer_list(name) and len(module) == depth:
            return name, module
    raise SubstitutionError(f"{type(model).__name__} has no list of {depth} decoder layers")


def standing_in(stand_in: nn.Module, module: nn.Module) -> nn.Module:
    """With the plain attributes, methods and empty parts of what it stands for.

    Constructors look into sublayers: Ernie's into each attention for its rotary embedding, those of mixtures of experts
    into an MLP for its number of experts, Plamo's into a norm for the weight that it gives a loader, Gemma 4's into a
    router for the method that it gives the experts.
    """
    methods = {name: getattr(module, name) for name, value in vars(type(module)).items() if isfunction(value)}
    for name, value in {**vars(module), **methods}.items():
        if (name in methods or isinstance(value, int | float | str)) and not hasattr(stand_in, name):
            setattr(stand_in, name, value)
    for name, _ in module.named_children():
        stand_in.add_module(name, PPMissingLayer())
    for name, _ in module.named_parameters(recurse=False):
        setattr(stand_in, name, torch.empty(0))
    return stand_in


def _layer_index(module: nn.Module) -> int | None:
    """The decoder layer that a sublayer was built for, from the dotted name that vLLM gives its parts."""
    names = (getattr(child, attribute, None) for child in module.modules() for attribute in ("layer_name", "prefix"))
    indices = (layer_in(name) for name in names if isinstance(name, str))
    return next((index for index in indices if index is not None), None)
