"""Named shapes: the parameter counts of the real models, tensor names that Transformers knows, masks that fit."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import published, shapes
from benchmarks.shapes import SHAPES, find
from benchmarks.throughput import weights
from benchmarks.weights import write_random
from llmdrop_vllm import DropMask, InputError, MaskError, hf
from llmdrop_vllm.checkpoints.decoder import Decoder

# As the model cards and Transformers count them.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "gemma-2-9b": 9_241_705_984,
    "mixtral-8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_real_model(name):
    assert find(name).num_parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", ["llama-2-7b", "mistral-7b", "qwen3-8b", "gemma-2-9b"])
def test_tensors_are_those_that_transformers_saves(name):
    shape = find(name, num_layers=2)
    config = hf.dropped_config(Decoder.of(shape.config, shape.config["architectures"][0]), DropMask(2))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if shape.config["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    assert shape.tensors() == theirs


def test_masks_follow_the_published_order_and_then_the_depth():
    assert find("mistral-7b").mask("attention", 4) == DropMask(32, attention=(25, 26, 24, 22))
    assert find("mistral-7b").mask("block", 2) == DropMask(32, attention=(26, 25), mlp=(26, 25))
    assert find("llama-2-13b").mask("attention", 10).attention[8:] == (38, 37)
    assert find("cpu-small").mask("mlp", 3) == DropMask(8, mlp=(6, 5, 4))
    assert find("cpu-small").mask("attention", 7).kept_attention == (7,)


def test_every_published_mask_fits_its_shape():
    for shape in SHAPES.values():
        for kind, layers in shape.published.items():
            assert shape.mask(kind, len(layers)).num_hidden_layers == shape.num_layers


def test_published_speedups_are_those_of_the_model_at_its_own_depth():
    full, half = find("llama-2-13b"), find("llama-2-13b", num_layers=20)
    assert published.speedups(full)["attention"][8] == 1.13
    assert published.table(full)[-2:] == [("block", 4), ("block", 8)]
    assert published.speedups(half) == {}
    assert published.table(half) == [("attention", n) for n in (2, 5, 10, 15)] + [("mlp", 5), ("block", 5)]
    for kind, number in published.table(half):
        assert len(getattr(half.mask(kind, number), "mlp" if kind == "mlp" else "attention")) == number


def test_a_real_model_is_what_was_fetched(tmp_path, monkeypatch):
    saved = write_random(tmp_path / "fetched", find("smoke"), "float32")
    config = json.loads((saved / "config.json").read_bytes())
    del config["head_dim"]
    (saved / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(shapes, "fetch", lambda name: saved)
    shape = find("smollm2")
    assert shape.tensors() == find("smoke").tensors()
    assert shape.config["head_dim"] == 32
    assert weights(tmp_path / "full", shape, "float32").resolve() == saved
    assert published.speedups(shape) == {}


def test_its_own_depth_is_no_other_depth():
    assert find("mistral-7b", num_layers=32) == find("mistral-7b")


def test_another_depth_keeps_the_layers():
    seven, gemma = find("llama-2-7b", num_layers=3), find("gemma-2-9b", num_layers=3)
    assert seven.num_parameters == 2 * 32000 * 4096 + 4096 + 3 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert gemma.config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]


def test_what_does_not_exist_is_refused_with_what_does():
    with pytest.raises(InputError, match="unknown shape 'llama-4'; known: cpu-small, smoke, llama-2-7b"):
        find("llama-4")
    with pytest.raises(InputError, match="--layers 0: expected a positive number"):
        find("llama-2-7b", num_layers=0)
    with pytest.raises(MaskError, match="attention 8 does not fit cpu-small: expected 1 to 7 of 8"):
        find("cpu-small").mask("attention", 8)
