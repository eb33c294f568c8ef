"""Construction is checked against the family table: a substitution that did not happen is an error."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor.models.utils import PPMissingLayer

from llmdrop_vllm import DropMask
from llmdrop_vllm.architectures.family import Family, Sublayer
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.serving import dropping as module
from llmdrop_vllm.serving.passthrough import DroppedNorm, DroppedPostNorm, DroppedSublayer, ZeroSublayer
from llmdrop_vllm.serving.weights import check_all_loaded

FAMILY = Family("toy", "ToyForCausalLM", Sublayer("attn", "ln_1", "c_proj"), Sublayer("ffn", "ln_2", "c_proj"))
CONFIG = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}, static_all_moe_layers=[]))


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


def build(mask, layer=Layer, num_layers=2, family=FAMILY):
    with module.dropping(module.Dropping(Decoder("Toy", {}, family, mask), CONFIG)) as dropped:
        model = nn.ModuleList([layer(index) for index in range(num_layers)])
    dropped.finish(nn.ModuleDict({"layers": model}))
    return model


def test_only_what_the_mask_names_is_replaced():
    first, second = build(DropMask(2, attention=(1,), mlp=(0,)))
    assert [type(part) for part in (first.ln_1, first.attn)] == [nn.LayerNorm, Part]
    assert [type(part) for part in (first.ln_2, first.ffn)] == [DroppedNorm, DroppedSublayer]
    assert [type(part) for part in (second.ln_1, second.attn)] == [DroppedNorm, DroppedSublayer]
    assert [type(part) for part in (second.ln_2, second.ffn)] == [nn.LayerNorm, Part]


def test_the_hook_is_gone_afterwards_even_after_an_error():
    hook = module.Dropping(Decoder("Toy", {}, FAMILY, DropMask(1, attention=(0,))), CONFIG)
    with pytest.raises(ZeroDivisionError), module.dropping(hook):
        raise ZeroDivisionError
    assert type(Layer(0).attn) is Part


def test_a_renamed_sublayer_is_an_error():
    with pytest.raises(
        module.SubstitutionError, match=r"row 'toy' says.*not replaced: \[\(1, 'attn'\), \(1, 'ln_1'\)\]"
    ):
        build(DropMask(2, attention=(1,)), layer=lambda index: Layer(index, attention="attention"))


def test_post_norms_go_too_and_a_shared_norm_stays():
    family = Family(
        "toy", "", Sublayer("attn", None, "c_proj"), Sublayer("ffn", None, "c_proj", post_norm="ln_2"), parallel=True
    )
    (layer,) = build(DropMask(1, attention=(0,), mlp=(0,)), num_layers=1, family=family)
    assert [type(part) for part in (layer.ln_1, layer.attn)] == [nn.LayerNorm, ZeroSublayer]
    assert [type(part) for part in (layer.ln_2, layer.ffn)] == [DroppedPostNorm, ZeroSublayer]


def test_a_row_may_name_parts_that_not_every_config_has():
    def family(*optional):
        return Family("toy", "", FAMILY.attention, replace(FAMILY.mlp, post_norm="ln_3", optional=optional))

    mask = DropMask(2, mlp=(1,))
    assert type(build(mask, family=family("ln_3"))[1].ffn) is DroppedSublayer
    with pytest.raises(module.SubstitutionError, match=r"not replaced: \[\(1, 'ln_3'\)\]"):
        build(mask, family=family())


def test_what_a_layer_multiplies_is_not_handed_on():
    family = replace(FAMILY, scales_outputs=True)
    first, _ = build(DropMask(2, mlp=(0,)), family=family)
    x, residual = first.ln_2(torch.ones(1, 4), torch.full((1, 4), 2.0))
    assert (x.sum(), residual.sum()) == (0, 12)
    assert first.ffn(x).sum() == 0


def test_constructors_may_reach_into_the_parts_of_what_was_dropped():
    class Deep(Layer):
        def __init__(self, index):
            super().__init__(index)
            attention = Part(f"model.h.{index}.attn")
            attention.rotary = nn.Identity()
            self.attn = attention

    (layer,) = build(DropMask(1, attention=(0,)), layer=Deep, num_layers=1)
    assert isinstance(layer.attn.rotary, PPMissingLayer)


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
        assert check_all_loaded(self.Model(), self.LOADED, self.SEEN, quantized=False) is None

    def test_parts_may_come_merged(self):
        assert check_all_loaded(self.Model(), self.LOADED, self.LOADED, quantized=False) is None

    def test_one_part_of_a_merged_parameter_is_missing(self):
        with pytest.raises(ValueError, match="keeps: layers.0.k_proj.weight$"):
            check_all_loaded(self.Model(), self.LOADED, self.SEEN - {"layers.0.k_proj.weight"}, quantized=True)

    def test_a_whole_parameter_is_missing(self):
        with pytest.raises(ValueError, match="keeps: layers.0.norm.weight$"):
            check_all_loaded(self.Model(), self.LOADED - {"layers.0.norm.weight"}, self.SEEN, quantized=False)


def test_blocks_of_another_part_that_bear_the_names_of_decoder_layers_are_an_error():
    """They would lose what the mask takes from the decoder."""
    with module.dropping(module.Dropping(Decoder("Toy", {}, FAMILY, DropMask(2, attention=(1,))), CONFIG)) as dropped:
        model = nn.ModuleDict({part: nn.ModuleList([Layer(0), Layer(1)]) for part in ("layers", "visual")})
    with pytest.raises(module.SubstitutionError, match=r"visual\.1 was taken for decoder layer 1"):
        dropped.finish(model)
