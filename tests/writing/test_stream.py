"""Weight files pass through a small buffer unchanged, and NaN does not pass."""

import tracemalloc

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.shards import StoredTensor
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.writing import stream
from llmdrop_vllm.writing.plan import OutputShard, plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.checkpoints.files import MASK, SMALL, stored
from tests.tiny import TINY_LLAMA, write_checkpoint


@pytest.mark.parametrize("buffer_bytes", [8, 40, 1000, 1 << 20])
def test_all_types_and_sizes_survive_any_cut(buffer_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BUFFER_BYTES", buffer_bytes)
    path = write_checkpoint(tmp_path / "model", SMALL | {"num_hidden_layers": 2}) / "model.safetensors"
    tensors = load_torch(path)
    for name, dtype in (("lm_head.weight", torch.bfloat16), ("model.norm.weight", torch.float64)):
        tensors[name] = tensors[name].to(dtype)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].half()
    tensors["odd"] = torch.arange(13, dtype=torch.uint8)
    tensors["scale"] = torch.tensor(2.5)
    tensors["none"] = torch.zeros(0, 4)
    tensors["eighth"] = torch.randn(37).to(torch.float8_e4m3fn)
    save_torch(tensors, path, metadata={"format": "pt", "made": "by us"})
    write(plan_surgery(tmp_path / "model", DropMask(2, (1,), (0,))), tmp_path / "out")
    before, after = stored(tmp_path / "model"), stored(tmp_path / "out")
    assert {"odd", "scale", "none", "eighth"} < set(after)
    assert after == {name: before[name] for name in after}
    assert len(before) - len(after) == 5 + 4
    (written,) = Checkpoint.open(tmp_path / "out").metadata.items()
    assert written == (tmp_path / "out" / "model.dropped.safetensors", {"format": "pt", "made": "by us"})
    load_torch(written[0])  # which refuses what is not aligned


def test_tensors_are_aligned_whatever_the_sources_order(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BUFFER_BYTES", 8)
    parts = {"bytes": np.ones(3, np.uint8), "halves": np.ones(3, np.float16), "wide": np.ones(5, np.float64)}
    tensors, start = [], 0
    for name, dtype in (("bytes", "U8"), ("halves", "F16"), ("wide", "F64")):
        stop = start + parts[name].nbytes
        tensors.append(StoredTensor(name, dtype, parts[name].shape, tmp_path / "source", start, stop))
        start = stop
    (tmp_path / "source").write_bytes(b"".join(value.tobytes() for value in parts.values()))
    shard = OutputShard("out", tuple(tensors), {})
    stream.write_shard(shard, tmp_path / "out", frozenset(), lambda _: None)
    with safe_open(tmp_path / "out", framework="numpy") as file:
        assert list(file.offset_keys()) == ["wide", "halves", "bytes"]
        for name, value in parts.items():
            assert file.get_tensor(name).tolist() == value.tolist()


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    path = write_checkpoint(tmp_path / "model", TINY_LLAMA) / "model.safetensors"
    save_file(load_file(path) | {"large": np.zeros(1 << 24, np.uint8)}, path)
    plan = plan_surgery(tmp_path / "model", MASK)
    tracemalloc.start()
    write(plan, tmp_path / "out")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < stream.BUFFER_BYTES * (stream.NUM_BUFFERS + 2)


DTYPES = {
    "BF16": (torch.bfloat16, torch.int16),
    "F16": (torch.float16, torch.int16),
    "F8_E5M2": (torch.float8_e5m2, torch.int8),
    "F8_E4M3": (torch.float8_e4m3fn, torch.int8),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_found_in_every_bit_pattern_that_is_one(dtype):
    kind, integer = DTYPES[dtype]
    limits = torch.iinfo(integer)
    patterns = torch.arange(limits.min, limits.max + 1).to(integer)
    expected = patterns.view(kind).float().isnan().tolist()
    found = [stream.holds_nan(dtype, memoryview(pattern.tobytes())) for pattern in patterns.numpy()]
    assert found == expected
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize(("dtype", "kind"), [("F32", np.float32), ("F64", np.float64)])
def test_nan_is_found_among_extreme_numbers(dtype, kind):
    numbers = np.array([0.0, -0.0, np.inf, -np.inf, np.finfo(kind).max, np.finfo(kind).min], kind)
    assert not stream.holds_nan(dtype, memoryview(numbers.tobytes()))
    for nan in (np.nan, -np.nan):
        assert stream.holds_nan(dtype, memoryview(np.array([*numbers, nan, 1], kind).tobytes()))
    assert not stream.holds_nan("I64", memoryview(np.array([-1], np.int64).tobytes()))
