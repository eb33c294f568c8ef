"""One tiny random checkpoint per wrapper, made by Transformers' own classes from its own config class."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from tests.architectures.cases import (
    GATED_DELTA_NET,
    GEMMA4,
    GEMMA4_E,
    GEMMA4_MIXTURE,
    LAYERS,
    SHORT_CONVOLUTION,
    TINY,
    randomized,
    save,
    tiny_entries,
)

PARTS = ("vision_config", "audio_config", "encoder_config", "projector_config", "qformer_config")

# Given to every vision and audio config that has the attribute. As many blocks as there are decoder layers: a mask that
# went astray would find them all.
TINY_TOWER = {
    "hidden_size": 64,
    "embed_dim": 64,
    "d_model": 64,
    "out_hidden_size": 128,
    "projection_dim": 64,
    "output_dim": 128,
    "intermediate_size": 96,
    "encoder_ffn_dim": 96,
    "num_hidden_layers": LAYERS,
    "encoder_layers": LAYERS,
    "depth": LAYERS,
    "num_attention_heads": 2,
    "encoder_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "max_source_positions": 50,
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "num_position_embeddings": 16,
    "hidden_dim": 64,
    "num_layers": LAYERS,
    "encoder_hidden_size": 64,
    "vision_output_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "mm_embed_dim": 64,
    "mm_posemb_size": 16,
    "output_proj_dims": 64,
    "position_embedding_size": 64,
}


@dataclass(frozen=True)
class WrapperCase:
    """A wrapper's tiny model: Transformers' model type, its tower's where that can be chosen, what else is needed."""

    architecture: str
    model_type: str
    tower: str = ""
    layout: str = ""
    text: dict[str, Any] = field(default_factory=dict)
    part: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    renames: dict[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.architecture, self.tower, self.layout)))

    def with_overrides(self, **entries: Any) -> Self:
        """The case with these entries on top of its config."""
        return replace(self, overrides=self.overrides | entries)

    def config(self) -> PretrainedConfig:
        stock = CONFIG_MAPPING[self.model_type]
        default = stock()
        text = CONFIG_MAPPING[self.tower] if self.tower else type(default.get_text_config())
        entries: dict[str, Any] = {
            "text_config": {"model_type": text.model_type} | tiny_entries(text, TINY) | self.text
        }
        for part in PARTS:
            if (own := getattr(default, part, None)) is not None:
                tiny = tiny_entries(type(own), TINY_TOWER)
                entries[part] = {"model_type": own.model_type} | tiny | self.part
        return stock(**entries | self.overrides, architectures=[self.architecture])

    def model(self, seed: int = 0) -> PreTrainedModel:
        """In float32, with every parameter random."""
        config = self.config()
        config._attn_implementation = "eager"
        return randomized(MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)](config).float().eval(), seed)

    def load(self, directory: Path) -> PreTrainedModel:
        """A checkpoint of this case in Transformers' own class."""
        stock = MODEL_FOR_MULTIMODAL_LM_MAPPING[CONFIG_MAPPING[self.model_type]]
        return stock.from_pretrained(directory, attn_implementation="eager").eval()

    def write(self, directory: Path, seed: int = 0) -> Path:
        """As a checkpoint in the names that published ones have."""
        return self.save(self.model(seed), directory)

    def save(self, model: PreTrainedModel, directory: Path) -> Path:
        """Save a model of this case, likewise."""
        save(model, self.architecture, directory)
        weights = directory / "model.safetensors"
        tensors = {self._published(name): self._laid_out(name, each) for name, each in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        return directory

    def _laid_out(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2).contiguous() if name.endswith(self.transposed or " ") else tensor

    def _published(self, name: str) -> str:
        ours = next((ours for ours in self.renames if name.startswith(ours)), "")
        return self.renames.get(ours, "") + name.removeprefix(ours)


VISION_MODEL = {"vision_tower.": "vision_tower.vision_model."}
NESTED_VISION_MODEL = {"model.vision_tower.": "model.vision_tower.vision_model."}
AUDIO = {"language_model.model.model.": "language_model.model."}
# Transformers runs these with images only.
WANTS_IMAGES = {"Blip2ForConditionalGeneration-opt"}


def mrope(*sections: int, **entries: Any) -> dict[str, Any]:
    """Rotary position embeddings in three sections, for a quarter, or so, of a head's size each."""
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*sections]}
    return {"rope_parameters": parameters | entries}


QWEN3_5 = GATED_DELTA_NET | mrope(2, 1, 1, partial_rotary_factor=0.25, mrope_interleaved=True)
GEMMA4_VISION = {"model_type": "gemma4_vision"} | {
    entry: TINY_TOWER[entry]
    for entry in ("hidden_size", "intermediate_size", "num_hidden_layers", "position_embedding_size")
}

WRAPPER_CASES = {
    case.name: case
    for case in (
        WrapperCase("LlavaForConditionalGeneration", "llava", "llama", renames=VISION_MODEL),
        WrapperCase("LlavaNextForConditionalGeneration", "llava_next", "mistral", renames=VISION_MODEL),
        WrapperCase("LlavaNextVideoForConditionalGeneration", "llava_next_video", "llama", renames=VISION_MODEL),
        WrapperCase("LlavaOnevisionForConditionalGeneration", "llava_onevision", "qwen2", renames=VISION_MODEL),
        WrapperCase("Mistral3ForConditionalGeneration", "mistral3", "mistral"),
        WrapperCase("PaliGemmaForConditionalGeneration", "paligemma", "gemma", renames=VISION_MODEL),
        WrapperCase("Gemma3ForConditionalGeneration", "gemma3", renames=VISION_MODEL),
        WrapperCase("Qwen2VLForConditionalGeneration", "qwen2_vl", text=mrope(4, 6, 6)),
        WrapperCase("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", text=mrope(4, 6, 6)),
        WrapperCase("Qwen3VLForConditionalGeneration", "qwen3_vl"),
        WrapperCase(
            "Qwen3VLMoeForConditionalGeneration",
            "qwen3_vl_moe",
            text={"norm_topk_prob": True},
            transposed=("experts.gate_up_proj", "experts.down_proj"),
        ),
        WrapperCase("Llama4ForConditionalGeneration", "llama4", text={"num_experts_per_tok": 1}),
        WrapperCase("Idefics3ForConditionalGeneration", "idefics3", "llama"),
        WrapperCase("SmolVLMForConditionalGeneration", "smolvlm", "llama"),
        WrapperCase("InternVLForConditionalGeneration", "internvl", "qwen2"),
        WrapperCase(
            "Cohere2VisionForConditionalGeneration",
            "cohere2_vision",
            renames=NESTED_VISION_MODEL,
            overrides={"alignment_intermediate_size": 128},
        ),
        WrapperCase("Glm4vForConditionalGeneration", "glm4v", text=mrope(2, 3, 3, partial_rotary_factor=0.5)),
        WrapperCase(
            "Glm4vMoeForConditionalGeneration",
            "glm4v_moe",
            text={"head_dim": 32, "use_qk_norm": False} | mrope(2, 3, 3, partial_rotary_factor=0.5),
        ),
        WrapperCase("GlmOcrForConditionalGeneration", "glm_ocr", text=mrope(2, 3, 3, partial_rotary_factor=0.5)),
        WrapperCase("Blip2ForConditionalGeneration", "blip-2", "opt", text={"ffn_dim": 256}),
        WrapperCase(
            "LightOnOCRForConditionalGeneration",
            "lighton_ocr",
            "qwen3",
            overrides={"vision_feature_layer": -1, "projector_hidden_act": "gelu", "multimodal_projector_bias": False},
        ),
        WrapperCase("Qwen2AudioForConditionalGeneration", "qwen2_audio", "qwen2", renames=AUDIO),
        WrapperCase("GraniteSpeechForConditionalGeneration", "granite_speech", "granite", renames=AUDIO),
        WrapperCase("GlmAsrForConditionalGeneration", "glmasr", "llama", renames=AUDIO),
        WrapperCase("PaddleOCRVLForConditionalGeneration", "paddleocr_vl", text=mrope(4, 6, 6)),
        WrapperCase("Exaone4_5_ForConditionalGeneration", "exaone4_5", part={"num_key_value_heads": 2}),
        # Towers that are hybrids
        WrapperCase("Qwen3_5ForConditionalGeneration", "qwen3_5", text=QWEN3_5),
        WrapperCase("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", text=QWEN3_5),
        WrapperCase("MiniCPMV4_6ForConditionalGeneration", "minicpmv4_6", text=QWEN3_5),
        WrapperCase(
            "Lfm2VlForConditionalGeneration",
            "lfm2_vl",
            text=SHORT_CONVOLUTION | {"conv_dim": 128, "block_dim": 128},
            part={"vision_use_head": False},
            renames=NESTED_VISION_MODEL,
        ),
        WrapperCase(
            "Gemma4ForConditionalGeneration", "gemma4", text=GEMMA4, overrides={"vision_config": GEMMA4_VISION}
        ),
        WrapperCase(
            "Gemma4ForConditionalGeneration",
            "gemma4",
            layout="shared keys and a mixture",
            text=GEMMA4 | GEMMA4_MIXTURE | GEMMA4_E,
            overrides={"vision_config": GEMMA4_VISION},
        ),
        WrapperCase(
            "Gemma4UnifiedForConditionalGeneration",
            "gemma4_unified",
            text=GEMMA4,
            overrides={
                "vision_config": {"model_type": "gemma4_unified_vision"}
                | {entry: TINY_TOWER[entry] for entry in ("mm_embed_dim", "mm_posemb_size", "output_proj_dims")}
            },
        ),
    )
}
