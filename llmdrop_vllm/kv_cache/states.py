"""How large the state of a recurrent mixer is, read from a config: numbers for each request, however long it is.

As vLLM keeps them (0.32, `MambaStateShapeCalculator`), without room for speculative tokens. Some models keep a part in
float32 whatever the KV cache's dtype is.
"""

from collections.abc import Callable, Mapping
from typing import Any

from llmdrop_vllm.errors import CheckpointError

Config = Mapping[str, Any]


def state_values(config: Config) -> int:
    """Numbers in one layer's state. Raises CheckpointError for a config that does not say its sizes."""
    for key, count in COUNTS.items():
        if config.get(key) is not None:
            try:
                return count(config)
            except (KeyError, TypeError) as error:
                raise CheckpointError(f"the config lacks {error}, so recurrent states cannot be counted") from None
    raise CheckpointError(f"the config has none of {', '.join(COUNTS)}, so recurrent states cannot be counted")


def state_blocks(config: Config) -> int:
    """States that a request keeps at most with prefix caching, which is vLLM's default: the one at hand, the one at the
    end of the block before and, of Mamba 2, one within a prompt (`MambaSpec.max_memory_usage_bytes`).
    """
    return 2 + any(config.get(key) is not None for key in MAMBA2)


def _convolution(channels: int, kernel: int) -> int:
    """The last inputs of a causal convolution, but for the one at hand."""
    return channels * (kernel - 1)


def _gated_delta_net(config: Config) -> int:
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    convolution = _convolution(2 * keys + values, config["linear_conv_kernel_dim"])
    return convolution + int(values * config["linear_key_head_dim"])


def _mamba(config: Config) -> int:
    inner = config["mamba_expand"] * config["hidden_size"]
    return _convolution(inner, config["mamba_d_conv"]) + int(inner * config["mamba_d_state"])


def _mamba2(inner: int, groups: int, state: int, kernel: int) -> int:
    return _convolution(inner + 2 * groups * state, kernel) + inner * state


def _mamba2_of(config: Config) -> int:
    """By the names of Granite and Falcon-H1."""
    inner = config.get("mamba_d_ssm") or config["mamba_expand"] * config["hidden_size"]
    return _mamba2(inner, config["mamba_n_groups"], config["mamba_d_state"], config["mamba_d_conv"])


def _nemotron(config: Config) -> int:
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    return _mamba2(inner, config["n_groups"], config["ssm_state_size"], config["conv_kernel"])


MAMBA2 = ("mamba_n_heads", "mamba_num_heads")
# By an entry that only configs with such a mixer have.
COUNTS: Mapping[str, Callable[[Config], int]] = {
    "linear_num_key_heads": _gated_delta_net,
    "conv_L_cache": lambda config: _convolution(
        config.get("conv_dim") or config["hidden_size"], config["conv_L_cache"]
    ),
    "mamba_n_heads": _mamba2_of,
    "mamba_num_heads": _nemotron,
    "mamba_dt_rank": _mamba,
    "layer_group_size": lambda config: config["num_attention_heads"] * config["head_dim"] ** 2,  # Ling 2.5
}
