"""Architectures whose decoder is one part of several: for each, the text architecture whose layers its tower has."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Wrappers by their tower's architecture, NAMED where the tower's own config names it. MiniCPM-V's towers are of several
# kinds, all with Llama's layers.
NAMED = ""
_TOWERS = {
    NAMED: """
        BeeForConditionalGeneration Blip2ForConditionalGeneration Cohere2VisionForConditionalGeneration
        DeepseekVLV2ForCausalLM DeepseekOCRForCausalLM DeepseekOCR2ForCausalLM UnlimitedOCRForCausalLM
        Eagle2_5_VLForConditionalGeneration GraniteSpeechForConditionalGeneration
        GraniteSpeechPlusForConditionalGeneration H2OVLChatModel InternVLChatModel InternS1ForConditionalGeneration
        InternVLForConditionalGeneration Lfm2VlForConditionalGeneration LightOnOCRForConditionalGeneration
        Llama_Nemotron_Nano_VL LlavaForConditionalGeneration LlavaNextForConditionalGeneration
        LlavaNextVideoForConditionalGeneration LlavaOnevisionForConditionalGeneration NemotronH_Nano_Omni_Reasoning_V3
        NemotronH_Nano_VL_V2 NemotronH_Omni_Reasoning_V3 NemotronH_Super_Omni_Reasoning_V3
        Mistral3ForConditionalGeneration NVLM_D OpenVLAForActionPrediction Ovis Ovis2_5 Ovis2_6ForCausalLM
        Ovis2_6_MoeForCausalLM PaliGemmaForConditionalGeneration PixtralForConditionalGeneration
        QianfanOCRForConditionalGeneration RForConditionalGeneration SkyworkR1VChatModel StepVLForConditionalGeneration
        Step3VLForConditionalGeneration Step3p7ForConditionalGeneration UltravoxModel VoxtralForConditionalGeneration
        VoxtralRealtimeGeneration
    """,
    "ChatGLMModel": "GLM4VForCausalLM",
    "DeepseekV2ForCausalLM": "KimiVLForConditionalGeneration KimiK25ForConditionalGeneration",
    "Ernie4_5_MoeForCausalLM": "Ernie4_5_VLMoeForConditionalGeneration",
    "Ernie4_5ForCausalLM": "PaddleOCRVLForConditionalGeneration",
    "Exaone4ForCausalLM": "Exaone4_5_ForConditionalGeneration",
    "Gemma3ForCausalLM": "Gemma3ForConditionalGeneration",
    "Gemma3nForCausalLM": "Gemma3nForConditionalGeneration",
    "Gemma4ForCausalLM": "Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration",
    "Glm4ForCausalLM": "Glm4vForConditionalGeneration GlmOcrForConditionalGeneration",
    "Glm4MoeForCausalLM": "Glm4vMoeForConditionalGeneration",
    "GraniteForCausalLM": "Granite4VisionForConditionalGeneration",
    "LlamaForCausalLM": """
        GlmAsrForConditionalGeneration Idefics3ForConditionalGeneration KananaVForConditionalGeneration MiniCPMO
        MiniCPMV Phi3VForCausalLM Phi4MMForCausalLM SmolVLMForConditionalGeneration
    """,
    "Llama4ForCausalLM": "Llama4ForConditionalGeneration",
    "MiMoV2FlashForCausalLM": "MiMoV2OmniForCausalLM",
    "PanguEmbeddedForCausalLM": "OpenPanguVLForConditionalGeneration",
    "Phi3ForCausalLM": "Phi4ForCausalLMV",
    "Qwen2ForCausalLM": """
        AudioFlamingo3ForConditionalGeneration BagelForConditionalGeneration DotsOCRForCausalLM
        FireRedASR2ForConditionalGeneration MiDashengLMModel MoonshotKimiaForCausalLM OpenCUAForConditionalGeneration
        Qwen2AudioForConditionalGeneration Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration
        Qwen2_5OmniModel Qwen2_5OmniForConditionalGeneration
    """,
    "Qwen3ForCausalLM": """
        Cosmos3ForConditionalGeneration FunASRForConditionalGeneration FunAudioChatForConditionalGeneration
        IsaacForConditionalGeneration KeyeForConditionalGeneration KeyeVL1_5ForConditionalGeneration
        LlavaOnevision2ForConditionalGeneration MossAudioModel MossTranscribeDiarizeForConditionalGeneration
        Qwen3ASRForConditionalGeneration Qwen3ASRRealtimeGeneration Qwen3VLForConditionalGeneration
    """,
    "Qwen3MoeForCausalLM": """
        InternS1ProForConditionalGeneration Qwen3OmniMoeForConditionalGeneration Qwen3VLMoeForConditionalGeneration
    """,
    "Qwen3_5ForCausalLM": """
        MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration Qwen3_5ForConditionalGeneration
    """,
    "Qwen3_5MoeForCausalLM": "InternS2PreviewForConditionalGeneration Qwen3_5MoeForConditionalGeneration",
}
WRAPPERS = MappingProxyType({name: tower for tower, names in _TOWERS.items() for name in names.split()})
# Where a config keeps its decoder's entries; the first that is there counts.
PLACES = (
    *(("text_config",), ("llm_config",), ("language_config",), ("thinker_config", "text_config")),
    *(("wrapped_model_config",), ("lm_config",)),
)


def place_of(entries: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys under which a wrapper's config.json has its decoder's entries; none where they stand beside the rest."""
    return next((keys for keys in PLACES if isinstance(at(entries, keys), Mapping)), ())


def at(entries: Mapping[str, Any], place: tuple[str, ...]) -> Any:
    """What stands at a place; None where nothing does."""
    found: Any = entries
    for key in place:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def put(entries: Mapping[str, Any], place: tuple[str, ...], value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the entries with others at a place."""
    if not place:
        return dict(value)
    key, *rest = place
    return {**entries, key: put(entries.get(key) or {}, tuple(rest), value)}
