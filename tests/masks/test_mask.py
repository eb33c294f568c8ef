"""The drop mask: every dialect read and written; bad values refused with key, value and what is allowed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.dialects import WRITERS, without_mask
from llmdrop_vllm.masks.mask import DropMask

# From the literature: (layers, attention in rank order, MLP in rank order).
PUBLISHED = {
    "Mistral-7B-v0.1 attention 8": (32, (25, 26, 24, 22, 27, 28, 23, 21), ()),
    "Mistral-7B-v0.1 MLP 8": (32, (), (26, 27, 25, 24, 23, 22, 29, 28)),
    "Llama-2-13B attention 8": (40, (33, 32, 35, 30, 34, 31, 29, 27), ()),
    "Llama-2-13B block 8": (40, (33, 32, 31, 34, 30, 35, 29, 28), (33, 32, 31, 34, 30, 35, 29, 28)),
    "Llama-2-70B attention 40": (80, (22, 30, 32, 36, 43, *range(45, 80)), ()),
}


@st.composite
def masks(draw: st.DrawFn) -> DropMask:
    num_layers = draw(st.integers(1, 40))
    indices = st.lists(st.integers(0, num_layers - 1), unique=True)
    return DropMask(num_layers, tuple(draw(indices)), tuple(draw(indices)))


@given(masks(), st.sampled_from(sorted(WRITERS)))
def test_every_dialect_reads_back_what_it_wrote(mask, dialect):
    config = json.loads(json.dumps({"num_hidden_layers": mask.num_hidden_layers} | mask.to_config(dialect)))
    assert DropMask.from_config(config) == mask


@pytest.mark.parametrize("dialect", WRITERS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rankings_keep_their_order(name, dialect):
    mask = DropMask(*PUBLISHED[name])
    assert DropMask.from_config({"num_hidden_layers": mask.num_hidden_layers} | mask.to_config(dialect)) == mask


@given(masks())
def test_dialects_that_agree_are_one_mask_with_the_rank_order(mask):
    config = {"num_hidden_layers": mask.num_hidden_layers}
    for dialect in ("nemotron-nas", "transformers", "llm-drop"):
        config |= mask.to_config(dialect)
    assert DropMask.from_config(config) == mask


def test_dialects_that_disagree_are_both_named():
    config = (
        {"num_hidden_layers": 4} | DropMask(4, (1,)).to_config("llm-drop") | DropMask(4, (2,)).to_config("transformers")
    )
    with pytest.raises(MaskError, match=r"llm-drop says .*\[1\].*transformers says .*\[2\]"):
        DropMask.from_config(config)


def test_booleans_are_never_indices():
    config = {"num_hidden_layers": 2, "drop_attn_list": [False, True]}
    assert DropMask.from_config(config).attention == (1,)
    assert DropMask.from_config(config | {"drop_attn_list": [0, 1]}).attention == (0, 1)
    with pytest.raises(MaskError, match="attention holds False"):
        DropMask(2, attention=(False, True))


def test_a_config_without_a_mask_drops_nothing():
    assert not DropMask.from_config({"num_hidden_layers": 3})
    assert DropMask.dialects({"num_hidden_layers": 3}) == ()
    assert DropMask.dialects({"num_hidden_layers": 3, "drop_mlp_list": []}) == ("llm-drop",)


@given(masks())
def test_a_mask_is_asked_for_in_every_dialect_that_drops_something(mask):
    for dialect in WRITERS:
        asked = DropMask.dialects_that_drop(mask.to_config(dialect))
        assert bool(asked) == bool(mask), dialect


def test_other_uses_of_the_same_keys_ask_for_nothing():
    """Gemma 4 says its head widths in per_layer_config, and other models have block configs of another schema."""
    assert DropMask.dialects_that_drop({"per_layer_config": {"05": {"head_dim": 512}}}) == ()
    assert DropMask.dialects_that_drop({"block_configs": [{"block_type": "moe"}], "drop_attn_list": []}) == ()


def test_widths_layer_by_layer_are_no_mask():
    widths = {"num_hidden_layers": 4, "per_layer_config": {"1": {"num_key_value_heads": 2}, "3": {"head_dim": 8}}}
    assert not DropMask.from_config(widths)
    assert without_mask(widths) == widths
    assert without_mask({"per_layer_config": {"1": {"skip": ["mlp"]}}}) == {}
    for layers in ({"2": {"skip": None}}, {"2": {"skip": []}}, {"1": {"head_dim": 8, "skip": None}}):
        assert not DropMask.from_config({"num_hidden_layers": 4, "per_layer_config": layers})


def test_a_mask_of_lists_is_a_value_too():
    assert hash(DropMask(4, attention=[2, 1])) == hash(DropMask(4, attention=(2, 1)))


def test_reads_a_transformers_config_object_in_every_dialect():
    transformers = pytest.importorskip("transformers")
    mask = DropMask(4, (2, 1), (3,))
    for dialect in WRITERS:
        config = transformers.LlamaConfig(num_hidden_layers=4, **mask.to_config(dialect))
        assert DropMask.from_config(config).dropped == mask.dropped, dialect


def test_reads_block_configs_that_are_objects():
    class Settings:
        def __init__(self, no_op):
            self.no_op = no_op

    class Block:
        def __init__(self, attention, ffn):
            self.attention, self.ffn = Settings(attention), Settings(ffn)

    config = {"num_hidden_layers": 2, "block_configs": [Block(True, False), Block(False, True)]}
    assert DropMask.from_config(config) == DropMask(2, (0,), (1,))


BAD = {
    "index out of range": (
        {"drop_attn_list": [1, 4]},
        r"drop_attn_list names layer 4; the model's 4 layers are 0 to 3",
    ),
    "negative index": ({"drop_mlp_list": [-1]}, r"drop_mlp_list names layer -1; .* 0 to 3"),
    "duplicate index": ({"drop_attn_list": [2, 2]}, r"drop_attn_list names layer 2 twice"),
    "string": ({"drop_attn_list": "25,26"}, r"drop_attn_list is '25,26'; expected a list"),
    "string entry": ({"drop_attn_list": ["1"]}, r"drop_attn_list holds '1'"),
    "float entry": ({"drop_attn_list": [1.0]}, r"drop_attn_list holds 1.0"),
    "nested list": ({"drop_attn_list": [[1]]}, r"drop_attn_list holds \[1\]"),
    "null": ({"drop_attn_list": None}, r"drop_attn_list is None"),
    "null entry": ({"drop_mlp_list": [None]}, r"drop_mlp_list holds None"),
    "single index": ({"drop_attn_list": 3}, r"drop_attn_list is 3; expected a list"),
    "booleans of the wrong length": ({"drop_attn_list": [True, False]}, r"holds 2 booleans; .* each of the 4 layers"),
    "mixed": ({"drop_attn_list": [True, False, 2, False]}, r"mixes booleans with 2"),
    "per-layer key": ({"per_layer_config": {"x": {}}}, r"per_layer_config has the key 'x'"),
    "per-layer index": ({"per_layer_config": {"9": {"skip": ["mlp"]}}}, r"names layer 9; .* 0 to 3"),
    "per-layer list": ({"per_layer_config": [1]}, r"per_layer_config is \[1\]"),
    "per-layer value": ({"per_layer_config": {"1": "attention"}}, r"per_layer_config\['1'\] is 'attention'"),
    "per-layer sublayer": ({"per_layer_config": {"1": {"skip": ["attn"]}}}, r"skip holds 'attn'; expected 'attention'"),
    "per-layer skip": ({"per_layer_config": {"1": {"skip": "attention"}}}, r"skip is 'attention'; expected a list"),
    "per-layer twice": ({"per_layer_config": {"1": {"skip": ["mlp"]}, 1: {"skip": ["mlp"]}}}, r"names layer 1 twice"),
    "per-layer width": (
        {"per_layer_config": {"1": {"num_key_value_heads": 2}, "2": {"skip": ["mlp"]}}},
        r"overrides num_key_value_heads",
    ),
    "blocks of another depth": ({"block_configs": []}, r"block_configs describes 0 layers; the model has 4"),
    "blocks of another type": ({"block_configs": "no"}, r"block_configs is 'no'"),
    "block without ffn": (
        {"block_configs": [{"attention": {"no_op": True}}] * 4},
        r"block_configs\[0\].ffn is missing",
    ),
    "no_op of another type": (
        {"block_configs": [{"attention": {"no_op": 1}, "ffn": {"no_op": False}}] * 4},
        r"block_configs\[0\].attention.no_op is 1; expected true or false",
    ),
    "linear replacement": (
        {"block_configs": [{"attention": {"replace_with_linear": True}, "ffn": {}}] * 4},
        r"replace_with_linear is set",
    ),
    "rank order of other layers": (
        DropMask(4, (2, 1)).to_config("transformers") | {"llmdrop_rank_order": {"attention": [3, 1], "mlp": []}},
        r"llmdrop_rank_order names other layers than the mask: attention \[1, 3\] .* the mask drops \[1, 2\]",
    ),
    "rank order of another type": (
        {"drop_attn_list": [1], "llmdrop_rank_order": [1]},
        r"llmdrop_rank_order is \[1\]; expected an object with 'attention' and 'mlp'",
    ),
    "no layer count": ({"num_hidden_layers": None}, r"no layer count"),
    "layer count of another type": (
        {"num_hidden_layers": "4"},
        r"num_hidden_layers is '4'; expected a positive integer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(name):
    entries, message = BAD[name]
    with pytest.raises(MaskError, match=message):
        DropMask.from_config({"num_hidden_layers": 4} | entries)


def test_what_is_neither_dict_nor_config_is_refused():
    with pytest.raises(MaskError, match="expected a config.json dict or a Transformers config, found list"):
        DropMask.from_config([])


def test_an_unknown_dialect_is_refused():
    with pytest.raises(MaskError, match="unknown mask dialect 'gguf'; known: llm-drop"):
        DropMask(2).to_config("gguf")


@pytest.mark.parametrize(
    ("mask", "summary"),
    [
        (DropMask(32, tuple(range(28, 20, -1))), "attention dropped in 8 of 32 layers [21-28], MLP in 0"),
        (DropMask(4, (3, 0), (1, 2)), "attention dropped in 2 of 4 layers [0,3], MLP in 2 [1-2]"),
    ],
)
def test_summary(mask, summary):
    assert mask.summary() == summary
