"""What mixes tokens in each decoder layer of a hybrid, in whichever way its config says that."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from llmdrop_vllm.errors import CheckpointError

RECURRENT, NO_MIXER, HYBRID = "recurrent", "none", "hybrid"
# Ours for what configs write, in lists of names and in patterns of one letter a layer; other names are kept.
MEANINGS = {
    **dict.fromkeys(("attention", "*"), "full_attention"),
    **dict.fromkeys(("linear_attention", "mamba", "mamba2", "conv", "M"), RECURRENT),
    **dict.fromkeys(("mlp", "moe", "-", "E"), NO_MIXER),
}
LISTS = ("layer_types", "layers_block_type", "hybrid_override_pattern")


def _every(key: str, config: Mapping[str, Any], layer: int) -> str:
    """Every so many layers one with attention, the last of them; by Jamba's entry, one that the config names."""
    period = config[key]
    return "full_attention" if layer % period == config.get("attn_layer_offset", period - 1) else RECURRENT


# Entries that tell layers apart where no list does: Qwen3-Next's, Ling's, Jamba's, Falcon-H1's.
RULES: Mapping[str, Callable[[Mapping[str, Any], int], str]] = {
    **{key: partial(_every, key) for key in ("full_attention_interval", "layer_group_size", "attn_layer_period")},
    "mamba_d_ssm": lambda _config, _layer: HYBRID,
}


def layer_types(config: Mapping[str, Any], num_layers: int | None) -> tuple[str, ...] | None:
    """Per decoder layer `recurrent`, `hybrid` where a recurrent mixer stands beside attention, `none` where the layer
    only has an MLP, else what the config calls its attention; None where the config does not tell layers apart.

    num_layers: for configs without a list of layers, which say nothing without it. A list may go on with the layers of
    draft heads; raises CheckpointError for one that is shorter.
    """
    for key in LISTS:
        if listed := config.get(key):
            if len(listed) < (num_layers or 0):
                raise CheckpointError(f"{key} names {len(listed)} layers; the model has {num_layers}")
            return tuple(MEANINGS.get(name, name) for name in listed)
    if rule := next((rule for key, rule in RULES.items() if config.get(key)), None):
        return tuple(rule(config, layer) for layer in range(num_layers)) if num_layers else None
    return None
