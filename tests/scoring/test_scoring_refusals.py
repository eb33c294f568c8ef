"""What cannot be scored is refused, and named: damaged weights, unknown architectures, dtypes, devices, a full disk."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import CheckpointError, InputError, OutputError
from llmdrop_vllm.scoring import scoring, scratch
from llmdrop_vllm.scoring.layers import LayerStream
from tests.tiny import TINY_LLAMA, write_checkpoint


def with_tensor(directory, name, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items() if value is not None}, path)


def nan(tensor):
    tensor.flat[3] = np.nan
    return tensor


DAMAGED = {
    "nan": ("model.layers.4.mlp.up_proj.weight", nan, r"model\.layers\.4\.mlp\.up_proj\.weight in .* holds NaN"),
    "shape": ("model.layers.2.self_attn.q_proj.weight", lambda t: t[:-1], r"q_proj.*shape \[127, 64\].*\[128, 64\]"),
    "dtype": ("model.norm.weight", lambda t: t.astype(np.int32), r"model\.norm\.weight.*dtype I32"),
    "missing": ("model.layers.1.mlp.down_proj.weight", lambda t: None, r"lacks model\.layers\.1\.mlp\.down_proj"),
    "overflow": ("model.layers.3.mlp.down_proj.weight", lambda t: t * 1e38, r"layer 3 .* not finite"),
}


@pytest.mark.parametrize(("name", "change", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_weights_are_named(tiny, name, change, message, tmp_path):
    directory = write_checkpoint(tmp_path / "model", TINY_LLAMA)
    with_tensor(directory, name, change)
    with pytest.raises(CheckpointError, match=message):
        scoring.score(Checkpoint.open(directory), tiny[1])


def test_an_architecture_without_a_row_is_refused_before_any_weight_is_read(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(LayerStream, "_load", lambda *_: pytest.fail("read weights"))
    config = TINY_LLAMA | {"architectures": ["MambaForCausalLM"]}
    with pytest.raises(CheckpointError, match='MambaForCausalLM has no row in the family table; .* see "Adding'):
        scoring.score(Checkpoint.open(write_checkpoint(tmp_path / "model", config)), tiny[1])


def test_a_quantized_model_is_refused(tiny, tmp_path):
    directory = write_checkpoint(tmp_path / "model", TINY_LLAMA | {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(CheckpointError, match="is quantized by gptq, .*; score the full-precision model"):
        scoring.score(Checkpoint.open(directory), tiny[1])


def test_an_unknown_dtype_is_refused(tiny):
    with pytest.raises(InputError, match="dtype is 'int4'; expected float32"):
        scoring.score(*tiny, dtype="int4")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_here_is_refused(tiny, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"device is '{device}'; here is cpu"):
        scoring.score(*tiny, device=device)


@pytest.mark.parametrize("device", ["cuda:1", "cuda:x", "cpu:x"])
def test_a_device_that_is_not_among_those_here_is_refused(tiny, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=f"device is '{device}'; here is cuda, cuda:0, cpu"):
        scoring.score(*tiny, device=device)


def test_a_shard_that_goes_while_it_is_scored_is_named(tiny, tmp_path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "model", TINY_LLAMA))
    assert checkpoint.fingerprint
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(OutputError, match=r"model\.safetensors cannot be used: No such file"):
        scoring.score(checkpoint, tiny[1])


def test_too_little_disk_is_refused_before_anything_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(OutputError, match="100 bytes free; the hidden states need 328,704"):
        scoring.score(*tiny, scratch=tmp_path / "scratch")
    assert list(tmp_path.iterdir()) == []
