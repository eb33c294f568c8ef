"""What an architecture's KV cache costs, told from configs as they are published: without what goes without saying."""

import json

import pytest

from llmdrop_vllm import DropMask
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.evaluation.inspection import inspect_checkpoint
from llmdrop_vllm.kv_cache.kinds import LayerKind, layer_kinds, readers
from llmdrop_vllm.kv_cache.layout import kv_layout
from llmdrop_vllm.scoring.scoring import score
from tests.architectures.cases import CASES
from tests.tiny import TINY_LLAMA, write_checkpoint

SIZES = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
# Numbers of one token in one layer: 2 heads of 32 values, keys and values, unless the architecture says otherwise.
OTHERS = {
    "MiniCPM3ForCausalLM": 2 * 4 * 128,
    "AXK1ForCausalLM": 512 + 64,
    "BloomForCausalLM": 2 * 4 * 32,
    "FalconForCausalLM": 2 * 1 * 32,
    "FalconForCausalLM-sequential": 2 * 4 * 32,
    "GPTNeoXForCausalLM": 2 * 4 * 32,
    "GPTNeoXForCausalLM-sequential": 2 * 4 * 32,
    "OPTForCausalLM": 2 * 4 * 32,
    "DeepseekV2ForCausalLM": 512 + 64,
    "DeepseekV3ForCausalLM": 512 + 64,
    "Glm4MoeLiteForCausalLM": 512 + 64,
    "GPTJForCausalLM": 2 * 4 * 32,
    "GPT2LMHeadModel": 2 * 4 * 32,
    "GPTBigCodeForCausalLM": 2 * 1 * 32,
}


@pytest.mark.parametrize("architecture", CASES)
def test_bytes_of_a_token(architecture):
    values = OTHERS.get(architecture, 2 * 2 * 32)
    kinds = layer_kinds(CASES[architecture].config().to_dict())
    large = {2 * values} if "global_head_dim" in CASES[architecture].overrides else set()
    found = {kind.values for kind in kinds if kind.values}
    assert found == {values} | large, "if a token takes that much, name the architecture in OTHERS"
    family = CASES[architecture].family
    assert all(bool(kind.mixers) == (family.mixer(layer) is not None) for layer, kind in enumerate(kinds))


def test_chunked_attention_is_stored_apart_from_full_attention():
    config = SIZES | {"layer_types": ["chunked_attention"] * 3 + ["full_attention"], "attention_chunk_size": 8192}
    kinds = layer_kinds(config)
    assert tuple(map(str, kinds)) == ("chunked 8192",) * 3 + ("full",)
    assert kv_layout(kinds).token_values == 4 * 256
    assert kv_layout(kinds).block_values == 256


def test_a_window_keeps_what_is_computed_together_as_well():
    window, chunk, full = (
        LayerKind(name, 1, span) for name, span in (("sliding", 512), ("chunked", 512), ("full", None))
    )
    assert [kind.tokens_held(8192, 256) for kind in (window, chunk, full)] == [767, 768, 8192]
    assert [kind.tokens_held(400, 256) for kind in (window, chunk, full)] == [400, 400, 400]


def test_what_a_kind_is_called_says_which_it_is():
    for kind in (LayerKind("sliding", 7, 512), LayerKind("full", 7), LayerKind("shared", 0, donor=13)):
        assert LayerKind.parse(str(kind), kind.values) == kind


# As Gemma 3n E2B's and Gemma 4's E-models'.
SHARED = SIZES | {"num_hidden_layers": 30, "num_kv_shared_layers": 10, "sliding_window": 512}
SHARED |= {"layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 6}


def test_layers_that_read_what_others_keep_store_nothing():
    kinds = layer_kinds(SHARED)
    assert [str(kind) for kind in kinds[18:26]] == ["sliding 512", "full", *["shared 18"] * 4, "shared 19", "shared 18"]
    assert readers(kinds, range(26)) == {18: [20, 21, 22, 23, 25], 19: [24]}
    assert readers(kinds, range(20)) == {}
    assert kv_layout(kinds).groups == kv_layout(kinds[:20]).groups
    assert kinds[20].mixers == ("attention",)


def test_layers_with_nothing_to_read_are_refused():
    with pytest.raises(
        CheckpointError, match="layers from 4 on read others' keys and values, and none before has full_"
    ):
        layer_kinds(SHARED | {"num_kv_shared_layers": 26})


OWN = {
    "Step 3.5": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": 512,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_groups": 1,
            "head_dim": 32,
        },
    },
    "heterogeneous": {"per_layer_config": {"1": {"num_key_value_heads": 1, "head_dim": 32}, "3": {"head_dim": 16}}},
    "one window for all": {"sliding_window": 512},
    "a window that is off": {"sliding_window": 512, "use_sliding_window": False},
}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("Step 3.5", [("full", 256), ("sliding 512", 64)] * 2),
        ("heterogeneous", [("full", 256), ("full", 64), ("full", 256), ("full", 64)]),
        ("one window for all", [("sliding 512", 256)] * 4),
        ("a window that is off", [("full", 256)] * 4),
    ],
)
def test_entries_of_one_layer_or_kind_win(case, expected):
    assert [(str(kind), kind.values) for kind in layer_kinds(SIZES | OWN[case])] == expected


def test_kinds_for_fewer_layers_than_there_are_are_refused():
    with pytest.raises(CheckpointError, match="layer_types names 3 layers; the model has 4"):
        layer_kinds(SIZES | {"layer_types": ["full_attention"] * 3})
    # More of them are the layers of a draft head.
    assert len(layer_kinds(SIZES | {"layer_types": ["full_attention"] * 5})) == 4


def test_a_config_that_contradicts_itself_is_refused_in_words():
    config = TINY_LLAMA | {"hidden_size": "wide"}
    with pytest.raises(CheckpointError, match="the config does not describe a model of type llama"):
        Decoder.of(config, "LlamaForCausalLM").kinds  # noqa: B018 - reading it works it out


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Cohere2ForCausalLM"])
def test_kinds_that_config_json_leaves_to_the_architecture(architecture, tmp_path):
    """Published configs of Gemma 2 name a window, and not the layers that have none."""
    whole = CASES[architecture].write(tmp_path)
    expected = tuple(map(str, layer_kinds(CASES[architecture].config().to_dict())))
    assert len(set(expected)) == 2
    path = whole / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_bytes()).items() if k != "layer_types"}))
    checkpoint = Checkpoint.open(whole)
    assert len(set(layer_kinds(checkpoint.config))) == 1
    (tmp_path / "ids.json").write_text(json.dumps([[5, 6, 7, 8]]))
    assert score(checkpoint, load_calibration(checkpoint, str(tmp_path / "ids.json"))).kv_groups == expected
    found = inspect_checkpoint(checkpoint, memory_bytes=1 << 30)
    assert found.kv_layout == kv_layout([*map(LayerKind.parse, expected)]).describe()


def test_a_window_holds_the_first_stretch_and_its_own():
    kind = LayerKind("window", span=1024)
    assert kind.tokens_held(8192, 256) == 128 + (1024 + 128) - 1 + 256
    assert kind.tokens_held(1000, 256) == 1000
    assert kind.seen_in_full == 128 + 1024 + 128
    assert str(kind) == "window 1024"
    assert LayerKind.parse("window 1024") == kind


def test_inspect_says_what_smaller_chunks_of_prompts_give(tmp_path):
    config = {**TINY_LLAMA, "max_position_embeddings": 8192, "llmdrop_windows": {"1": 512, "3": 512}}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, config))
    found = inspect_checkpoint(checkpoint, memory_bytes=1 << 28)
    small = inspect_checkpoint(checkpoint, memory_bytes=1 << 28, chunk=512)
    assert found.full.requests < found.dropped.requests < small.dropped.requests == found.requests_in_small_chunks
    fewer = f"--max-num-batched-tokens 512, which prefills more slowly, {small.dropped.requests} requests"
    assert fewer in found.notes[-1]
    assert small.notes[-1] == "counted with chunks of 512 tokens of prompts, which windows hold too"


def test_inspect_tells_recurrent_mixers_from_attention(tmp_path):
    """Nemotron-H's layers here: attention, Mamba 2, an MLP alone, attention, another MLP."""
    path = CASES["NemotronHForCausalLM"].write(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | DropMask(5, attention=(1,)).to_config()))
    rows = {what: cells for what, *cells in inspect_checkpoint(Checkpoint.open(tmp_path), memory_bytes=1 << 28).rows()}
    assert rows["mixers, attention or recurrent"] == ["3", "2", "67%"]
    assert rows["recurrent mixers"] == ["1", "0", "0%"]
    assert "KV cache and states, bytes of a request of 512 tokens" in rows
