"""What a model computes without some sublayers, told by hooks on Transformers' own model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmdrop_vllm import DropMask
from llmdrop_vllm.architectures.family import Family
from llmdrop_vllm.checkpoints.decoder import Decoder
from tests.architectures.cases import CASES, model_of

WINDOW = 1  # of the first attention that is kept: beside the first stretch of a text, a token sees its own


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, whatever the model calls them."""
    lists = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    return next(each for each in lists if len(each) == model.config.get_text_config().num_hidden_layers)


def fitting(architecture: str, mask: DropMask) -> DropMask:
    """A mask without what layers of this architecture do not have, and what other layers read."""
    case = CASES[architecture]
    family, read = case.family, Decoder.of(case.config(), case.architecture).readers(mask)
    attention = tuple(layer for layer in mask.attention if family.mixer(layer) is not None and layer not in read)
    return replace(
        mask, attention=attention, mlp=tuple(layer for layer in mask.mlp if family.mlp_of(layer) is not None)
    )


@contextmanager
def skipping(model: PreTrainedModel, family: Family, mask: DropMask) -> Iterator[None]:
    """Within this context, what the mask's sublayers add to the residual stream is zero."""
    handles = []
    try:
        for sublayer, dropped in family.sublayers(mask):
            for index in dropped:
                layer = layers_of(model)[index]
                has_post_norm = sublayer.post_norm is not None and hasattr(layer, sublayer.post_norm)
                last = (sublayer.post_norm,) if has_post_norm else (sublayer.transformers_module, *sublayer.also)
                parts = [getattr(layer, name) for name in last if getattr(layer, name, None) is not None]
                assert parts, f"layer {index} has none of {last}"
                hook = _residual if sublayer.transformers_adds_residual else _zeros
                handles += [part.register_forward_hook(hook) for part in parts]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeros(_module: nn.Module, _args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return torch.zeros_like(output[0]), *output[1:]
    return torch.zeros_like(output)


def _residual(_module: nn.Module, args: Any, output: Any) -> Any:
    return (args[1], *output[1:]) if isinstance(output, tuple) else args[1]


def windowed(architecture: str, mask: DropMask) -> DropMask:
    """With a window in the first attention that is kept and takes one."""
    decoder = Decoder.of(model_of(architecture).config, CASES[architecture].architecture)
    read = decoder.readers(mask)
    is_hybrid = any(kind.state for kind in decoder.kinds)
    if is_hybrid or decoder.config.get("model_type") == "bloom":  # which knows positions by ALiBi
        return mask
    for layer in mask.kept_attention:
        kind = decoder.kinds[layer]
        if layer not in read and (kind.name == "full" or (kind.name == "sliding" and kind.span > WINDOW)):
            return replace(mask, windows=((layer, WINDOW),))
    return mask
