"""Windows in vLLM's own attention layers: their constructor is told of one where the mask asks for it."""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import SlidingWindowSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@contextmanager
def windowed(windows: Mapping[int, int]) -> Iterator[dict[int, Attention]]:
    """Within this context vLLM builds the attention of these decoder layers with windows of so many tokens; yields what
    was built so, by layer.

    It is told in the constructor, which chooses the kernel by it, before any hook could see the module.
    """
    built: dict[int, Attention] = {}
    stock = Attention.__init__
    signature = inspect.signature(stock)

    @wraps(stock)
    def init(self: Attention, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        layer = layer_in(given.arguments.get("prefix", ""))
        if layer is not None and layer in windows:
            own = given.arguments.get("per_layer_sliding_window")
            given.arguments["per_layer_sliding_window"] = min(windows[layer], own or windows[layer])
            built[layer] = self
        stock(*given.args, **given.kwargs)

    Attention.__init__ = init
    try:
        yield built
    finally:
        Attention.__init__ = stock


def keeps_a_window(attention: Attention, tokens: int, vllm_config: "VllmConfig") -> bool:
    """Whether vLLM will keep keys and values of its own for a window of so many tokens, and no others."""
    spec = attention.get_kv_cache_spec(vllm_config)
    return isinstance(spec, SlidingWindowSpec) and spec.sliding_window == tokens


def layer_in(name: str) -> int | None:
    """The decoder layer in the dotted name that vLLM gives a part of one."""
    found = LAYER_INDEX.search(name)
    return int(found[1]) if found else None
