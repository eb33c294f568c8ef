"""The family table: for each architecture, how its decoder layer names its sublayers and adds their outputs.

The names are mostly the same in vLLM, in Transformers and in the checkpoint's tensor names, so one row serves them all.
Supporting a new architecture is one more row, or one more name in a row.
"""

from types import MappingProxyType
from typing import Any

from llmdrop_vllm.architectures.family import Family, attention, mlp
from llmdrop_vllm.architectures.hybrids import HYBRIDS
from llmdrop_vllm.architectures.refused import REFUSED, UNTRIED
from llmdrop_vllm.masks.mask import config_dict

NEOX = ("GPTNeoXForCausalLM", attention("attention", output="dense"), mlp(output="dense_4h_to_h"))
# Where both sublayers have a norm on either side, by the names that several have for them.
SANDWICHED = (
    attention(post_norm="post_attention_layernorm"),
    mlp(pre_norm="pre_mlp_layernorm", post_norm="post_mlp_layernorm"),
)
PANGU = "PanguEmbeddedForCausalLM PanguProMoEV2ForCausalLM PanguUltraMoEForCausalLM"


def _falcon(name: str, norms: tuple[str | None, str | None], when: dict[str, tuple[Any, ...]]) -> Family:
    """By the norms before attention and MLP, which return a bias beside their output in vLLM."""
    return Family(
        name,
        "FalconForCausalLM",
        attention("self_attention", norms[0], "dense", vllm_tuple=2),
        mlp(pre_norm=norms[1], output="dense_4h_to_h", vllm_tuple=2),
        when=when,
        parallel=True in when["parallel_attn"],
        transformers_layer_tuple=True,
    )


FAMILIES = (
    Family(
        "llama",
        """
            LlamaForCausalLM LLaMAForCausalLM LlamaModel MistralForCausalLM MistralModel Ministral3ForCausalLM
            InternLM3ForCausalLM IQuestCoderForCausalLM TeleChat3ForCausalLM SolarForCausalLM OrionForCausalLM
            TeleFLMForCausalLM Step1ForCausalLM MiMoForCausalLM MiniCPMForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM
            GemmaForCausalLM Phi3ForCausalLM GraniteForCausalLM GraniteSWAForCausalLM NemotronForCausalLM
            Ernie4_5ForCausalLM ArceeForCausalLM CwmForCausalLM GlmForCausalLM HunYuanDenseV1ForCausalLM OlmoForCausalLM
            Jais2ForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM
        """,
    ),
    Family("nemotron_nas", "DeciLMForCausalLM"),
    Family("stablelm", "StableLmForCausalLM", when={"use_parallel_residual": (False, None)}),
    Family("starcoder2", "Starcoder2ForCausalLM", mlp=mlp(output="c_proj")),
    Family("vaultgemma", "VaultGemmaForCausalLM", mlp=mlp(pre_norm="pre_feedforward_layernorm")),
    Family(
        "apertus",
        "ApertusForCausalLM",
        attention(pre_norm="attention_layernorm"),
        mlp(pre_norm="feedforward_layernorm"),
    ),
    Family(
        "internlm2",
        "InternLM2ForCausalLM",
        attention("attention", "attention_norm", "wo"),
        mlp("feed_forward", "ffn_norm", "w2"),
    ),
    Family("llama4", "Llama4ForCausalLM", mlp=mlp("feed_forward", transformers_tuple=2)),
    # Multi-head latent attention, but for the first DeepSeek.
    Family("mla", "MiniCPM3ForCausalLM SarvamMLAForCausalLM"),
    Family(
        "deepseek",
        "DeepseekForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM Glm4MoeLiteForCausalLM",
        scales_outputs=True,
    ),
    Family(
        "axk1",
        "AXK1ForCausalLM",
        mlp=mlp(post_norm="post_mlp_layernorm", optional=("post_mlp_layernorm",)),
        scales_outputs=True,
    ),
    Family("pangu", PANGU, when={"sandwich_norm": (False, None)}, scales_outputs=True),
    Family("pangu_sandwich", PANGU, *SANDWICHED, when={"sandwich_norm": (True,)}, scales_outputs=True),
    # Mixtures of experts; some have dense MLPs in their first layers, under the same name.
    Family(
        "moe",
        """
            Qwen2MoeForCausalLM Qwen3MoeForCausalLM OlmoeForCausalLM Param2MoEForCausalLM Ernie4_5_MoeForCausalLM
            Glm4MoeForCausalLM HYV3ForCausalLM LagunaForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM
            ExaoneMoeForCausalLM ExaoneMoEForCausalLM HunYuanMoEV1ForCausalLM MellumForCausalLM K2HorizonForCausalLM
        """,
    ),
    Family(
        "bailing_moe",
        "BailingMoeForCausalLM BailingMoeV2ForCausalLM SarvamMoEForCausalLM",
        attention("attention", output="dense"),
    ),
    # The router and all experts of a mixture, which Transformers calls `mlp`.
    Family(
        "mixtral",
        "MixtralForCausalLM MiniMaxM2ForCausalLM PhiMoEForCausalLM",
        mlp=mlp("block_sparse_moe", "post_attention_layernorm", "w2", in_transformers="mlp"),
    ),
    Family(
        "granitemoe", "GraniteMoeForCausalLM", mlp=mlp("block_sparse_moe", "post_attention_layernorm", "output_linear")
    ),
    Family(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM GraniteMoeSWAForCausalLM",
        mlp=mlp(
            "block_sparse_moe",
            "post_attention_layernorm",
            "output_linear|down_proj",
            also=("shared_mlp",),
            optional=("shared_mlp",),
        ),
    ),
    # A mixture and its shared expert, or in other layers a dense MLP.
    Family(
        "step3",
        "Step3TextForCausalLM Step3p5ForCausalLM",
        mlp=mlp(also=("moe", "share_expert"), optional=("mlp", "moe", "share_expert")),
    ),
    Family("gpt_oss", "GptOssForCausalLM", attention(in_vllm="attn"), mlp(transformers_tuple=2)),
    # A norm on either side of each sublayer.
    Family(
        "gemma2",
        "Gemma2ForCausalLM Gemma3ForCausalLM Rnj1ForCausalLM",
        attention(post_norm="post_attention_layernorm"),
        mlp(pre_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
    ),
    Family(
        "glm4", "Glm4ForCausalLM", attention(post_norm="post_self_attn_layernorm"), mlp(post_norm="post_mlp_layernorm")
    ),
    Family("afmoe", "AfmoeForCausalLM", *SANDWICHED),
    Family(
        "hyperclovax",
        "HyperCLOVAXForCausalLM",
        attention(post_norm="post_norm1", optional=("post_norm1",)),
        mlp(post_norm="post_norm2", optional=("post_norm2",)),
    ),
    Family(
        "plamo3",
        "Plamo3ForCausalLM",
        attention("mixer", "pre_mixer_norm", post_norm="post_mixer_norm"),
        mlp(pre_norm="pre_mlp_norm", post_norm="post_mlp_norm"),
    ),
    # A norm after each sublayer only.
    Family(
        "olmo2",
        "Olmo2ForCausalLM Olmo3ForCausalLM FlexOlmoForCausalLM Exaone4ForCausalLM",
        attention(pre_norm=None, post_norm="post_attention_layernorm"),
        mlp(pre_norm=None, post_norm="post_feedforward_layernorm"),
    ),
    # Attention and MLP side by side, behind one norm or two.
    Family(
        "cohere",
        "CohereForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM",
        attention(pre_norm=None),
        mlp(pre_norm=None),
        parallel=True,
    ),
    Family(
        "phi",
        "PhiForCausalLM",
        attention(pre_norm=None, output="dense"),
        mlp(pre_norm=None, output="fc2"),
        parallel=True,
    ),
    Family(
        "gptj",
        "GPTJForCausalLM",
        attention("attn", None, "out_proj"),
        mlp(pre_norm=None, output="fc_out"),
        parallel=True,
        transformers_layer_tuple=True,
    ),
    Family("gpt_neox", *NEOX, when={"use_parallel_residual": (True, None)}, parallel=True),
    Family("gpt_neox_sequential", *NEOX, when={"use_parallel_residual": (False,)}),
    _falcon(
        "falcon_two_norms",
        ("ln_attn", "ln_mlp"),
        {"parallel_attn": (True, None), "new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (2, None)},
    ),
    _falcon("falcon", (None, None), {"parallel_attn": (True, None), "num_ln_in_parallel_attn": (1, None)}),
    _falcon(
        "falcon_sequential",
        ("input_layernorm", "post_attention_layernorm"),
        {"parallel_attn": (False,), "new_decoder_architecture": (False, None), "num_ln_in_parallel_attn": (1, None)},
    ),
    Family(
        "bloom",
        "BloomForCausalLM ChatGLMModel ChatGLMForConditionalGeneration",
        attention("self_attention", output="dense", transformers_adds_residual=True),
        mlp(output="dense_4h_to_h", transformers_adds_residual=True),
        when={"apply_residual_connection_post_layernorm": (False, None)},
        transformers_layer_tuple=True,
    ),
    # The MLP's projections stand in the layer itself: the module is the last of them.
    Family(
        "opt",
        "OPTForCausalLM",
        attention(pre_norm="self_attn_layer_norm", output="out_proj"),
        mlp("fc2", "final_layer_norm", "weight|bias", also=("fc1",), vllm_tuple=2),
        when={"do_layer_norm_before": (True, None)},
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel GPTBigCodeForCausalLM",
        attention("attn", "ln_1", "c_proj"),
        mlp(pre_norm="ln_2", output="c_proj"),
    ),
    Family("exaone", "ExaoneForCausalLM", attention("attn", "ln_1", "out_proj"), mlp(pre_norm="ln_2", output="c_proj")),
    *HYBRIDS,
)

EXPLICIT_PREFIX = "Dropped"
_ROWS = [(name, row) for row in FAMILIES for name in row.architectures.split()]
BY_ARCHITECTURE = MappingProxyType({name: tuple(row for its, row in _ROWS if its == name) for name, _ in _ROWS})


def family_of(architecture: str, config: object = MappingProxyType({})) -> Family | None:
    """The row for an architecture name, plain or explicit (`DroppedLlamaForCausalLM`), and its config; None where there
    is none. A config is a config.json dict or a config object; only architectures with several layouts ask for it.
    """
    rows, entries = BY_ARCHITECTURE.get(architecture.removeprefix(EXPLICIT_PREFIX), ()), config_dict(config)
    return next((family.of(entries) for family in rows if family.fits(entries)), None)


def no_row(architecture: str) -> str:
    """For an error where `family_of` found none: what is supported, and what to do about it."""
    plain = architecture.removeprefix(EXPLICIT_PREFIX)
    if reason := REFUSED.get(plain):
        return f"{architecture} cannot go without sublayers: {reason}"
    if reason := UNTRIED.get(plain):
        return f"{architecture} has no row in the family table yet: {reason}"
    if rows := BY_ARCHITECTURE.get(plain):
        layouts = "; or ".join(family.describe_when() for family in rows)
        return f"{architecture} has no row in the family table for layers as this config has them, only for: {layouts}"
    return (
        f'{architecture} has no row in the family table; to add one, see "Adding an architecture" in docs/families.md '
        f"of llmdrop-vllm; supported: {', '.join(sorted(BY_ARCHITECTURE))}"
    )
