"""Windows in vLLM's own attention layers: their constructor is told of one where the mask asks for it."""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from vllm.model_executor.layers.attention import Attention

DECODER_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@contextmanager
def windowed(windows: Mapping[int, int]) -> Iterator[set[int]]:
    """Within this context vLLM builds the attention of these decoder layers with windows of so many tokens; yields the
    layers where it has.
    """
    built: set[int] = set()
    stock = Attention.__init__
    signature = inspect.signature(stock)

    @wraps(stock)
    def init(self: Attention, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        found = DECODER_LAYER.search(given.get("prefix", ""))
        tokens = windows.get(int(found[1])) if found else None
        if tokens is None:
            stock(self, *args, **kwargs)
            return
        own = given.get("per_layer_sliding_window")
        kwargs["per_layer_sliding_window"] = tokens if own is None else min(own, tokens)
        stock(self, *args, **kwargs)
        built.add(int(found[1]))  # type: ignore[index]

    Attention.__init__ = init
    try:
        yield built
    finally:
        Attention.__init__ = stock
