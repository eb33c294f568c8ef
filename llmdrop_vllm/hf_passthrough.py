"""What stands in a Transformers model where a sublayer and its norms were."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llmdrop_vllm.architectures.family import Family, Sublayer
from llmdrop_vllm.errors import MaskError


class DroppedSublayer(nn.Module):
    """Stands where attention or an MLP was: adds nothing to the residual stream, and has no keys and values.

    `tuple_length` is how many values the module returned, 0 for a tensor alone; all but the first become None.
    `adds_residual` is for a module that was given the residual stream to add its output to.
    """

    def __init__(self, tuple_length: int = 0, *, adds_residual: bool = False) -> None:
        super().__init__()
        self.tuple_length, self.adds_residual = tuple_length, adds_residual

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the input's shape, [batch, tokens, hidden], or the residual stream as it is."""
        output = args[0] if self.adds_residual else torch.zeros_like(hidden_states)
        return (output, *[None] * (self.tuple_length - 1)) if self.tuple_length else output


class DroppedNorm:
    """Stands where a norm was. It is no module: what quantizes models looks for modules by the names of norms, to move
    scales between them and the weights behind, of which there are none here.

    Some layers ask a norm for the dtype of its weight before they call it: it is that of the layer's other weights.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()

    @property
    def weight(self) -> torch.Tensor:
        """Empty, in the layer's dtype."""
        found = next((each for each in self.layer.parameters() if each.is_floating_point()), torch.empty(0))
        return found.new_empty(0)

    def register_forward_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """As a module's, for a hook that only looks."""
        handle = RemovableHandle(self.hooks)
        self.hooks[handle.id] = hook
        return handle

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The input as it is."""
        for hook in self.hooks.values():
            hook(self, (hidden_states,))
        return hidden_states


def check_norms(layer: nn.Module, family: Family, index: int) -> None:
    """Raise MaskError where a layer lacks a norm that the row names.

    StableLM's config, for one, can ask for layers of another layout, where attention's norm is the MLP's as well.
    """
    for sublayer in filter(None, (family.mixer(index), family.mlp_of(index))):
        for name in set(sublayer.norms) - set(sublayer.optional):
            if getattr(layer, name, None) is None:
                raise MaskError(f"layer {index} has no {name}; the family table's row {family.name!r} does not fit it")


def drop_sublayer(layer: nn.Module, sublayer: Sublayer, index: int) -> None:
    """Put pass-throughs in place of a layer's sublayer and its norms. Raises MaskError where it has none."""
    name = sublayer.transformers_module
    values = {name: sublayer.transformers_tuple, **dict.fromkeys(sublayer.also, 0), **dict(sublayer.inner)}
    parts = [part for part in values if getattr(layer, part, None) is not None]
    if name not in (*parts, *sublayer.optional) or not parts:
        raise MaskError(f"the mask drops {name} in layer {index}, which has none, only: {', '.join(layer._modules)}")
    for part in parts:
        adds_residual = part == name and sublayer.transformers_adds_residual
        substitute = DroppedSublayer(values[part], adds_residual=adds_residual)
        for table, its in getattr(layer, part).named_buffers(recurse=False):  # Falcon-H1's model fills them
            substitute.register_buffer(table, its, persistent=False)
        setattr(layer, part, substitute)
    for norm in sublayer.norms:
        if getattr(layer, norm, None) is not None:
            layer._modules.pop(norm, None)
            setattr(layer, norm, DroppedNorm(layer))
