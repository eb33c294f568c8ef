"""Wrappers whose checkpoints Transformers does not make: a tiny config for each, and weights that are made up."""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from llmdrop_vllm import DropMask
from llmdrop_vllm.architectures.family import Family
from llmdrop_vllm.architectures.names import BEFORE_LAYER
from tests.architectures.cases import LAYERS, MLA, TINY, tiny_entries
from tests.architectures.wrapper_cases import TINY_TOWER, mrope

Entries = dict[str, Any]


def text(model_type: str, **entries: Any) -> Entries:
    return {"model_type": model_type} | tiny_entries(CONFIG_MAPPING[model_type], TINY) | entries


def part(model_type: str, **entries: Any) -> Entries:
    return {"model_type": model_type} | tiny_entries(CONFIG_MAPPING[model_type], TINY_TOWER) | entries


BLOCKS = {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 96}
SQUARE = {"image_size": 28, "patch_size": 14}
ONEVISION = {
    "model_type": "llava_onevision",
    "text_config": text("qwen3"),
    "vision_config": part("siglip_vision_model"),
}
OMNI = {
    "model_type": "qwen2_5_omni",
    "thinker_config": {
        "model_type": "qwen2_5_omni_thinker",
        "text_config": text("qwen2_5_omni_text", **mrope(4, 6, 6)),
        "audio_config": part("qwen2_5_omni_audio_encoder", output_dim=128),
        "vision_config": part("qwen2_5_omni_vision_encoder", out_hidden_size=128),
    },
}
BARE: dict[str, Entries] = {
    "AudioFlamingo3ForConditionalGeneration": {
        "model_type": "audioflamingo3",
        "text_config": text("qwen2"),
        "audio_config": part("audioflamingo3_encoder"),
    },
    "BeeForConditionalGeneration": ONEVISION,
    "RForConditionalGeneration": ONEVISION,
    "Cosmos3ForConditionalGeneration": {
        "model_type": "qwen3_vl",
        "text_config": text("qwen3_vl_text"),
        "vision_config": part("qwen3_vl_vision", out_hidden_size=128),
    },
    "GraniteSpeechPlusForConditionalGeneration": {"model_type": "granite_speech_plus", "text_config": text("granite")},
    "KimiVLForConditionalGeneration": {
        "model_type": "kimi_vl",
        "text_config": text("deepseek_v3", **MLA, head_dim=64, topk_method="noaux_tc", scoring_func="sigmoid"),
        "vision_config": BLOCKS | {"patch_size": 14, "init_pos_emb_height": 4, "init_pos_emb_width": 4},
    },
    "MossTranscribeDiarizeForConditionalGeneration": {
        "model_type": "moss_transcribe_diarize",
        "text_config": text("qwen3"),
        "audio_config": part("whisper"),
    },
    "OpenCUAForConditionalGeneration": {
        "model_type": "qwen2_5_vl",
        "text_config": text("qwen2"),
        "vision_config": part("qwen2_5_vl_vision", out_hidden_size=128),
    },
    "Ovis": {
        "model_type": "ovis",
        "llm_config": text("qwen2"),
        "visual_tokenizer_config": {
            "model_type": "siglip_visual_tokenizer",
            "backbone_config": part("siglip_vision_model"),
            "vocab_size": 64,
        },
        "hidden_size": 128,
    },
    "QianfanOCRForConditionalGeneration": {
        "model_type": "qianfan_ocr",
        "text_config": text("qwen3"),
        "vision_config": BLOCKS | SQUARE,
    },
    "Qwen2_5OmniModel": OMNI,
    "Qwen2_5OmniForConditionalGeneration": OMNI,
    "Qwen3ASRForConditionalGeneration": {
        "model_type": "qwen3_asr",
        "thinker_config": {
            "model_type": "qwen3_asr_thinker",
            "text_config": text("qwen3", **mrope(4, 6, 6)),
            "audio_config": {
                "d_model": 64,
                "encoder_layers": LAYERS,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 96,
                "output_dim": 128,
                "downsample_hidden_size": 32,
                "num_mel_bins": 16,
            },
        },
    },
    "Step3VLForConditionalGeneration": {
        "model_type": "step3_vl",
        "text_config": {
            "model_type": "step3_text",
            "architectures": ["Step3TextForCausalLM"],
            "hidden_size": 128,
            "intermediate_size": 96,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_attention_groups": 1,
            "head_dim": 32,
            "share_q_dim": 64,
            "vocab_size": 256,
            "moe_intermediate_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "share_expert_dim": 32,
            "moe_layers_enum": "1,2,3,4",
            "rms_norm_eps": 1e-6,
            "max_position_embedding": 512,
        },
        "vision_config": BLOCKS | SQUARE | {"output_hidden_size": 64},
    },
}


def write(architecture: str, directory: Path) -> Path:
    """config.json and nothing else."""
    config = BARE[architecture] | {"architectures": [architecture], "torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@contextmanager
def made_up_weights(is_zero: Callable[[str], bool] = lambda name: False) -> Iterator[None]:
    """Within this context, vLLM's dummy loader gives every parameter random values that its name decides, or zeros."""

    def load(self: DummyModelLoader, model: nn.Module, model_config: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
                is_norm = parameter.dim() == 1 and name.endswith("weight")
                spread = (parameter.shape[-1] if parameter.dim() > 1 else 100) ** -0.5
                parameter.copy_((noise * spread + is_norm) * (not is_zero(name)))

    with patch.object(DummyModelLoader, "load_weights", load):
        yield


def last_projections(family: Family, mask: DropMask) -> Callable[[str], bool]:
    """Whether a parameter of vLLM's belongs to the last projection of a sublayer that the mask drops."""
    patterns = [
        (
            rf"{BEFORE_LAYER}({'|'.join(map(str, dropped))})\.({'|'.join((sublayer.vllm_modules[0], *sublayer.also))})",
            sublayer,
        )
        for sublayer, dropped in family.sublayers(mask)
    ]
    # Experts are in one parameter, whatever their checkpoints call them.
    endings = [re.compile(rf"{start}\.(.*\.)?({sublayer.output_ending}|w2_weight)") for start, sublayer in patterns]
    return lambda name: any(ending.fullmatch(name) for ending in endings)
