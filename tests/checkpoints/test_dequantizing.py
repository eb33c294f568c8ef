"""Weights that compressed-tensors has quantized, read as plain ones; others are refused with a way on."""

import json

import pytest
import torch
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from safetensors.torch import load_file, save_file

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.dequantizing import dequantized
from llmdrop_vllm.errors import CheckpointError
from tests.quantized import FORMATS, GROUP, PRESETS, quantize
from tests.tiny import TINY_LLAMA, write_checkpoint

MODULE = "model.layers.3.mlp.down_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plain"), TINY_LLAMA)


def by_hand(module):
    """A weight in bfloat16 from what is stored of its module, without the library."""
    scale = module["weight_scale"]
    if "weight_packed" not in module:
        return module["weight"].bfloat16() * scale
    whole = (module["weight_packed"][..., None] >> torch.arange(0, 32, 4)) & 15
    return ((whole.flatten(1).unflatten(1, (-1, GROUP)) - 8) * scale[..., None]).flatten(1)


def stored(tensor):
    tensor.read_into(content := bytearray(tensor.num_bytes))
    return torch.frombuffer(content, dtype=torch.bfloat16).view(tensor.shape)


@pytest.mark.parametrize("form", PRESETS)
def test_each_weight_is_its_numbers_times_their_scales(form, plain, tmp_path):
    model = quantize(plain, tmp_path / "model", form)
    found, original = dequantized(Checkpoint.open(model)).tensors, load_file(plain / "model.safetensors")
    tensors = load_file(model / "model.safetensors")
    assert original.keys() <= found.keys()
    for name, weight in original.items():
        module = name.removesuffix("weight")
        parts = {each.removeprefix(module): value for each, value in tensors.items() if each.startswith(module)}
        expected = by_hand(parts) if "weight_scale" in parts else parts["weight"]
        assert (found[name].dtype, found[name].shape) == ("BF16", tuple(weight.shape))
        assert torch.equal(stored(found[name]), expected)
        assert torch.allclose(expected.float(), weight, atol=0.15 * weight.abs().max())


def test_a_module_may_have_a_scheme_of_its_own_and_others_stay_as_they_are(plain, tmp_path):
    model = quantize(plain, tmp_path / "model", "W4A16", spared=(r"model\.layers\.0\.",))
    path = model / "model.safetensors"
    numbers, scale = torch.randint(-128, 128, (64, 128), dtype=torch.int8), torch.rand(64, 1).bfloat16()
    tensors = {name: value for name, value in load_file(path).items() if not name.startswith(MODULE)}
    save_file(tensors | {f"{MODULE}.weight": numbers, f"{MODULE}.weight_scale": scale}, path)
    config = json.loads((model / "config.json").read_text())
    own = preset_name_to_scheme("W8A16", [r"re:.*\.3\.mlp\.down_proj"]).model_dump(mode="json")
    own["format"] = "naive-quantized"
    config["quantization_config"]["config_groups"]["group_1"] = own
    (model / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(model)
    found = dequantized(checkpoint).tensors
    assert torch.equal(stored(found[f"{MODULE}.weight"]), numbers.bfloat16() * scale)
    name = "model.layers.0.mlp.up_proj.weight"
    assert found[name] is checkpoint.tensors[name]


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in PRESETS])
def test_of_other_quantizers_the_full_precision_model_is_to_be_scored(form, plain, tmp_path):
    checkpoint = Checkpoint.open(quantize(plain, tmp_path / "model", form))
    expected = rf"is quantized by {form.lower()}, .*; score the full-precision model, .*`llmdrop apply --other-model`"
    with pytest.raises(CheckpointError, match=expected):
        dequantized(checkpoint)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": "nvfp4-pack-quantized", "config_groups": {"NVFP4A16": ["Linear"]}}, "in the format nvfp4-pack"),
        ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "with rotations that the model makes"),
        ({"config_groups": {"W8A8": ["re:.*self_attn.*"]}}, "mlp.* is quantized, and the config says nothing of how"),
        ({"config_groups": {"W8A8": ["Linear"], "W1000": ["Linear"]}}, "compressed-tensors cannot read its config: "),
    ],
)
def test_what_a_scale_for_each_number_does_not_tell_is_refused(entries, message, plain, tmp_path):
    model = quantize(plain, tmp_path / "model", "W8A8")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] |= entries
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        dequantized(Checkpoint.open(model))


def test_a_weight_without_its_scale_is_named(plain, tmp_path):
    path = quantize(plain, tmp_path / "model", "FP8") / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"{MODULE}.weight_scale"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"{MODULE}.weight_scale is nothing; its quantized weight needs it"):
        dequantized(Checkpoint.open(path.parent))
