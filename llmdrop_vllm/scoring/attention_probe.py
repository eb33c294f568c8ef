"""How concentrated attention is, looked at from inside Transformers' attention interface while a layer runs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PROBED_ATTENTION = "llmdrop_probed_sdpa"
QUERIES_PER_SEQUENCE = 16


class AttentionProbe:
    """Running sums over the queries that were looked at; a few per sequence, from its second half.

    `tokens` is how many of each sequence are no padding, None for all.
    """

    def __init__(self) -> None:
        self.tokens: int | None = None
        self.count = 0
        self.concentration = 0.0
        self.first_token = 0.0

    def add(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float | None) -> None:
        """query [batch, heads, tokens, head_dim], key [batch, kv_heads, tokens, head_dim]."""
        batch, heads, tokens, head_dim = query.shape
        end = self.tokens or tokens
        rows = torch.linspace(end // 2, end - 1, min(QUERIES_PER_SEQUENCE, end - end // 2)).long().unique()
        rows = rows.to(query.device)
        grouped = query[:, :, rows].reshape(batch, key.shape[1], -1, head_dim)  # heads that share keys, together
        logits = (grouped.float() @ key.float().transpose(-1, -2)).view(batch, heads, len(rows), tokens)
        logits *= head_dim**-0.5 if scaling is None else scaling
        visible = _visible(mask, rows, tokens)
        weights = logits.masked_fill_(~visible, -math.inf).softmax(-1)
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1)
        largest = visible.sum(-1).float().log().clamp_min(1e-30)
        self.count += entropy.numel()
        self.concentration += (1 - entropy / largest).sum().item()
        self.first_token += weights[..., 0].sum().item()

    def means(self) -> tuple[float, float] | None:
        """(concentration, share of the first token); None if no attention ran."""
        return (self.concentration / self.count, self.first_token / self.count) if self.count else None


_active: list[AttentionProbe] = []


@contextmanager
def probing(probe: AttentionProbe) -> Iterator[AttentionProbe]:
    """Within this context, attention that runs as `PROBED_ATTENTION` adds to the probe."""
    _active.append(probe)
    try:
        yield probe
    finally:
        _active.remove(probe)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    for probe in _active:
        probe.add(query, key, attention_mask, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _visible(mask: torch.Tensor | None, rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which keys each row sees: booleans that broadcast to [batch, heads, rows, tokens]."""
    if mask is None:
        return torch.arange(tokens, device=rows.device) <= rows[:, None]
    chosen = mask[..., rows, :tokens]
    return chosen if chosen.dtype == torch.bool else chosen == 0


AttentionInterface.register(PROBED_ATTENTION, _attention)
AttentionMaskInterface.register(PROBED_ATTENTION, sdpa_mask)
