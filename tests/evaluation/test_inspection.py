"""What `llmdrop inspect` gives figures of, and what it says of them."""

import json

import numpy as np
import pytest
import torch

from llmdrop_vllm import DropMask
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.evaluation.goals import Sizes
from llmdrop_vllm.evaluation.inspection import Inspection, inspect_checkpoint
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.architectures.cases import CASES
from tests.checkpoints.files import MASK
from tests.engines import KV_CACHE_BYTES, engine, kv_tokens
from tests.quantized import FORMATS, quantize
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


@pytest.mark.parametrize("mask", [DropMask(8, attention=(5, 2), mlp=(1,)), DropMask(8, windows=((2, 128), (5, 128)))])
def test_what_a_mask_would_save_is_what_it_saves_once_it_is_written(mask, tmp_path):
    full = write_checkpoint(tmp_path / "full", TINY_LLAMA | {"max_position_embeddings": 4096})
    write(plan_surgery(full, mask), tmp_path / "written")
    given, written = inspected(full, mask=mask), inspected(tmp_path / "written")
    assert given.dropped == written.dropped
    assert given.full == written.full
    assert given.summary == written.summary
    assert given.dropped.request_bytes < given.full.request_bytes


def test_inspect_takes_a_mask(tmp_path, capsys):
    model = str(write_checkpoint(tmp_path, TINY_LLAMA))
    assert main(["inspect", model, "--attention", "5,2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mask"]["attention"] == [5, 2]
    with pytest.raises(SystemExit):
        main(["inspect", model, "--attention", "5"])
    assert "5 may be a layer or a number of layers: the layer is written '5,'" in capsys.readouterr().err


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
    assert inspected(tmp_path, kv_dtype="bfloat16").notes == []
    tokens = {}
    for dtype in ("float32", "auto"):
        with engine(tmp_path, dtype=dtype) as llm:
            tokens[dtype] = kv_tokens(llm)
    assert tokens["auto"] == 2 * tokens["float32"]


@pytest.mark.parametrize("form", FORMATS)
def test_quantized_weights_are_counted_packed_and_their_parameters_as_they_were(form, tmp_path):
    """Of the stripped checkpoint, too: what is gone was packed, and embeddings, which are not, weigh nothing there."""
    mask = DropMask(12, attention=(11, 7, 8, 10), mlp=(3,))
    model = quantize(MODEL, tmp_path / "model", form)
    on_disk = [tensor.num_bytes for tensor in Checkpoint.open(model).tensors.values()]
    plain, found = ([], [])
    for source, inspections in ((MODEL, plain), (model, found)):
        for config_only in (False, True):
            out = tmp_path / f"{source.name}-{len(plain)}-{len(found)}"
            write(plan_surgery(source, mask, config_only=config_only), out)
            inspections.append(inspected(out))
    stripped, whole = found
    assert (stripped.full, stripped.dropped) == (whole.full, whole.dropped)
    assert whole.full.weight_bytes == sum(on_disk) < 0.6 * plain[0].full.weight_bytes
    assert stripped.dropped.weight_bytes == stripped.disk_bytes
    for ours, theirs in ((whole.full, plain[0].full), (whole.dropped, plain[0].dropped)):
        assert ours.parameters == theirs.parameters
        assert ours.kv_bytes_per_token == theirs.kv_bytes_per_token


def test_keys_and_values_that_a_quantizer_left_scales_for_are_counted_as_vllm_stores_them(tmp_path):
    model = quantize(MODEL, tmp_path / "model", "W8A8")
    config = json.loads((model / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (model / "config.json").write_text(json.dumps(config))
    found, without = inspected(model), inspected(MODEL)
    assert (found.kv_dtype, without.kv_dtype) == ("fp8", "bfloat16")
    assert 2 * found.full.kv_bytes_per_token == without.full.kv_bytes_per_token
    with engine(model, dtype="bfloat16") as llm:
        layout_bytes = found.full.kv_bytes_per_token * 128
        assert kv_tokens(llm) == KV_CACHE_BYTES // layout_bytes * 128
    sizes = [Sizes(Checkpoint.open(each), 512) for each in (model, MODEL)]
    longer = [each.step_bytes(DropMask(12), 2) - each.step_bytes(DropMask(12), 1) for each in sizes]
    assert 2 * longer[0] == longer[1]


def test_layers_that_keep_the_models_dtype_are_counted_so(capsys):
    asked = ["inspect", str(MODEL), "--kv-dtype", "fp8", "--json"]
    assert main([*asked, "--kv-dtype-skip-layers", "0,2"]) == 0
    bytes_per_token = Inspection.model_validate_json(capsys.readouterr().out).full.kv_bytes_per_token
    assert main(asked) == 0
    plain = Inspection.model_validate_json(capsys.readouterr().out).full.kv_bytes_per_token
    assert 12 * bytes_per_token == 14 * plain
    assert main([*asked, "--kv-dtype-skip-layers", "12"]) == 1
    assert "no layer 12: the model has 12" in capsys.readouterr().err


def test_keys_that_8_bit_floats_are_too_coarse_for_are_named(tmp_path):
    case = CASES["Qwen2ForCausalLM"]
    model = case.model()
    for layer, size in ((0, 300.0), (1, -100.0), (2, 60.0), (3, 900.0)):
        torch.nn.init.constant_(model.model.layers[layer].self_attn.k_proj.bias, size)
    case.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"drop_attn_list": [3]}))
    found = inspected(tmp_path, kv_dtype="fp8")
    assert found.coarse_keys == {0: 300.0, 1: 100.0}
    (note,) = found.notes
    assert note.endswith(
        "up to 300, which 8-bit floats are too coarse for: serve with --kv-cache-dtype-skip-layers 0 1"
    )
    assert inspected(tmp_path, kv_dtype="fp8", kv_wide=(0, 1)).notes == []
    assert inspected(tmp_path, kv_dtype="bfloat16").notes == []
