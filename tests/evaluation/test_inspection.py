"""What `llmdrop inspect` gives figures of, and what it says of them."""

import json

import numpy as np
import pytest

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.evaluation.inspection import inspect_checkpoint
from tests.checkpoints.files import MASK
from tests.engines import engine, kv_tokens
from tests.tiny import TINY_LLAMA, write_checkpoint


def inspected(directory, **options):
    return inspect_checkpoint(Checkpoint.open(directory), memory_bytes=1 << 30, **options)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("model.layers.3.mlp.gate_proj.", r"lacks weights .* keeps: model\.layers\.3\.mlp\.gate_proj\.weight; "),
        ("model.layers.3.", r"weights of layers 0-2,4-7, and config\.json says 8 layers: 3 were cut out"),
        ("lm_head.", r"lacks lm_head\.weight, which LlamaForCausalLM needs"),
        ("model.layers.5.self_attn.", None),  # the mask drops it
    ],
)
def test_no_figures_are_given_of_what_lacks_weights(without, message, tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA | MASK.to_config(), without=(without,))
    if message is None:
        assert inspected(tmp_path).dropped.attention_layers == 5
    else:
        with pytest.raises(CheckpointError, match=message):
            inspected(tmp_path)


def test_no_figures_are_given_of_layers_that_are_narrower_than_the_config_says(tmp_path):
    """Pruned layer by layer, with one width for all in the config."""
    write_checkpoint(tmp_path, TINY_LLAMA | {"intermediate_size": 96})
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight .* \[96, 64\]; the config says \[128, 64\]"):
        inspected(tmp_path)


@pytest.mark.parametrize("entries", [{"num_key_value_heads": [2] * 8}, {"torch_dtype": "torch.float32"}])
def test_a_config_with_values_of_the_wrong_kind_is_refused_in_one_line(entries, tmp_path, capsys):
    model = write_checkpoint(tmp_path / "model", TINY_LLAMA)
    (model / "config.json").write_text(json.dumps(TINY_LLAMA | entries))
    (tmp_path / "data.json").write_text(json.dumps(np.arange(48).reshape(2, 24).tolist()))
    scoring = ["score", str(model), "--data", f"{tmp_path}/data.json", "--out", f"{tmp_path}/scores.json"]
    for command in (["inspect", str(model)], scoring):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert "does not describe a" in error
        assert error.count("\n") == 1


def test_float32_is_counted_as_asked_for_and_said_to_be_served_in_half(tmp_path, capsys):
    write_checkpoint(tmp_path, TINY_LLAMA)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "without it vLLM holds weights and KV cache in half the bytes" in capsys.readouterr().out
    assert inspected(tmp_path, kv_dtype="bfloat16").dtype_note == ""
    tokens = {}
    for dtype in ("float32", "auto"):
        with engine(tmp_path, dtype=dtype) as llm:
            tokens[dtype] = kv_tokens(llm)
    assert tokens["auto"] == 2 * tokens["float32"]
