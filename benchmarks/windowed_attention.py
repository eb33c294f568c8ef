"""Attention to a window in Transformers' models, with what may stand in for the first tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from llmdrop_vllm.masks.stretches import STRETCH, stretches_back

NAME, QUERIES = "llmdrop_windows", 512
SAMPLED = 64  # one query in so many tells what the first tokens weigh


@dataclass(frozen=True)
class Window:
    """What a layer attends to: the last `length` tokens, the `first` tokens beside them, and where there are `sinks`
    [heads] a logit that takes weight and gives nothing, or `values` [heads, head size].

    Sinks stand in for tokens that have left the window. With `stretches` windows begin where whole stretches do, as
    they are served.
    """

    length: int
    first: int = 0
    sinks: torch.Tensor | None = None
    values: torch.Tensor | None = None
    stretches: bool = False


@dataclass
class Weighed:
    """Of heads, sums over `count` queries past the window: the log of what their first tokens weigh, of what all tokens
    outside the window do, both [heads], and the values that these first tokens would have given [heads, head size].
    """

    length: int
    first: int
    count: int = 0
    firsts: Any = 0.0
    outside: Any = 0.0
    values: Any = 0.0

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> None:
        """[1, heads, tokens, head size] each, key heads repeated."""
        rows = torch.arange(self.length + self.first, query.shape[2], SAMPLED, device=query.device)
        scores = (query[0, :, rows] @ key[0].mT).float() * scale
        gone = torch.arange(key.shape[2], device=query.device)[None] <= (rows - self.length)[:, None]
        firsts = scores[..., : self.first]
        self.firsts = self.firsts + firsts.logsumexp(-1).sum(1)
        self.outside = self.outside + scores.masked_fill(~gone, -torch.inf).logsumexp(-1).sum(1)
        self.values = self.values + (firsts.softmax(-1) @ value[0, :, : self.first].float()).sum(1)
        self.count += len(rows)


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: Any, scaling: float, **__: Any
) -> tuple[torch.Tensor, None]:
    """As Transformers asks for it: [batch, heads, tokens, head size] in, [batch, tokens, heads, head size] out.

    Queries are those of all keys, or of the last one.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    if (weighed := getattr(module, "weighed", None)) is not None:
        weighed.add(query, key, value, scaling)
    window: Window | None = getattr(module, "window", None)
    if window is None or window.length >= query.shape[2]:
        of_all = query.shape[2] == key.shape[2]
        out = scaled_dot_product_attention(query, key, value, is_causal=of_all, scale=scaling)
    else:
        starts = range(0, query.shape[2], QUERIES)
        out = torch.cat([_block(window, query, key, value, start, scaling) for start in starts], 2)
    return out.transpose(1, 2), None


def _block(
    window: Window, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, scale: float
) -> torch.Tensor:
    end = min(start + QUERIES, query.shape[2])
    at = torch.arange(start, end, device=query.device)[:, None]
    back = stretches_back(window.length)
    begin = max(0, STRETCH * (start // STRETCH - back) if window.stretches else start - window.length + 1)
    seen = torch.arange(begin, end, device=query.device)
    if window.first and begin > 0:
        seen = torch.cat([torch.arange(min(window.first, begin), device=query.device), seen])
    near = seen // STRETCH >= at // STRETCH - back if window.stretches else seen > at - window.length
    allowed = (seen <= at) & (near | (seen < window.first))
    bias = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device).masked_fill(~allowed, -torch.inf)
    keys, values = key[:, :, seen], value[:, :, seen]
    if window.sinks is not None:
        keys, values = (pad(each, (0, 0, 0, 1)) for each in (keys, values))
        if window.values is not None:
            values[:, :, -1] = window.values.to(values.dtype)
        # Where nothing has left the window yet, nothing needs a stand-in.
        stands = torch.where(at - window.length >= 0, window.sinks[:, None, None], -torch.inf)
        bias = torch.cat([bias.expand(len(window.sinks), -1, -1), stands.to(bias.dtype)], -1)
    return scaled_dot_product_attention(query[:, :, start:end], keys, values, attn_mask=bias, scale=scale)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
