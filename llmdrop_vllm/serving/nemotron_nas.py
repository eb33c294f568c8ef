"""Nemotron-NAS checkpoints (DeciLMForCausalLM), whose layers differ in widths and say themselves what they lack.

Stock vLLM leaves such sublayers out by flags in its forward, and crashes where the first kept sublayer is an MLP. Here
its layers are built as if nothing were missing, and what is missing is dropped as everywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig

from llmdrop_vllm.checkpoints.configuration_nemotron_nas import NemotronNasConfig
from llmdrop_vllm.masks.dialects import NEMOTRON_NO_OP, block_entry
from llmdrop_vllm.serving.dropping import Dropping


def register_config() -> None:
    """Give Transformers a config class for these checkpoints, which otherwise bring one as remote code."""
    AutoConfig.register(NemotronNasConfig.model_type, NemotronNasConfig, exist_ok=True)


class NemotronDropping(Dropping):
    """As `Dropping`, for block configs in which a dropped sublayer has no widths."""

    @contextmanager
    def building(self) -> Iterator[None]:
        """Within this context, the config describes a dropped sublayer like the first one of its kind that is kept."""
        config: Any = self.vllm_config.model_config.hf_config
        blocks = config.block_configs
        parts = [*NEMOTRON_NO_OP.values()]
        kept = {part: _first_kept([block_entry(block, part) for block in blocks]) for part in parts}
        config.block_configs = [
            SimpleNamespace(**{part: _filled(block_entry(block, part), kept[part]) for part in parts})
            for block in blocks
        ]
        try:
            yield
        finally:
            config.block_configs = blocks


def _first_kept(settings: list[Any]) -> Any:
    return next((each for each in settings if not block_entry(each, "no_op")), None)


def _filled(settings: Any, kept: Any) -> Any:
    if not block_entry(settings, "no_op"):
        return settings
    # Where all are gone, any width will do: the module is dropped as soon as it is built.
    return kept if kept is not None else SimpleNamespace(no_op=False, n_heads_in_group=1, intermediate_size=1)
