"""What a token costs in KV cache, from a config alone, as vLLM stores it."""

from collections.abc import Mapping
from typing import Any

from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.masks.mask import DropMask, layer_count
from llmdrop_vllm.memory.kv_groups import KVLayout, kv_layout

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}

# Models with latent attention for which vLLM stores whole heads all the same.
WHOLE_HEADS = frozenset({"minicpm3"})


def kv_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Per layer, the kind of KV cache that its attention needs: `full`, or `sliding 4096` for a window in tokens, or
    `chunked 8192` for tokens that see those of their chunk.

    Some architectures mix them though their config.json does not say it: Transformers' config objects do.
    """
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    types = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layer_count(config)
    kinds = {
        "sliding_attention": f"sliding {window}",
        "chunked_attention": f"chunked {config.get('attention_chunk_size')}",
    }
    return tuple(kinds.get(kind, "full") for kind in types)


def kept_layout(config: Mapping[str, Any], mask: DropMask) -> KVLayout:
    """How vLLM groups the KV cache of the attention that a mask keeps."""
    kinds = kv_kinds(config)
    return kv_layout(kinds[layer] for layer in mask.kept_attention)


def kv_bytes_per_layer_token(config: Mapping[str, Any], dtype: str) -> int:
    """Bytes of one token in one layer's KV cache: 2 x KV heads x head size x bytes per value.

    With multi-head latent attention one vector stands for all keys and values: its rank and the rotary part.
    """
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"KV cache dtype is {dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")
    if config.get("kv_lora_rank") and config.get("model_type") not in WHOLE_HEADS:
        return int((config["kv_lora_rank"] + config.get("qk_rope_head_dim", 0)) * DTYPE_BYTES[dtype])
    heads = _first(config, "num_attention_heads", "n_head")
    hidden = _first(config, "hidden_size", "n_embd", "n_embed") or 0
    kv_heads = _kv_heads(config) or heads
    head_dim = config.get("head_dim") or (heads and hidden // heads)
    if config.get("kv_lora_rank"):
        kv_heads, head_dim = heads, config.get("qk_nope_head_dim", 0) + config.get("qk_rope_head_dim", 0)
    if not kv_heads or not head_dim:
        raise CheckpointError("the config lacks num_attention_heads or hidden_size, so the KV cache cannot be counted")
    return int(2 * kv_heads * head_dim * DTYPE_BYTES[dtype])


def _kv_heads(config: Mapping[str, Any]) -> Any:
    """Heads that have keys and values of their own, where the config names them: Falcon in two ways, by its layout."""
    if config.get("new_decoder_architecture"):
        return config.get("num_kv_heads")
    if config.get("multi_query"):
        return 1
    if config.get("multi_query_attention"):
        return config.get("multi_query_group_num")
    return _first(config, "num_key_value_heads", "num_attention_groups")


def _first(config: Mapping[str, Any], *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key)), None)
