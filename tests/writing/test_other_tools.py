"""Checkpoints as other tools leave them: what comes out of surgery, or why nothing does."""

import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.checkpoints.files import MASK, stored
from tests.tiny import TINY_LLAMA, write_checkpoint

TOKENS = torch.tensor([[1, 7, 42, 99, 3, 250]])
QUANTIZED = {"quantization_config": {"quant_method": "some", "bits": 4}}


def logits(directory):
    with torch.no_grad():
        return hf.from_pretrained(directory, dtype="float32").eval()(TOKENS).logits


def rewritten(directory, change, config=TINY_LLAMA, **options):
    """A tiny checkpoint whose tensors have gone through `change`."""
    path = write_checkpoint(directory, config) / "model.safetensors"
    save_file(change(load_file(path)), path, **options)
    return directory


@pytest.mark.parametrize("metadata", [None, {}, {"format": "mlx"}])
def test_weights_that_do_not_say_that_they_are_pytorchs(metadata, tmp_path):
    write(plan_surgery(write_checkpoint(tmp_path / "usual", TINY_LLAMA), MASK), tmp_path / "expected")
    model = rewritten(tmp_path / "model", lambda tensors: tensors, metadata=metadata)
    write(plan_surgery(model, MASK), tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "expected"))


def test_a_byte_order_mark_before_the_config_is_left_out(tmp_path):
    model = write_checkpoint(tmp_path / "model", TINY_LLAMA)
    (model / "config.json").write_text(json.dumps(TINY_LLAMA), encoding="utf-8-sig")
    write(plan_surgery(model, MASK), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes().startswith(b"{")


def test_a_tied_head_that_is_in_the_files_all_the_same_comes_along(tmp_path):
    tied = TINY_LLAMA | {"tie_word_embeddings": True}
    model = rewritten(
        tmp_path / "model", lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, tied
    )
    write(plan_surgery(model, MASK), tmp_path / "out")
    assert "lm_head.weight" in stored(tmp_path / "out")
    write(plan_surgery(write_checkpoint(tmp_path / "usual", tied), MASK), tmp_path / "expected")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "expected"))


def test_layers_of_another_dtype_keep_it(tmp_path):
    def change(tensors):
        return {name: value.astype(np.float16) if ".3." in name else value for name, value in tensors.items()}

    model = rewritten(tmp_path / "model", change)
    write(plan_surgery(model, MASK), tmp_path / "out")
    kept = stored(tmp_path / "out")
    assert kept == {name: entry for name, entry in stored(model).items() if name in kept}
    assert kept["model.layers.3.mlp.up_proj.weight"][0] == "F16"


def test_what_a_passthrough_merge_repeats_can_be_dropped_again(tmp_path):
    """Layers 0 to 5, then 3 to 7: without the second 3 to 5, the model is what it was."""
    sources = [*range(6), *range(3, 8)]

    def stack(tensors):
        outside = {name: value for name, value in tensors.items() if ".layers." not in name}
        layer = re.compile(r"model\.layers\.(\d+)\.(.+)")
        inside = [(match[1], match[2], value) for name, value in tensors.items() if (match := layer.match(name))]
        return outside | {
            f"model.layers.{place}.{rest}": value
            for place, source in enumerate(sources)
            for index, rest, value in inside
            if int(index) == source
        }

    deeper = TINY_LLAMA | {"num_hidden_layers": len(sources)}
    model = tmp_path / "model"
    write_checkpoint(tmp_path / "usual", TINY_LLAMA)
    save_file(stack(load_file(tmp_path / "usual" / "model.safetensors")), tmp_path / "stacked")
    write_checkpoint(model, deeper)
    (tmp_path / "stacked").replace(model / "model.safetensors")
    repeated = (6, 7, 8)
    write(plan_surgery(model, DropMask(len(sources), attention=repeated, mlp=repeated)), tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "usual"))
    assert not torch.equal(logits(model), logits(tmp_path / "usual"))


def bitsandbytes(tensors):
    """Packed by four bits, with what is needed to unpack them beside each weight."""
    found = {}
    for name, value in tensors.items():
        found[name] = np.zeros((value.size // 2, 1), np.uint8) if "_proj" in name else value
        if "_proj" in name:
            found |= {f"{name}.absmax": np.ones(4, np.float32), f"{name}.quant_map": np.ones(16, np.float32)}
            found[f"{name}.quant_state.bitsandbytes__nf4"] = np.zeros(80, np.uint8)
    return found


def torchao(tensors):
    """One tensor of the library's own class, laid out as the plain ones that it is made of."""
    found = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if "_proj" in name:
            found[f"{module}._weight_qdata"] = value.astype(np.int8)
            found[f"{module}._weight_scale"] = np.ones(len(value), np.float32)
        else:
            found[name] = value
    return found


def awq(tensors):
    """Columns packed by eights, with zero points and scales for groups of rows."""
    found = {}
    for name, value in tensors.items():
        module, (rows, columns) = name.removesuffix(".weight"), value.shape[::-1] if value.ndim == 2 else (0, 0)
        if "_proj" in name:
            found[f"{module}.qweight"] = np.zeros((rows, columns // 8), np.int32)
            found[f"{module}.qzeros"] = np.zeros((rows // 32, columns // 8), np.int32)
            found[f"{module}.scales"] = np.ones((rows // 32, columns), np.float16)
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("form", [bitsandbytes, torchao, awq])
def test_everything_of_a_dropped_weight_goes_in_quantized_forms(form, tmp_path):
    model = rewritten(tmp_path / "model", form, TINY_LLAMA | QUANTIZED)
    write(plan_surgery(model, MASK), tmp_path / "out")
    kept = stored(tmp_path / "out")
    gone = re.compile(r"model\.layers\.(?:[256]\.(?:self_attn|input_layernorm)|7\.(?:mlp|post_attention_layernorm))\.")
    assert kept == {name: entry for name, entry in stored(model).items() if not gone.match(name)}


def test_a_missing_weight_of_torchaos_is_named(tmp_path):
    def change(tensors):
        found = torchao(tensors)
        del found["model.layers.1.mlp.down_proj._weight_qdata"]
        return found

    model = rewritten(tmp_path / "model", change, TINY_LLAMA | QUANTIZED)
    with pytest.raises(CheckpointError, match=r"keeps: model\.layers\.1\.mlp\.down_proj\.weight; "):
        plan_surgery(model, MASK)


def test_older_modelopts_say_beside_the_config_that_weights_are_quantized(tmp_path):
    def change(tensors):
        return {name: value.astype(np.int8) if "_proj" in name else value for name, value in tensors.items()}

    model = rewritten(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match="dtype I8"):
        plan_surgery(model, MASK)
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    plan = plan_surgery(model, MASK)
    assert [*plan.copies] == ["hf_quant_config.json"]
    with pytest.raises(CheckpointError, match="is quantized, and zeros have no common form"):
        plan_surgery(model, MASK, portable=True)


def test_a_wrapper_may_say_it_beside_its_tower(tmp_path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TINY_LLAMA))
    assert not checkpoint.is_quantized
    assert replace(checkpoint, decoder=replace(checkpoint.decoder, config=TINY_LLAMA | QUANTIZED)).is_quantized


def test_the_command_that_converts_pickled_weights_survives_a_quote_in_the_name(tmp_path):
    model = write_checkpoint(tmp_path / "it's mine", TINY_LLAMA)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors are read") as caught:
        Checkpoint.open(model)
    words = shlex.split(str(caught.value).partition("Convert: ")[2])
    assert words[:2] == ["python", "-c"]
    assert f'from_pretrained("{model}", dtype="auto").save_pretrained("{model}-safetensors")' in words[2]
    compile(words[2], "command", "exec")
