"""Random checkpoints: every tensor of the shape, in as many shards as asked for."""

import json

import pytest
from safetensors import safe_open

from benchmarks.shapes import find
from benchmarks.weights import write_random, write_random_apart, write_tokens
from llmdrop_vllm import InputError


def test_shards_hold_every_tensor_of_the_shape(tmp_path):
    shape = find("smoke")
    directory = write_random(tmp_path / "model", shape, "bfloat16", shard_bytes=100_000)
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({*weight_map.values()}) > 2
    found = {}
    for file in {*weight_map.values()}:
        with safe_open(directory / file, "pt") as shard:
            found |= {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    assert found == shape.tensors()


def test_a_checkpoint_that_another_process_cannot_write_is_an_error_here(tmp_path):
    with pytest.raises(InputError, match=f"the checkpoint could not be written to {tmp_path}"):
        write_random_apart(tmp_path, find("smoke"), "bfloat16")


def test_calibration_data_are_tokens_of_the_vocabulary(tmp_path):
    rows = json.loads(write_tokens(tmp_path / "data.json", vocab_size=50, samples=3, seq_len=8).read_text())
    assert [len(row) for row in rows] == [8] * 3
    assert {token for row in rows for token in row} <= {*range(50)}
