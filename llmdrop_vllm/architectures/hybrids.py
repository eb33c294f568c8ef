"""The family table's rows for hybrids: with recurrent mixers in place of attention or beside it, or two attentions."""

from llmdrop_vllm.architectures.family import Family, Sublayer, attention, mlp

GATED_DELTA_NET = Sublayer("linear_attn", "input_layernorm", "out_proj")
GEMMA4_MIXTURE = (
    *(("post_feedforward_layernorm_1", 0), ("post_feedforward_layernorm_2", 0)),
    *(("pre_feedforward_layernorm_2", 0), ("router", 3)),
)

HYBRIDS = (
    # Attention of two head sizes, in E-models with another layer's keys and values; beside the MLP may be a mixture.
    Family(
        "gemma4",
        "Gemma4ForCausalLM",
        attention(post_norm="post_attention_layernorm"),
        mlp(
            pre_norm="pre_feedforward_layernorm",
            post_norm="post_feedforward_layernorm",
            also=("experts",),
            optional=("experts", *dict(GEMMA4_MIXTURE)),
            inner=GEMMA4_MIXTURE,
        ),
        unlike_attention=True,
        then="per_layer_input_gate",
    ),
    # AltUp's and LAuReL's parts of a layer stay, and with them the norm that attention shares. Keys and values are
    # those of other layers in many of them.
    Family(
        "gemma3n",
        "Gemma3nForCausalLM",
        attention(pre_norm=None, post_norm="post_attention_layernorm"),
        mlp(pre_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
        unlike_attention=True,
        streams="AltUp",
    ),
    # Gated delta nets.
    Family("qwen3_next", "Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM", recurrent=GATED_DELTA_NET),
    # Lightning attention, and multi-head latent attention in every so many layers.
    Family(
        "bailing_linear",
        "BailingMoeV2_5ForCausalLM",
        attention("attention", output="dense", in_vllm="self_attn"),
        recurrent=Sublayer("attention", "input_layernorm", "dense", in_vllm="self_attn", vllm_fills=True),
    ),
    # Short convolutions.
    Family(
        "lfm2",
        "Lfm2ForCausalLM Lfm2MoeForCausalLM",
        attention(pre_norm="operator_norm", output="out_proj"),
        mlp("feed_forward", "ffn_norm", "w2"),
        recurrent=Sublayer("conv", "operator_norm", "out_proj", in_vllm="short_conv", vllm_fills=True),
    ),
    # Mamba. In vLLM the attention's projections stand in the layer itself: the module is the last of them.
    Family(
        "jamba",
        "JambaForCausalLM",
        attention(in_vllm="o_proj", vllm_parts=(("qkv_proj", 2), ("attn", 0)), vllm_tuple=2),
        mlp("feed_forward", "pre_ff_layernorm"),
        recurrent=Sublayer("mamba", "input_layernorm", "out_proj", vllm_fills=True),
    ),
    # Mamba 2.
    Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        mlp=mlp(
            "block_sparse_moe",
            "post_attention_layernorm",
            "output_linear",
            also=("shared_mlp",),
            optional=("block_sparse_moe", "shared_mlp"),
        ),
        recurrent=Sublayer("mamba", "input_layernorm", "out_proj"),
    ),
    Family(
        "nemotron_h",
        "NemotronHForCausalLM NemotronHPuzzleForCausalLM",
        attention("mixer", "norm"),
        mlp("mixer", "norm"),
        recurrent=Sublayer("mixer", "norm", "out_proj"),
        alone=True,
    ),
    # Attention and Mamba 2 side by side in every layer.
    Family(
        "falcon_h1",
        "FalconH1ForCausalLM",
        attention(output="o_proj|out_proj", also=("mamba",), vllm_tuple=2),
        mlp("feed_forward", "pre_ff_layernorm"),
        transformers_layer_tuple=True,
    ),
)
