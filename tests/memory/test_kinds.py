"""What an architecture's KV cache costs, told from configs as they are published: without what goes without saying."""

import json

import pytest

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.evaluation.inspection import inspect_checkpoint
from llmdrop_vllm.memory.kinds import LayerKind, layer_kinds
from llmdrop_vllm.memory.layout import kv_layout
from llmdrop_vllm.scoring.scoring import score
from tests.architectures.cases import CASES

SIZES = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
# Numbers of one token in one layer: 2 heads of 32 values, keys and values, unless the architecture says otherwise.
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
    assert {kind.values for kind in layer_kinds(CASES[architecture].config().to_dict())} == {values}


def test_chunked_attention_is_stored_apart_from_full_attention():
    config = SIZES | {"layer_types": ["chunked_attention"] * 3 + ["full_attention"], "attention_chunk_size": 8192}
    kinds = layer_kinds(config)
    assert tuple(map(str, kinds)) == ("chunked 8192",) * 3 + ("full",)
    assert kv_layout(kinds).token_values == 4 * 256
    assert kv_layout(kinds).block_values == 256


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Cohere2ForCausalLM"])
def test_kinds_that_config_json_leaves_to_the_architecture(architecture, tmp_path):
    """Published configs of Gemma 2 name a window, and not the layers that have none."""
    whole = CASES[architecture].write(tmp_path)
    expected = tuple(map(str, layer_kinds(CASES[architecture].config().to_dict())))
    assert len(set(expected)) == 2
    path = whole / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_bytes()).items() if k != "layer_types"}))
    checkpoint = Checkpoint.open(whole)
    assert len(set(layer_kinds(checkpoint.config))) == 1
    (tmp_path / "ids.json").write_text(json.dumps([[5, 6, 7, 8]]))
    assert score(checkpoint, load_calibration(checkpoint, str(tmp_path / "ids.json"))).kv_groups == expected
    found = inspect_checkpoint(checkpoint, memory_bytes=1 << 30)
    assert found.kv_layout == kv_layout([*map(LayerKind.parse, expected)]).describe()
