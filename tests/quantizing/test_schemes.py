"""What can be quantized, and in groups of how many, told before anything slow."""

import json

import pytest

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.quantizing.schemes import SCHEMES, check_quantizable, group_size_of
from tests.tiny import TINY_LLAMA, write_checkpoint

W4A16 = SCHEMES["w4a16"]


@pytest.mark.parametrize(("hidden", "found"), [(128, 128), (192, 64), (96, 32)])
def test_groups_are_as_large_as_all_weights_allow(hidden, found, tmp_path):
    config = TINY_LLAMA | {"hidden_size": hidden, "intermediate_size": 256, "num_attention_heads": 4}
    model = Checkpoint.open(write_checkpoint(tmp_path, config))
    assert group_size_of(W4A16, model, None) == found
    assert group_size_of(W4A16, model, 32) == 32
    assert group_size_of(SCHEMES["w8a8"], model, None) is None


def test_a_dropped_sublayers_inputs_do_not_count(tmp_path):
    config = TINY_LLAMA | {"intermediate_size": 80, "drop_attn_list": [1], "drop_mlp_list": [*range(8)]}
    model = Checkpoint.open(write_checkpoint(tmp_path, config))
    assert group_size_of(W4A16, model, None) == 64


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, "--scheme w4a16 --group-size 128", "_proj.weight has 64 inputs, which groups of 128 do not divide"),
        (
            {"intermediate_size": 80},
            "--scheme w4a16",
            "has 80 inputs, which groups of 32 do not divide",
        ),
        ({}, "--scheme w4a16 --group-size 48", "--group-size is 48; expected a multiple of 32"),
        ({}, "--scheme w8a8 --group-size 64", "--group-size is of w4a16; W8A8 has a scale for each output"),
        ({}, "--scheme fp8 --data embedded", "--scheme fp8 rounds to the nearest and takes no --data"),
        ({"quantization_config": {"quant_method": "gptq"}}, "--scheme w8a8", "is quantized already; name the model"),
        ({}, "--scheme w8a8 --data nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line_and_nothing_is_made(
    changes, options, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("LLMDROP_CACHE", str(tmp_path / "cache"))
    model = write_checkpoint(tmp_path / "model", TINY_LLAMA | changes)
    assert main(["quantize", str(model), str(tmp_path / "out"), *options.split()]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_wrapper_is_not_quantized(tmp_path):
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": TINY_LLAMA}
    model = write_checkpoint(tmp_path / "text", TINY_LLAMA)
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="LlavaForConditionalGeneration consists of more than a decoder"):
        check_quantizable(Checkpoint.open(model))
