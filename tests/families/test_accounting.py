"""What an architecture's KV cache costs, told from configs as they are published: without what goes without saying."""

import json

import pytest

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.inspection import inspect_checkpoint
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.memory.accounting import kept_layout, kv_bytes_per_layer_token, kv_kinds
from llmdrop_vllm.scoring.scoring import score
from tests.families.cases import CASES, LAYERS

# Bytes of one token in one layer: 2 heads of 32 values, keys and values, unless the architecture says otherwise.
OTHERS = {
    "MiniCPM3ForCausalLM": 2 * 4 * 128,
    "AXK1ForCausalLM": 512 + 64,
    "BloomForCausalLM": 2 * 4 * 32,
    "FalconForCausalLM": 2 * 1 * 32,
    "FalconForCausalLM-sequential": 2 * 4 * 32,
    "GPTNeoXForCausalLM": 2 * 4 * 32,
    "GPTNeoXForCausalLM-sequential": 2 * 4 * 32,
    "OPTForCausalLM": 2 * 4 * 32,
    "DeepseekV2ForCausalLM": 512 + 64,
    "DeepseekV3ForCausalLM": 512 + 64,
    "Glm4MoeLiteForCausalLM": 512 + 64,
    "GPTJForCausalLM": 2 * 4 * 32,
    "GPT2LMHeadModel": 2 * 4 * 32,
    "GPTBigCodeForCausalLM": 2 * 1 * 32,
}


@pytest.mark.parametrize("architecture", CASES)
def test_bytes_of_a_token(architecture):
    values = OTHERS.get(architecture, 2 * 2 * 32)
    assert kv_bytes_per_layer_token(CASES[architecture].config().to_dict(), "bfloat16") == 2 * values


def test_chunked_attention_is_stored_apart_from_full_attention():
    config = {"layer_types": ["chunked_attention"] * 3 + ["full_attention"], "attention_chunk_size": 8192}
    assert kv_kinds(config) == ("chunked 8192",) * 3 + ("full",)
    assert kept_layout(config, DropMask(4)).stored_layers == 4
    assert kept_layout(config, DropMask(4)).group_size == 1


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Cohere2ForCausalLM"])
def test_kinds_that_config_json_leaves_to_the_architecture(architecture, tmp_path):
    """Published configs of Gemma 2 name a window, and not the layers that have none."""
    whole = CASES[architecture].write(tmp_path)
    expected = kv_kinds(CASES[architecture].config().to_dict())
    assert len(set(expected)) == 2
    path = whole / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_bytes()).items() if k != "layer_types"}))
    checkpoint = Checkpoint.open(whole)
    assert len(set(kv_kinds(checkpoint.config))) == 1
    (tmp_path / "ids.json").write_text(json.dumps([[5, 6, 7, 8]]))
    assert score(checkpoint, load_calibration(checkpoint, str(tmp_path / "ids.json"))).kv_groups == expected
    found = inspect_checkpoint(checkpoint, memory_bytes=1 << 30)
    layout = kept_layout({"layer_types": CASES[architecture].config().layer_types}, DropMask(LAYERS))
    assert found.kv_layout == layout.describe()
