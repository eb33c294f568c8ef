"""The family table: for each architecture, how its decoder layer names its sublayers and adds their outputs.

The names are mostly the same in vLLM, in Transformers and in the checkpoint's tensor names, so one row serves them all.
Supporting a new architecture is one more row, or one more name in a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmdrop_vllm.mask import DropMask


@dataclass(frozen=True)
class Sublayer:
    """Attribute names inside the decoder layer: `x + post_norm(module(pre_norm(x)))`.

    `pre_norm` is None where the sublayer has none, or where it is shared with the other sublayer: then it stays.
    `output` is the module's last projection, a regular expression where kinds of layers differ: with its weights zeroed
    the sublayer adds nothing. `also` names modules beside `module` that belong to the sublayer; what they return is
    added to what it returns. `optional` are names that not every config gives the layer.

    `module` is the name in the checkpoint; `in_vllm` and `in_transformers` stand in for it where theirs differ.
    `transformers_tuple` is how many values the module returns in Transformers, 0 for a tensor alone.
    """

    module: str
    pre_norm: str | None
    output: str
    post_norm: str | None = None
    also: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    in_vllm: str | None = None
    in_transformers: str | None = None
    transformers_tuple: int = 0

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that go when the sublayer is dropped."""
        return tuple(name for name in (self.pre_norm, self.post_norm) if name is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that goes when the sublayer is dropped, as the checkpoint names it."""
        return self.module, *self.also, *self.norms

    @property
    def vllm_module(self) -> str:
        """The module's name in vLLM's decoder layer."""
        return self.in_vllm or self.module

    @property
    def transformers_module(self) -> str:
        """The module's name in Transformers' decoder layer."""
        return self.in_transformers or self.module


def _attention(
    module: str = "self_attn", pre_norm: str | None = "input_layernorm", output: str = "o_proj", **names: Any
) -> Sublayer:
    return Sublayer(module, pre_norm, output, transformers_tuple=2, **names)


ATTENTION = _attention()
MLP = Sublayer("mlp", "post_attention_layernorm", "down_proj")


@dataclass(frozen=True)
class Family:
    """One decoder-layer layout and the architectures that share it.

    `parallel` layers give attention and MLP the same input: `x + attention(norm(x)) + mlp(norm(x))`. `scales_outputs`
    is for layers that, in vLLM, multiply what a sublayer returned before the next norm adds it to the residual stream,
    `transformers_layer_tuple` for those that, in Transformers, return the stream as the first of several values.
    """

    name: str
    architectures: tuple[str, ...]
    attention: Sublayer = ATTENTION
    mlp: Sublayer = MLP
    parallel: bool = False
    scales_outputs: bool = False
    transformers_layer_tuple: bool = False

    def sublayers(self, mask: "DropMask") -> Iterator[tuple[Sublayer, tuple[int, ...]]]:
        """Each sublayer with the layers that go without it."""
        yield self.attention, mask.attention
        yield self.mlp, mask.mlp


FAMILIES = (
    Family(
        "llama",
        (
            *("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel", "MistralForCausalLM", "MistralModel"),
            *("Ministral3ForCausalLM", "InternLM3ForCausalLM", "IQuestCoderForCausalLM"),
            *("TeleChat3ForCausalLM", "SolarForCausalLM", "OrionForCausalLM", "TeleFLMForCausalLM"),
            *("Step1ForCausalLM", "MiMoForCausalLM", "MiniCPMForCausalLM"),
            *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "Phi3ForCausalLM", "GraniteForCausalLM"),
            *("GraniteSWAForCausalLM", "StableLmForCausalLM", "NemotronForCausalLM", "Ernie4_5ForCausalLM"),
            *("ArceeForCausalLM", "CwmForCausalLM", "GlmForCausalLM", "HunYuanDenseV1ForCausalLM", "OlmoForCausalLM"),
            *("Jais2ForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM"),
        ),
    ),
    Family("nemotron_nas", ("DeciLMForCausalLM",)),
    Family("starcoder2", ("Starcoder2ForCausalLM",), mlp=Sublayer("mlp", "post_attention_layernorm", "c_proj")),
    Family("vaultgemma", ("VaultGemmaForCausalLM",), mlp=Sublayer("mlp", "pre_feedforward_layernorm", "down_proj")),
    Family(
        "apertus",
        ("ApertusForCausalLM",),
        _attention(pre_norm="attention_layernorm"),
        Sublayer("mlp", "feedforward_layernorm", "down_proj"),
    ),
    Family(
        "internlm2",
        ("InternLM2ForCausalLM",),
        _attention("attention", "attention_norm", "wo"),
        Sublayer("feed_forward", "ffn_norm", "w2"),
    ),
    Family(
        "llama4",
        ("Llama4ForCausalLM",),
        mlp=Sublayer("feed_forward", "post_attention_layernorm", "down_proj", transformers_tuple=2),
    ),
    # Multi-head latent attention, but for the first DeepSeek.
    Family("minicpm3", ("MiniCPM3ForCausalLM",)),
    Family(
        "deepseek",
        ("DeepseekForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"),
        scales_outputs=True,
    ),
    # Mixtures of experts; some have dense MLPs in their first layers, under the same name.
    Family(
        "moe",
        (
            *("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "Param2MoEForCausalLM"),
            *("Ernie4_5_MoeForCausalLM", "Glm4MoeForCausalLM", "HYV3ForCausalLM", "LagunaForCausalLM"),
            *("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM", "ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),
            *("HunYuanMoEV1ForCausalLM", "MellumForCausalLM"),
        ),
    ),
    Family(
        "bailing_moe",
        ("BailingMoeForCausalLM", "BailingMoeV2ForCausalLM", "SarvamMoEForCausalLM"),
        _attention("attention", output="dense"),
    ),
    # The router and all experts of a mixture, which Transformers calls `mlp`.
    Family(
        "mixtral",
        ("MixtralForCausalLM", "MiniMaxM2ForCausalLM", "PhiMoEForCausalLM"),
        mlp=Sublayer("block_sparse_moe", "post_attention_layernorm", "w2", in_transformers="mlp"),
    ),
    Family(
        "granitemoe",
        ("GraniteMoeForCausalLM",),
        mlp=Sublayer("block_sparse_moe", "post_attention_layernorm", "output_linear"),
    ),
    Family(
        "granitemoeshared",
        ("GraniteMoeSharedForCausalLM",),
        mlp=Sublayer(
            "block_sparse_moe",
            "post_attention_layernorm",
            "output_linear",
            also=("shared_mlp",),
            optional=("shared_mlp",),
        ),
    ),
    Family(
        "gpt_oss",
        ("GptOssForCausalLM",),
        _attention(in_vllm="attn"),
        Sublayer("mlp", "post_attention_layernorm", "down_proj", transformers_tuple=2),
    ),
    # A norm on either side of each sublayer.
    Family(
        "gemma2",
        ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Rnj1ForCausalLM"),
        _attention(post_norm="post_attention_layernorm"),
        Sublayer("mlp", "pre_feedforward_layernorm", "down_proj", "post_feedforward_layernorm"),
    ),
    Family(
        "glm4",
        ("Glm4ForCausalLM",),
        _attention(post_norm="post_self_attn_layernorm"),
        Sublayer("mlp", "post_attention_layernorm", "down_proj", "post_mlp_layernorm"),
    ),
    Family(
        "afmoe",
        ("AfmoeForCausalLM",),
        _attention(post_norm="post_attention_layernorm"),
        Sublayer("mlp", "pre_mlp_layernorm", "down_proj", "post_mlp_layernorm"),
    ),
    Family(
        "hyperclovax",
        ("HyperCLOVAXForCausalLM",),
        _attention(post_norm="post_norm1", optional=("post_norm1",)),
        Sublayer("mlp", "post_attention_layernorm", "down_proj", "post_norm2", optional=("post_norm2",)),
    ),
    # A norm after each sublayer only.
    Family(
        "olmo2",
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM", "FlexOlmoForCausalLM", "Exaone4ForCausalLM"),
        _attention(pre_norm=None, post_norm="post_attention_layernorm"),
        Sublayer("mlp", None, "down_proj", "post_feedforward_layernorm"),
    ),
    # Attention and MLP side by side, behind one norm or two.
    Family(
        "cohere",
        ("CohereForCausalLM", "Cohere2ForCausalLM", "Cohere2MoeForCausalLM"),
        _attention(pre_norm=None),
        Sublayer("mlp", None, "down_proj"),
        parallel=True,
    ),
    Family(
        "phi",
        ("PhiForCausalLM",),
        _attention(pre_norm=None, output="dense"),
        Sublayer("mlp", None, "fc2"),
        parallel=True,
    ),
    Family(
        "gptj",
        ("GPTJForCausalLM",),
        _attention("attn", None, "out_proj"),
        Sublayer("mlp", None, "fc_out"),
        parallel=True,
        transformers_layer_tuple=True,
    ),
    # GPT-2's habits.
    Family(
        "gpt2",
        ("GPT2LMHeadModel", "GPTBigCodeForCausalLM"),
        _attention("attn", "ln_1", "c_proj"),
        Sublayer("mlp", "ln_2", "c_proj"),
    ),
)

EXPLICIT_PREFIX = "Dropped"
BY_ARCHITECTURE = MappingProxyType({name: family for family in FAMILIES for name in family.architectures})


def family_of(architecture: str) -> Family | None:
    """The row for an architecture name, plain or explicit (`DroppedLlamaForCausalLM`); None where there is none."""
    return BY_ARCHITECTURE.get(architecture.removeprefix(EXPLICIT_PREFIX))
