"""Nemotron-NAS checkpoints (DeciLMForCausalLM), whose layers differ in widths and say themselves what they lack.

Stock vLLM leaves such sublayers out by flags in its forward, and crashes where the first kept sublayer is an MLP. Here
its layers are built as if nothing were missing, and what is missing is dropped as everywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from llmdrop_vllm.masks.dialects import NEMOTRON_NO_OP, block_entry

# Where all are gone, any width will do: the module is dropped as soon as it is built.
ANY_WIDTH = SimpleNamespace(no_op=False, n_heads_in_group=1, intermediate_size=1)


@contextmanager
def with_all_widths(config: Any) -> Iterator[None]:
    """Within this context, the config describes a dropped sublayer, which has no widths, like the first one of its kind
    that is kept.
    """
    blocks = config.block_configs
    parts = {}
    for part in NEMOTRON_NO_OP.values():
        settings = [block_entry(block, part) for block in blocks]
        kept = next((each for each in settings if not block_entry(each, "no_op")), ANY_WIDTH)
        parts[part] = [kept if block_entry(each, "no_op") else each for each in settings]
    described = zip(*parts.values(), strict=True)
    config.block_configs = [SimpleNamespace(**dict(zip(parts, each, strict=True))) for each in described]
    try:
        yield
    finally:
        config.block_configs = blocks
