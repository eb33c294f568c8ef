"""Layers whose weights Transformers keeps under other names and shapes than the checkpoint, one in memory at a time."""

import pytest
import torch
from transformers.utils import logging

from llmdrop_vllm import DropMask
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.scoring.layers import LayerStream
from tests.architectures.cases import CASES, LAYERS

logging.disable_progress_bar()
MIXTURES = ("MixtralForCausalLM", "GraniteMoeForCausalLM", "DeepseekV3ForCausalLM", "AfmoeForCausalLM")


def stream(checkpoint, dtype):
    where = {"device": torch.device("cpu"), "dtype": dtype}
    return LayerStream(Checkpoint.open(checkpoint).under(DropMask(LAYERS)), **where, attention="sdpa")


@pytest.fixture(params=MIXTURES)
def architecture(request):
    return request.param


@pytest.fixture
def model(architecture):
    return CASES[architecture].model()


@pytest.fixture
def checkpoint(architecture, model, tmp_path):
    return CASES[architecture].save(model, tmp_path)


def test_every_layer_gets_its_own_weights(model, checkpoint):
    layers = stream(checkpoint, torch.float32)
    for index, whole in enumerate(model.get_decoder().layers):
        with layers.layer(index) as layer:
            state = layer.state_dict()
            assert state.keys() == whole.state_dict().keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())
        assert all(tensor.is_meta for tensor in layers.model.state_dict().values())


def test_weights_have_the_dtypes_that_transformers_gives_them(model, checkpoint):
    expected = type(model).from_pretrained(checkpoint, dtype=torch.bfloat16).get_decoder().layers[1].state_dict()
    with stream(checkpoint, torch.bfloat16).layer(1) as layer:
        found = layer.state_dict()
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            name: tensor.dtype for name, tensor in expected.items()
        }
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_layers_that_are_alike_are_read_into_the_same_memory(checkpoint):
    """The bytes of every layer stayed in memory once: their names, in the checkpoint's terms, are all different."""
    layers = stream(checkpoint, torch.float32)
    read = []
    for index in (1, 2, 3):
        with layers.layer(index):
            read.append(sum(map(len, layers.buffers.values())))
    assert read[0] == read[1] == read[2]


def test_loading_layer_by_layer_shows_no_progress_bars_of_transformers(checkpoint, capsys):
    logging.enable_progress_bar()
    try:
        with stream(checkpoint, torch.float32).layer(1):
            assert logging.is_progress_bar_enabled()
    finally:
        logging.disable_progress_bar()
    assert capsys.readouterr().err == ""
