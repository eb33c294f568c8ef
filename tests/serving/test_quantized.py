"""A quantized model with a mask: as the same model after surgery, whatever its list of unquantized layers names, and
with scales for the KV cache of attention that is gone.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.checkpoints.files import MASK
from tests.engines import engine, greedy
from tests.tiny import TINY_LLAMA, write_checkpoint

PROMPT = [*range(3, 40)]
IN_FULL = "model.layers.2.self_attn.o_proj"  # which the mask drops
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", IN_FULL, "model.layers.99.mlp.down_proj"],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """8-bit weights, one scale for each row and two for each layer's KV cache, as llm-compressor writes them."""
    directory = tmp_path_factory.mktemp("quantized") / "model"
    path = write_checkpoint(directory, TINY_LLAMA | {"quantization_config": W8A8}) / "model.safetensors"
    tensors = {}
    for name, value in load_file(path).items():
        tensors[name] = value.bfloat16()
        if "_proj" in name and not name.startswith(IN_FULL):
            scale = value.abs().amax(1, keepdim=True) / 127
            tensors[name] = (value / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale.bfloat16()
        for kind in ("k", "v"):
            if name.endswith(f".{kind}_proj.weight"):
                tensors[name.replace("_proj.weight", "_scale")] = torch.tensor([0.5], dtype=torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def test_served_with_a_mask_and_after_surgery_it_says_the_same(quantized, tmp_path):
    write(plan_surgery(quantized, MASK), tmp_path / "out")
    found = []
    for path, overrides in ((tmp_path / "out", {}), (quantized, MASK.to_config("runtime"))):
        with engine(path, dtype="bfloat16", kv_cache_dtype="fp8", hf_overrides=overrides) as llm:
            found.append(greedy(llm, PROMPT))
    assert found[0] == found[1]
