"""Attention with a window of ours on vLLM's own kernels: each stretch of queries becomes a request of its own, whose
block table holds the first stretch and those of its window. Within it everything before a query is seen.

vLLM serves chunked attention in the same way. Keys have their positions in them: where they stand does not matter.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from llmdrop_vllm.masks.stretches import STRETCH, stretches_back


def in_stretches(
    batch: CommonAttentionMetadata, window: int, block_size: int
) -> tuple[CommonAttentionMetadata, Callable[[torch.Tensor], torch.Tensor]]:
    """A batch with a row for each stretch of queries, and how its block tables come from those of the requests."""
    starts, ends = batch.query_start_loc_cpu.numpy(), batch.seq_lens.cpu().numpy()
    queries = np.diff(starts)
    begins = ends - queries
    first, last = begins // STRETCH, np.maximum(ends - 1, begins) // STRETCH
    counts = last - first + 1
    request = np.repeat(np.arange(len(counts)), counts)
    stretch = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts) + first[request]
    low, high = (np.clip(STRETCH * each, begins[request], ends[request]) for each in (stretch, stretch + 1))
    kept = STRETCH // block_size
    # Where the window begins, in blocks; a window that reaches into the first stretch ends at the beginning.
    begin = np.maximum(kept * (stretch - stretches_back(window)), kept)
    seen = high - block_size * (begin - kept)
    places = np.arange(kept * (stretches_back(window) + 2))
    blocks = np.where(places < kept, places, places - kept + begin[:, None])
    device, width = batch.block_table_tensor.device, batch.block_table_tensor.shape[1]
    rows = torch.from_numpy(request)[:, None].to(device)
    columns = torch.from_numpy(blocks.clip(max=width - 1)).to(device)
    query_starts = torch.from_numpy(np.append(0, np.cumsum(high - low)).astype(np.int32))
    lengths = torch.from_numpy(seen.astype(np.int32))

    def tables(of_requests: torch.Tensor) -> torch.Tensor:
        return of_requests[rows, columns]

    return CommonAttentionMetadata(
        query_start_loc=query_starts.to(device, non_blocking=True),
        query_start_loc_cpu=query_starts,
        seq_lens=lengths.to(device, non_blocking=True),
        num_reqs=len(request),
        num_actual_tokens=batch.num_actual_tokens,
        max_query_len=int((high - low).max()),
        max_seq_len=int(seen.max()),
        block_table_tensor=tables(batch.block_table_tensor),
        slot_mapping=batch.slot_mapping,
        causal=True,
        seq_lens_cpu_upper_bound=lengths,
    ), tables


@cache
def window_backend(stock: type[AttentionBackend], window: int) -> type[AttentionBackend]:
    """The backend that vLLM would take, given what each stretch sees."""

    class Builder(stock.get_builder_cls()):  # type: ignore[misc]
        @classmethod
        def get_cudagraph_support(cls, *_: Any, **__: Any) -> AttentionCGSupport:
            """None of whole models: a request has more rows at some steps than at others."""
            return AttentionCGSupport.NEVER

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kw: Any
        ) -> Any:
            batch, tables = in_stretches(common_attn_metadata, window, self.kv_cache_spec.block_size)
            metadata = super().build(0, batch, *args, **kw)
            metadata.window_tables = tables
            return metadata

        def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
            return super().update_block_table(metadata, metadata.window_tables(blk_table), slot_mapping)

        def use_cascade_attention(self, *_: Any, **__: Any) -> bool:
            """Not here, where what is common is no prefix."""
            return False

    return subclass_attention_backend(f"Window{window}_", stock, Builder)
