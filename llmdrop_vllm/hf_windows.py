"""Windows in Transformers' attention modules: what a query may see is taken from the mask that the module is given."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.stretches import STRETCH, stretches_back

# Kernels that are told what a token sees by other means.
WITH_OTHER_MASKS = ("flash", "flex", "paged")
OTHER_MASKS = "windows need Transformers' attention to be 'sdpa' or 'eager' (attn_implementation)"
CACHES = ("past_key_values", "past_key_value", "layer_past")


def look_back(attention: nn.Module, tokens: int, *, bare: bool) -> RemovableHandle:
    """Let each token see a window of so many and the first stretch of a text (`stretches`) until the handle is removed;
    keys and values of the others are still kept. A `bare` one, of a module that has one by itself, is of the last
    tokens and no others; of the two the shorter one holds.
    """

    def narrow(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "attention_mask" not in kwargs:
            raise MaskError(
                f"{type(module).__name__} takes its attention mask otherwise than by name; it has no windows"
            )
        mask = kwargs["attention_mask"]
        if str(getattr(getattr(module, "config", None), "_attn_implementation", "")).startswith(WITH_OTHER_MASKS):
            raise MaskError(OTHER_MASKS)
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        length = _keys(module, hidden.shape[1], mask, kwargs)
        if length <= tokens:
            return args, kwargs
        return args, kwargs | {"attention_mask": _narrowed(mask, hidden, length, tokens, bare)}

    return attention.register_forward_pre_hook(narrow, with_kwargs=True)


def _keys(module: Any, queries: int, mask: Any, kwargs: dict[str, Any]) -> int:
    """How many tokens the queries could see."""
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    if getattr(cache, "is_compileable", False):  # its keys stand where there is no token yet
        raise MaskError(f"windows need a cache that grows, as DynamicCache does; found {type(cache).__name__}")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            raise MaskError(OTHER_MASKS)
        return int(mask.shape[-1])
    return queries + (0 if cache is None else int(cache.get_seq_length(module.layer_idx)))


def _narrowed(mask: torch.Tensor | None, hidden: torch.Tensor, length: int, tokens: int, bare: bool) -> torch.Tensor:
    """[batch or 1, heads or 1, queries, keys], of the kind that it was."""
    keys = torch.arange(length, device=hidden.device)
    at = keys[length - hidden.shape[1] :, None]
    if mask is None:
        return (_seen(keys, at, tokens, bare) & (keys <= at))[None, None]
    allowed = mask if mask.dtype == torch.bool else mask == 0
    # Padding at the left is no part of the text: where it begins is where the last token looks back to.
    begins = allowed[..., -1:, :].int().argmax(-1, keepdim=True)
    seen = _seen(keys - begins, at - begins, tokens, bare)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _seen(keys: torch.Tensor, at: torch.Tensor, tokens: int, bare: bool) -> torch.Tensor:
    """[..., queries, keys], of keys up to a query; where keys stand [..., 1, keys], and queries [..., queries, 1]."""
    if bare:
        return keys > at - tokens
    return (keys < STRETCH) | (keys // STRETCH >= at // STRETCH - stretches_back(tokens))
