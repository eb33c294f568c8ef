"""Windows in vLLM's own attention layers: their constructor is told of one where the mask asks for it."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from llmdrop_vllm.architectures.names import layer_in
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.serving.window_backend import window_backend
from llmdrop_vllm.serving.window_cache import WindowSpec


@contextmanager
def windowed(windows: Mapping[int, int]) -> Iterator[dict[int, Attention]]:
    """Within this context vLLM builds the attention of these decoder layers with windows of so many tokens; yields what
    was built so, by layer.

    A layer that has a window by itself gets a shorter one, told in the constructor, which chooses the kernel by it,
    before any hook could see the module. Others keep the first stretch of a text in sight.
    """
    built: dict[int, Attention] = {}
    stock = Attention.__init__
    signature = inspect.signature(stock)

    @wraps(stock)
    def init(self: Attention, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        layer = layer_in(given.arguments.get("prefix", ""))
        if layer is None or layer not in windows:
            stock(self, *args, **kwargs)
            return
        own, cache = given.arguments.get("per_layer_sliding_window"), given.arguments.get("cache_config")
        if own or (cache is not None and cache.sliding_window):
            given.arguments["per_layer_sliding_window"] = min(windows[layer], own or windows[layer])
        stock(*given.args, **given.kwargs)
        if self.sliding_window is None:
            _look_back(self, windows[layer])
        built[layer] = self

    Attention.__init__ = init
    try:
        yield built
    finally:
        Attention.__init__ = stock


def _look_back(attention: Attention, window: int) -> None:
    """Give attention to everything a window of ours, on the kernels that vLLM chose."""
    attention.attn_backend = window_backend(attention.attn_backend, window)
    own = attention.get_kv_cache_spec

    def spec(vllm_config: VllmConfig) -> KVCacheSpec | None:
        full = own(vllm_config)
        return WindowSpec.of(full, window) if type(full) is FullAttentionSpec else full

    attention.get_kv_cache_spec = spec


def check_engine(vllm_config: VllmConfig) -> None:
    """Raise MaskError for an engine whose KV cache would lose a text's first stretch, or keep everything in silence."""
    if (transfer := vllm_config.kv_transfer_config) is not None and transfer.kv_connector is not None:
        raise MaskError(f"the KV connector {transfer.kv_connector} knows no windows that keep a text's first tokens")
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise MaskError("windows need vLLM's hybrid KV cache manager, which is off")
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        raise MaskError("windows are not split over --decode-context-parallel-size; use --tensor-parallel-size")


def keeps_a_window(attention: Attention, tokens: int, vllm_config: VllmConfig) -> bool:
    """Whether vLLM will keep keys and values of its own for a window of so many tokens, and no others."""
    spec = attention.get_kv_cache_spec(vllm_config)
    if isinstance(spec, WindowSpec):
        return bool(spec.window == tokens)
    return isinstance(spec, SlidingWindowSpec) and spec.sliding_window == tokens
