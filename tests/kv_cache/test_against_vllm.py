"""What we count for each kind of layer is what vLLM allocates: weights are made up by vLLM, only the config counts."""

import json

import pytest

from llmdrop_server.report import report
from llmdrop_vllm.checkpoints.decoder import Decoder
from tests.engines import KV_CACHE_BYTES, engine
from tests.tiny import TINY_LLAMA

CONTEXT, IN_FLIGHT = 1024, 256
LLAMA = TINY_LLAMA | {"max_position_embeddings": CONTEXT, "vocab_size": 64}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
MIXED = ["sliding_attention", "sliding_attention", "full_attention"] * 2
LATENT = {"kv_lora_rank": 512, "q_lora_rank": 32, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}


def decilm() -> dict:
    """Eight query heads; keys and values for 8, 4, 2 and 1 of them, and one layer without any attention."""
    blocks = [
        {
            "attention": {"no_op": shared is None, "n_heads_in_group": shared, "replace_with_linear": False},
            "ffn": {"no_op": False, "ffn_mult": 2.0, "replace_with_linear": False},
        }
        for shared in (1, 2, None, 4, 8)
    ]
    heads = {"num_attention_heads": 8, "num_key_value_heads": None, "hidden_size": 256, "head_dim": 32}
    names = {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas"}
    return LLAMA | heads | names | {"num_hidden_layers": 5, "block_configs": blocks, "intermediate_size": 512}


GRANITE_HYBRID = {key: value for key, value in SIZES.items() if key != "head_dim"} | {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "num_hidden_layers": 7,
    "layer_types": ["mamba", "mamba", "attention", "mamba", "mamba", "attention", "mamba"],
    **{"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2},
    **{"num_local_experts": 0, "shared_intermediate_size": 64},
}
CONFIGS = {
    "full": LLAMA,
    "full, half of the attention dropped": LLAMA | {"drop_attn_list": [6, 5, 2, 0]},
    "windows of ours in half of the layers": LLAMA | {"llmdrop_windows": {str(layer): 300 for layer in (1, 3, 5, 7)}},
    "windows of ours where others are dropped": LLAMA
    | {"llmdrop_windows": {"1": 200, "3": 200}, "drop_attn_list": [6, 5]},
    "one window for all": LLAMA
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 300},
    "windows and full": SIZES
    | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 6}
    | {"layer_types": MIXED, "sliding_window": 300, "query_pre_attn_scalar": 32},
    "windows and full, dropped to padding": SIZES
    | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 6}
    | {"layer_types": MIXED, "sliding_window": 300, "query_pre_attn_scalar": 32, "drop_attn_list": [0]},
    "heads of two sizes": SIZES
    | {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "num_hidden_layers": 6}
    | {"layer_types": MIXED, "sliding_window": 300, "global_head_dim": 64, "num_kv_shared_layers": 0}
    | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64},
    "layers that read what others keep, some dropped": SIZES
    | {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "num_hidden_layers": 9}
    | {"layer_types": MIXED + MIXED[:3], "sliding_window": 300, "global_head_dim": 64, "num_kv_shared_layers": 3}
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "drop_attn_list": [0, 7, 8, 5]},
    "heads of two numbers": SIZES
    | {"architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "num_hidden_layers": 6}
    | {"layer_types": MIXED, "hybrid_layer_pattern": [1, 1, 0] * 2, "sliding_window": 300, "sliding_window_size": 300}
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 32, "v_head_dim": 32}
    | {"moe_layer_freq": [0] * 6, "layernorm_epsilon": 1e-6, "rope_theta": 1e4, "swa_rope_theta": 1e4}
    | {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "hidden_act": "silu"},
    "keys and values for fewer heads layer by layer": decilm(),
    "attention and states": GRANITE_HYBRID,
    "attention and states, dropped to one of each": GRANITE_HYBRID | {"drop_attn_list": [0, 1, 2, 3, 4]},
    "states larger than a block of keys and values": GRANITE_HYBRID | {"mamba_d_state": 256},
    "attention and a state in each layer": SIZES
    | {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "num_hidden_layers": 4}
    | {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
    | {"drop_attn_list": [2]},
    "latent vectors": SIZES
    | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    | LATENT
    | {"num_hidden_layers": 3, "first_k_dense_replace": 3, "num_key_value_heads": 4, "drop_attn_list": [1]},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_blocks_and_requests_are_vllms(case, tmp_path):
    config = CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"load_format": "dummy", "max_model_len": CONTEXT}
    with engine(tmp_path, **options, max_num_batched_tokens=IN_FLIGHT, attention_backend="CPU_MLA") as llm:
        vllm_config = llm.llm_engine.vllm_config
        cache, in_flight = vllm_config.cache_config, vllm_config.max_in_flight_tokens
        blocks, concurrency = cache.num_gpu_blocks, cache.kv_cache_max_concurrency
        of_engine = Decoder.of(vllm_config.model_config.hf_config, config["architectures"][0])
    layout = Decoder.of(config, config["architectures"][0]).layout()
    assert blocks == KV_CACHE_BYTES // (4 * cache.block_size * layout.block_values)
    assert concurrency == pytest.approx(blocks / layout.request_blocks(CONTEXT, cache.block_size, in_flight))
    assert of_engine.layout() == layout


@pytest.mark.parametrize(
    "case", ["full, half of the attention dropped", "windows of ours in half of the layers", "windows and full"]
)
def test_layers_that_keep_the_models_dtype_take_more_and_the_others_as_little(case, tmp_path):
    """`--kv-cache-dtype bfloat16 --kv-cache-dtype-skip-layers 1,4` of a model in float32."""
    config = CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"load_format": "dummy", "max_model_len": CONTEXT}
    options |= {"kv_cache_dtype": "bfloat16", "kv_cache_dtype_skip_layers": ["1", "4"]}
    options["block_size"] = 64  # vLLM makes blocks twice as long, which windows take up to 128
    with engine(tmp_path, **options, max_num_batched_tokens=IN_FLIGHT) as llm:
        vllm_config = llm.llm_engine.vllm_config
        cache, in_flight = vllm_config.cache_config, vllm_config.max_in_flight_tokens
        blocks, concurrency = cache.num_gpu_blocks, cache.kv_cache_max_concurrency
        found = report(vllm_config).served
    layout = Decoder.of(config, config["architectures"][0]).layout(wide={1: 2, 4: 2})
    assert blocks == KV_CACHE_BYTES // (2 * cache.block_size * layout.block_values)
    assert concurrency == pytest.approx(blocks / layout.request_blocks(CONTEXT, cache.block_size, in_flight))
    assert found.kv_bytes_per_token == layout.token_bytes(2)
