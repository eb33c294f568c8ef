"""One tiny random checkpoint per architecture, made by Transformers' own classes from its own config class.

python -m tests.architectures.cases Glm4ForCausalLM OUT
"""

import json
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from llmdrop_vllm.architectures.families import family_of
from llmdrop_vllm.architectures.family import Family

LAYERS = 5
# Given to every config class that has the attribute.
TINY = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # GPT-2's names
    "n_layer": LAYERS,
    "n_embd": 128,
    "n_head": 4,
    "n_inner": 128,
    "n_positions": 512,
}
# The only size of latent vectors, 512 + 64, that vLLM's kernels for CPUs know.
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
}
RECURRENT, FULL = "linear_attention", "full_attention"
HYBRID = {"layer_types": [RECURRENT, RECURRENT, FULL, FULL, RECURRENT]}
# A prompt is of several chunks; Transformers fills the last one up, and published chunks are of 256 tokens.
CHUNK = 32
MAMBA2 = HYBRID | {
    **{"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1},
    "mamba_chunk_size": CHUNK,
}
SHORT_CONVOLUTION = {
    "layer_types": ["conv", "conv", FULL, FULL, "conv"],
    "conv_L_cache": 3,
    "block_auto_adjust_ff_dim": False,
}
GATED_DELTA_NET = HYBRID | {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}

GEMMA4 = {
    **{"layer_types": ["sliding_attention"] * 4 + [FULL], "num_kv_shared_layers": 0, "sliding_window": 16},
    **{"hidden_size_per_layer_input": 0, "global_head_dim": 64, "vocab_size_per_layer_input": 256},
    "num_experts": None,
}
SLIDING = "sliding_attention"
GEMMA4_MIXTURE = {
    **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
    # As in the published one, keys are values in layers of full attention.
    **{"attention_k_eq_v": True, "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL]},
}
# Layer 3 reads what layer 1 keeps, and layer 4 what layer 2 does.
SHARED_KEYS = {"layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL], "num_kv_shared_layers": 2}
GEMMA4_E = SHARED_KEYS | {"hidden_size_per_layer_input": 16, "use_double_wide_mlp": True}
# vLLM's reads the keys and values of the two layers before the first that has none, by their order.
GEMMA3N = SHARED_KEYS | {
    **{"sliding_window": 16, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256, "laurel_rank": 8},
    **{"altup_num_inputs": 2, "activation_sparsity_pattern": [0.5] + [0.0] * 4},
}


@dataclass(frozen=True)
class Case:
    """An architecture's tiny model: Transformers' model type, and what its config needs beyond `TINY`.

    `layout` tells an architecture's models apart where their layers have other layouts. `zeros` are the endings of
    names of parameters that vLLM, on CPUs at least, leaves out of its computation. `needs` is a package that vLLM
    imports with the model, and that not every installation has.
    """

    architecture: str
    model_type: str
    overrides: dict[str, Any] = field(default_factory=dict)
    layout: str = ""
    zeros: tuple[str, ...] = ()
    needs: str | None = None

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.architecture, self.layout)))

    @property
    def family(self) -> Family:
        family = family_of(self.architecture, self.config())
        assert family is not None, f"no row fits {self.name}"
        return family

    def config(self) -> PretrainedConfig:
        entries = tiny_entries(CONFIG_MAPPING[self.model_type], TINY) | self.overrides
        return CONFIG_MAPPING[self.model_type](**entries, architectures=[self.architecture])

    def model(self, seed: int = 0) -> PreTrainedModel:
        """In float32, with every parameter random: norms near one, biases and the rest small."""
        config = self.config()
        config._attn_implementation = "eager"  # the others leave out soft caps on attention logits
        model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).float().eval()
        assert model.num_parameters() < 3e6, f"{self.name} is not tiny: name its sizes in overrides. {config}"
        return randomized(model, seed, self.zeros)

    def write(self, directory: Path, seed: int = 0) -> Path:
        """As a checkpoint in the names that published ones have."""
        return self.save(self.model(seed), directory)

    def save(self, model: PreTrainedModel, directory: Path) -> Path:
        """Save a model of this case."""
        return save(model, self.architecture, directory)


def tiny_entries(stock: type[PretrainedConfig], tiny: dict[str, Any]) -> dict[str, Any]:
    """Those of the entries that a config class has."""
    known = stock().to_dict()
    computed = {key for key in tiny if isinstance(getattr(stock, key, None), property)}
    return {key: value for key, value in tiny.items() if key in known and key not in computed}


def randomized(model: PreTrainedModel, seed: int, zeros: tuple[str, ...] = ()) -> PreTrainedModel:
    """Every parameter random: norms near one, biases and the rest small, those that end like one of `zeros` zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                is_norm = tensor.dim() == 1 and name.endswith("weight")
                spread = (tensor.shape[-1] if tensor.dim() > 1 else 100) ** -0.5
                # Some parameters are bfloat16 whatever the model is: Apertus' activation in vLLM.
                tensor.copy_((noise * spread + is_norm).bfloat16() * (not name.endswith(zeros)))
                if name.endswith("layer_scalar"):  # of a whole layer's output, which no sublayer is to blame for
                    tensor.fill_(1)
    return model


def save(model: PreTrainedModel, architecture: str, directory: Path) -> Path:
    """As a checkpoint of an architecture that Transformers may spell otherwise."""
    model.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"architectures": [architecture]}))
    return directory


CASES = {
    case.name: case
    for case in (
        Case("LlamaForCausalLM", "llama"),
        Case("MistralForCausalLM", "mistral"),
        Case("Ministral3ForCausalLM", "ministral3"),
        Case("Qwen2ForCausalLM", "qwen2"),
        Case("Qwen3ForCausalLM", "qwen3"),
        Case("GemmaForCausalLM", "gemma"),
        Case("Phi3ForCausalLM", "phi3"),
        Case("GraniteForCausalLM", "granite"),
        Case("StableLmForCausalLM", "stablelm"),
        Case("NemotronForCausalLM", "nemotron"),
        Case("Ernie4_5ForCausalLM", "ernie4_5"),
        Case("Llama4ForCausalLM", "llama4_text", {"num_experts_per_tok": 1}),
        Case("MiniCPM3ForCausalLM", "minicpm3", MLA | {"head_dim": 128}),
        Case("DeepseekV2ForCausalLM", "deepseek_v2", MLA | YARN | {"head_dim": 64}),
        Case(
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            MLA | YARN | {"head_dim": 64, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        ),
        Case(
            "Glm4MoeLiteForCausalLM",
            "glm4_moe_lite",
            MLA
            | YARN
            | {"head_dim": 64, "first_k_dense_replace": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        ),
        Case("Qwen2MoeForCausalLM", "qwen2_moe"),
        Case("Qwen3MoeForCausalLM", "qwen3_moe"),
        Case("OlmoeForCausalLM", "olmoe"),
        Case("Glm4MoeForCausalLM", "glm4_moe", {"head_dim": 32}),
        Case("ExaoneMoeForCausalLM", "exaone_moe"),
        Case("MixtralForCausalLM", "mixtral"),
        Case("GraniteMoeForCausalLM", "granitemoe"),
        Case("GraniteMoeSharedForCausalLM", "granitemoeshared", {"shared_intermediate_size": 32}),
        Case("GptOssForCausalLM", "gpt_oss"),
        Case("Gemma2ForCausalLM", "gemma2"),
        Case("Gemma3ForCausalLM", "gemma3_text"),
        Case("Gemma4ForCausalLM", "gemma4_text", GEMMA4),
        Case("Gemma4ForCausalLM", "gemma4_text", GEMMA4 | GEMMA4_MIXTURE, "mixture"),
        Case("Gemma4ForCausalLM", "gemma4_text", GEMMA4 | GEMMA4_E, "shared keys"),
        Case("Gemma3nForCausalLM", "gemma3n_text", GEMMA3N),
        Case("Glm4ForCausalLM", "glm4"),
        Case("AfmoeForCausalLM", "afmoe", {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}),
        Case("HyperCLOVAXForCausalLM", "hyperclovax"),
        Case("Exaone4ForCausalLM", "exaone4"),
        Case("CohereForCausalLM", "cohere", {"logit_scale": 1.0}),
        Case("Cohere2ForCausalLM", "cohere2", {"logit_scale": 1.0}),
        Case("Cohere2MoeForCausalLM", "cohere2_moe", {"logit_scale": 1.0}),
        Case("GPTJForCausalLM", "gptj", {"rotary_dim": 16}),
        Case("GPT2LMHeadModel", "gpt2"),
        Case("AXK1ForCausalLM", "axk1", MLA | YARN | {"head_dim": 64, "first_k_dense_replace": 0}),
        Case("BloomForCausalLM", "bloom"),
        Case("FalconForCausalLM", "falcon", {"multi_query": True}),
        Case("FalconForCausalLM", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "two norms"),
        Case(
            "FalconForCausalLM",
            "falcon",
            {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
            "grouped queries, one norm",
        ),
        Case(
            "FalconForCausalLM",
            "falcon",
            {"parallel_attn": False, "multi_query": False, "bias": True},
            "sequential",
        ),
        Case("GraniteSWAForCausalLM", "granite_swa"),
        Case("GraniteMoeSWAForCausalLM", "granitemoe_swa", {"shared_intermediate_size": 32}),
        Case("OPTForCausalLM", "opt", {"ffn_dim": 96, "word_embed_proj_dim": 128}),
        Case("PhiMoEForCausalLM", "phimoe", {"attention_bias": True, "lm_head_bias": True}, zeros=("lm_head.bias",)),
        Case("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", zeros=("e_score_correction_bias",)),
        # Hybrids: recurrent mixers in all layers but two, or with attention beside them
        Case("GraniteMoeHybridForCausalLM", "granitemoehybrid", MAMBA2 | {"shared_intermediate_size": 32}),
        Case(
            "GraniteMoeHybridForCausalLM",
            "granitemoehybrid",
            MAMBA2 | {"shared_intermediate_size": 96, "num_local_experts": 0},
            "dense",
        ),
        Case(
            "FalconH1ForCausalLM",
            "falcon_h1",
            {key: MAMBA2[key] for key in MAMBA2 if key != "layer_types"} | {"mamba_d_ssm": 256},
        ),
        Case(
            "NemotronHForCausalLM",
            "nemotron_h",
            {"hybrid_override_pattern": "*M-*-", "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16}
            | {"n_groups": 1, "chunk_size": CHUNK},
        ),
        Case("Lfm2ForCausalLM", "lfm2", SHORT_CONVOLUTION | {"conv_dim": 128, "block_dim": 128, "block_ff_dim": 96}),
        Case("Lfm2MoeForCausalLM", "lfm2_moe", SHORT_CONVOLUTION | {"num_dense_layers": 1}),
        Case("JambaForCausalLM", "jamba", {"attn_layer_period": 3, "attn_layer_offset": 0, "mamba_dt_rank": 8}),
        Case("Qwen3NextForCausalLM", "qwen3_next", GATED_DELTA_NET),
        Case("Qwen3_5ForCausalLM", "qwen3_5_text", GATED_DELTA_NET, needs="torchvision"),
        Case("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", GATED_DELTA_NET, needs="torchvision"),
        # Through vLLM's Transformers backend
        Case("ArceeForCausalLM", "arcee"),
        Case("CwmForCausalLM", "cwm"),
        Case("FlexOlmoForCausalLM", "flex_olmo"),
        Case("GlmForCausalLM", "glm"),
        Case("GPTNeoXForCausalLM", "gpt_neox"),
        Case("GPTNeoXForCausalLM", "gpt_neox", {"use_parallel_residual": False}, "sequential"),
        Case("GPTBigCodeForCausalLM", "gpt_bigcode", {"num_key_value_heads": 1}),
        Case("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense"),
        Case("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe"),
        Case("Jais2ForCausalLM", "jais2"),
        Case("MellumForCausalLM", "mellum"),
        Case("OlmoForCausalLM", "olmo"),
        Case("Olmo2ForCausalLM", "olmo2"),
        Case("Olmo3ForCausalLM", "olmo3"),
        Case("PhiForCausalLM", "phi"),
        Case("SeedOssForCausalLM", "seed_oss"),
        Case("SmolLM3ForCausalLM", "smollm3"),
        Case("Starcoder2ForCausalLM", "starcoder2"),
        Case("VaultGemmaForCausalLM", "vaultgemma"),
    )
}


@cache
def model_of(name: str) -> PreTrainedModel:
    """A case's model, one for all tests of a process: whoever changes it changes it back."""
    return CASES[name].model()


if __name__ == "__main__":
    CASES[sys.argv[1]].write(Path(sys.argv[2]))
