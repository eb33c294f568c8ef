"""The KV cache of attention with a window of ours: vLLM's manager of sliding windows, which keeps the first stretch."""

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.stretches import STRETCH, span


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """Of a window of `window` tokens; `sliding_window` is what the last token of a stretch sees of it."""

    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        # Here, for vLLM makes larger blocks of a layer whose numbers are smaller than another one's.
        if STRETCH % self.block_size:
            raise MaskError(
                f"windows need a KV cache in blocks that {STRETCH} tokens are a multiple of; the engine's have "
                f"{self.block_size}, twice its --block-size where layers keep 8 bits beside others that do not: "
                f"use another --block-size, such as 64"
            )

    @classmethod
    def of(cls, full: AttentionSpec, window: int) -> "WindowSpec":
        """In place of what the layer would keep in full."""
        alike = {each.name: getattr(full, each.name) for each in fields(AttentionSpec) if each.init}
        return cls(window=window, sliding_window=span(window), **alike)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """As of a sliding window, and the first stretch."""
        return super().max_admission_blocks_per_request(max_in_flight_tokens + STRETCH, max_model_len)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all are windows of this length."""
        return all(isinstance(spec, WindowSpec) and spec.window == self.window for spec in kv_cache_specs.values())


class WindowManager(SlidingWindowManager):
    """Frees the blocks between the first stretch and the window, and finds prefixes that have both."""

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """None from the beginning on, which is what vLLM asks here."""
        return 0

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, *_: Any, **__: Any) -> None:
        """Those that no later token sees."""
        begins = processed_computed_tokens // STRETCH * STRETCH + STRETCH - self.sliding_window
        begins -= self.extra_retained_tokens
        end = min(begins // self.block_size, len(self.req_to_blocks[request_id]))
        self._remove_blocks_in_range(request_id, STRETCH // self.block_size, end)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: WindowSpec,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """As of a sliding window; without the first stretch nothing is found."""
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size)
        hit, length = super().find_longest_cache_hit(
            hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, **kwargs
        )
        for place in range(min(STRETCH // kv_cache_spec.block_size, len(hit[0]))):
            cached = block_pool.get_cached_block(hashes[place], kv_cache_group_ids)
            if cached is None:
                return tuple([] for _ in hit), 0
            for blocks, block in zip(hit, cached, strict=True):
                blocks[place] = block
        return hit, length

    @classmethod
    def reachable_block_mask(cls, *_: Any, **__: Any) -> None:
        """Every block can be a part of a prefix."""


KVCacheSpecRegistry.register(WindowSpec, WindowManager, uniform_type_base_spec=WindowSpec)
