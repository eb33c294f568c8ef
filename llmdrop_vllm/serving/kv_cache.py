"""KV cache accounting: bytes per token with and without the dropped attention sublayers, from vLLM's own specs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class KVBytes:
    """Bytes to store one token's keys and values on one rank."""

    kept_bytes_per_token: int = 0
    dropped_bytes_per_token: int = 0

    @property
    def full_bytes_per_token(self) -> int:
        """What the model would need with all of its attention sublayers."""
        return self.kept_bytes_per_token + self.dropped_bytes_per_token

    def add_dropped(self, layer: nn.Module, vllm_config: "VllmConfig") -> None:
        """Count an attention layer that is about to be dropped."""
        self.dropped_bytes_per_token += _bytes_per_token([layer], vllm_config)

    def add_kept(self, model: nn.Module, vllm_config: "VllmConfig") -> None:
        """Count every attention layer that the model still has."""
        self.kept_bytes_per_token += _bytes_per_token(model.modules(), vllm_config)

    def summary(self) -> str:
        """For people: `KV cache 98,304 bytes/token, 75% of the full model`."""
        share = self.kept_bytes_per_token / self.full_bytes_per_token if self.full_bytes_per_token else 1.0
        return f"KV cache {self.kept_bytes_per_token:,} bytes/token, {share:.0%} of the full model"


def _bytes_per_token(modules: Iterable[nn.Module], vllm_config: "VllmConfig") -> int:
    specs = (module.get_kv_cache_spec(vllm_config) for module in modules if isinstance(module, AttentionLayerBase))
    return sum(spec.page_size_bytes // spec.block_size for spec in specs if spec is not None)
