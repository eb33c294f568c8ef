"""Construction is checked against the family table: a substitution that did not happen is an error."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmdrop_vllm import DropMask
from llmdrop_vllm.families import Family, Sublayer
from llmdrop_vllm.serving import dropping as module
from llmdrop_vllm.serving.passthrough import DroppedNorm, DroppedSublayer
from llmdrop_vllm.serving.weights import check_all_loaded

FAMILY = Family("toy", ("ToyForCausalLM",), Sublayer("attn", "ln_1", "c_proj"), Sublayer("ffn", "ln_2", "c_proj"))
CONFIG = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))


class Part(nn.Module):
    def __init__(self, prefix):
        super().__init__()
        self.prefix = prefix
        self.weight = nn.Parameter(torch.ones(4, 4))


class Layer(nn.Module):
    """Assigns its norms before its sublayers, unlike Llama."""

    def __init__(self, index, attention="attn"):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(4), nn.LayerNorm(4)
        setattr(self, attention, Part(f"model.h.{index}.{attention}"))
        self.ffn = Part(f"model.h.{index}.ffn")


@pytest.fixture(autouse=True)
def one_stage(monkeypatch):
    monkeypatch.setattr(module, "get_pp_group", lambda: SimpleNamespace(rank_in_group=0, world_size=1))


def build(mask, layer=Layer, num_layers=2):
    with module.dropping(mask, FAMILY, CONFIG) as dropped:
        model = nn.ModuleList([layer(index) for index in range(num_layers)])
    dropped.finish(model)
    return model


def test_only_what_the_mask_names_is_replaced():
    first, second = build(DropMask(2, attention=(1,), mlp=(0,)))
    assert [type(part) for part in (first.ln_1, first.attn)] == [nn.LayerNorm, Part]
    assert [type(part) for part in (first.ln_2, first.ffn)] == [DroppedNorm, DroppedSublayer]
    assert [type(part) for part in (second.ln_1, second.attn)] == [DroppedNorm, DroppedSublayer]
    assert [type(part) for part in (second.ln_2, second.ffn)] == [nn.LayerNorm, Part]


def test_the_hook_is_gone_afterwards_even_after_an_error():
    with pytest.raises(ZeroDivisionError), module.dropping(DropMask(1, attention=(0,)), FAMILY, CONFIG):
        raise ZeroDivisionError
    assert type(Layer(0).attn) is Part


def test_a_renamed_sublayer_is_an_error():
    with pytest.raises(
        module.SubstitutionError, match=r"row 'toy' says.*not replaced: \[\(1, 'attn'\), \(1, 'ln_1'\)\]"
    ):
        build(DropMask(2, attention=(1,)), layer=lambda index: Layer(index, attention="attention"))


def test_layers_that_were_not_seen_are_an_error():
    with pytest.raises(module.SubstitutionError, match=r"layers 0 to 2 expected, \[0, 1\] seen"):
        build(DropMask(3, attention=(1,)))


class TestWeights:
    """The check after loading, for checkpoints whose headers could not be read before."""

    class Model(nn.Module):
        packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

        def __init__(self):
            super().__init__()
            layer = {"qkv_proj": nn.Linear(2, 2, bias=False), "norm": nn.LayerNorm(2, bias=False)}
            self.layers = nn.ModuleList([nn.ModuleDict(layer)])
            self.score = nn.Linear(2, 1)  # made by vLLM after loading

    SEEN = {f"layers.0.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "norm")}
    LOADED = {"layers.0.qkv_proj.weight", "layers.0.norm.weight"}

    def test_complete(self):
        check_all_loaded(self.Model(), self.LOADED, self.SEEN, quantized=False)

    def test_parts_may_come_merged(self):
        check_all_loaded(self.Model(), self.LOADED, self.LOADED, quantized=False)

    def test_one_part_of_a_merged_parameter_is_missing(self):
        with pytest.raises(ValueError, match="keeps: layers.0.k_proj.weight$"):
            check_all_loaded(self.Model(), self.LOADED, self.SEEN - {"layers.0.k_proj.weight"}, quantized=True)

    def test_a_whole_parameter_is_missing(self):
        with pytest.raises(ValueError, match="keeps: layers.0.norm.weight$"):
            check_all_loaded(self.Model(), self.LOADED - {"layers.0.norm.weight"}, self.SEEN, quantized=False)
