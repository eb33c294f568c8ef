"""Whatever vLLM can serve, a config without a mask is left as it was, and stock code builds the model."""

from types import SimpleNamespace

import pytest
from torch import nn
from transformers import PretrainedConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.plugins import load_general_plugins

from llmdrop_vllm.serving.config_hook import ConfigHook, checked_decoder
from llmdrop_vllm.serving.models import Droppable

load_general_plugins()


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"num_hidden_layers": 2, "head_dim": 16, "per_layer_config": {"1": {"head_dim": 32}}},
        {"text_config": {"num_layers": 2}},
    ],
)
def test_a_config_without_a_mask_is_nobodys_business_in_any_architecture(entries):
    """Whatever else it lacks: wrappers build text models with configs that tell nothing of layers."""
    config = PretrainedConfig(**entries)
    before = config.to_dict()
    model = SimpleNamespace(hf_config=config, hf_text_config=config, hf_config_path=None, model="nowhere")
    architectures = [name for name in ModelRegistry.get_supported_archs() if not name.startswith("Dropped")]
    assert len(architectures) > 300
    for architecture in architectures:
        assert isinstance(MODELS_CONFIG_MAP[architecture], ConfigHook)
        decoder = checked_decoder(architecture, model)
        assert decoder is None or not decoder.mask, architecture
    assert config.to_dict() == before


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_a_text_model_inside_a_wrapper_is_built_by_stock_code(architecture):
    """Qwen2.5-VL gives its text model the outer config."""
    built = []

    class Stock(nn.Module):
        def __init__(self, *, vllm_config, prefix=""):
            super().__init__()
            built.append((vllm_config, prefix))

    outer = PretrainedConfig(text_config={"num_hidden_layers": 2}, vision_config={"depth": 1})
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=outer, model="nowhere", runner="generate"))
    droppable = type(architecture, (Droppable, Stock), {"architecture": architecture})
    model = droppable(vllm_config=config, prefix="language_model")
    assert built == [(config, "language_model")]
    assert model.dropping is None
