"""A Llama or Mistral in the clothes of a Nemotron-NAS model, and back in its own."""

import copy
import json
import math
import pickle

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

from llmdrop_vllm import hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.nemotron import SOURCE, plain, renamed, warnings
from llmdrop_vllm.errors import CheckpointError, MaskError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.checkpoints.files import stored
from tests.serving.engine_process import run_job
from tests.tiny import TINY_LLAMA, write_checkpoint

MASK = DropMask(8, attention=(6, 5, 2), mlp=(6, 0))
PROMPT = [*range(3, 60)]
# The shape that every engine can read: FFN widths of 256, head_dim = hidden_size / num_attention_heads.
REGULAR = TINY_LLAMA | {"intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}
MISTRAL = TINY_LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}


def written(directory, config, mask=MASK):
    """(the checkpoint that was renamed, what it was made from)"""
    model = write_checkpoint(directory / "model", config)
    write(plan_surgery(model, mask, dialect="nemotron-nas"), directory / "out")
    return directory / "out", model


def logits(loaded):
    with torch.no_grad():
        return loaded.eval()(torch.tensor([PROMPT])).logits


def test_what_the_engines_read(tmp_path):
    """llama.cpp wants both widths in every block, null where there is nothing, and a float for the FFN's."""
    out, _ = written(tmp_path, REGULAR)
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["DeciLMForCausalLM"], "nemotron-nas")
    assert config["block_configs"][0] == {
        "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 2},
        "ffn": {"no_op": True, "replace_with_linear": False, "ffn_mult": None},
    }
    assert config["block_configs"][2] == {
        "attention": {"no_op": True, "replace_with_linear": False, "n_heads_in_group": None},
        "ffn": {"no_op": False, "replace_with_linear": False, "ffn_mult": 12.0},
    }
    assert isinstance(config["block_configs"][2]["ffn"]["ffn_mult"], float)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "configuration_nemotron_nas.py",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(4096, 11008), (4096, 14336), (5120, 13824), (8192, 28672), (960, 2560), (2048, 256)]
)
def test_the_engines_compute_the_width_that_the_multiplier_was_made_from(hidden, intermediate):
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=8, num_hidden_layers=1)
    ffn = renamed({"model_type": "llama"}, DropMask(1), config, "m.C")["block_configs"][0]["ffn"]
    assert math.ceil(int(2 * ffn["ffn_mult"] * hidden / 3) / 256) * 256 == intermediate


def test_a_width_that_no_multiplier_says_is_said_itself():
    config = LlamaConfig(hidden_size=576, intermediate_size=1536 + 64, num_attention_heads=8, num_hidden_layers=1)
    ffn = renamed({"model_type": "llama"}, DropMask(1), config, "m.C")["block_configs"][0]["ffn"]
    assert ffn == {"no_op": False, "replace_with_linear": False, "intermediate_size": 1600}
    assert "only vLLM can read it" in warnings(DropMask(1), config)[0]


def test_defaults_that_differ_between_architectures_are_written_out():
    found = renamed({"model_type": "mistral"}, DropMask(32, (1,)), MistralConfig(sliding_window=None), "m.C")
    assert found["intermediate_size"] == 14336 != LlamaConfig().intermediate_size
    assert found["num_key_value_heads"] == 8
    null = {"model_type": "llama", "num_key_value_heads": None}
    assert renamed(null, DropMask(32, (1,)), LlamaConfig.from_dict(null), "m.C")["num_key_value_heads"] == 32


@pytest.mark.parametrize("config", [REGULAR, TINY_LLAMA, MISTRAL], ids=["Llama", "narrow Llama", "Mistral"])
def test_renamed_is_the_same_model_and_gets_its_name_back(config, tmp_path):
    out, model = written(tmp_path, config | {"auto_map": {"AutoConfig": "own.Config"}})
    write(plan_surgery(model, MASK), tmp_path / "usual")
    assert Checkpoint.open(out).mask == MASK
    assert torch.equal(logits(hf.from_pretrained(out)), logits(hf.from_pretrained(tmp_path / "usual")))
    write(plan_surgery(out, keep_dropped=True), tmp_path / "back")
    first, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("usual", "back"))
    assert back == first
    assert stored(tmp_path / "back") == stored(tmp_path / "usual")
    assert not (tmp_path / "back" / "configuration_nemotron_nas.py").exists()


def test_renaming_twice_remembers_the_first_name(tmp_path):
    out, _ = written(tmp_path, MISTRAL)
    write(plan_surgery(out, DropMask(8, (6, 5, 2, 1), (6, 0)), dialect="nemotron-nas"), tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config[SOURCE] == {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    assert Checkpoint.open(tmp_path / "again").architecture == "MistralForCausalLM"


def test_weights_of_dropped_sublayers_go_even_when_converting(tmp_path):
    """Loaders of these checkpoints refuse them."""
    model = write_checkpoint(tmp_path / "model", TINY_LLAMA | MASK.to_config())
    assert len(plan_surgery(model, keep_dropped=True, dialect="nemotron-nas").dropped) == 3 * 5 + 2 * 4


def test_a_checkpoint_of_others_is_a_llama_of_one_width():
    blocks = [
        {"attention": {"n_heads_in_group": 8, "no_op": False}, "ffn": {"ffn_mult": 5.25, "no_op": False}},
        {"attention": {"n_heads_in_group": None, "no_op": True}, "ffn": {"ffn_mult": 5.25, "no_op": False}},
    ]
    wild = {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "num_key_value_heads": None}
    wild |= {"num_attention_heads": 64, "hidden_size": 8192, "block_configs": blocks, "auto_map": {"AutoConfig": "d.D"}}
    found = plain(wild)
    assert (found["architectures"], found["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert (found["num_key_value_heads"], found["intermediate_size"]) == (8, 28672)
    assert "auto_map" not in found
    blocks[1] = {"attention": {"n_heads_in_group": 4, "no_op": False}, "ffn": blocks[1]["ffn"]}
    with pytest.raises(CheckpointError, match="key-value heads 8, 16; a Llama has one"):
        plain(wild)
    blocks[1] = {"attention": blocks[0]["attention"], "ffn": {"ffn_mult": 1.3125, "no_op": False}}
    with pytest.raises(CheckpointError, match="FFN widths 7168, 28672; a Llama has one"):
        plain(wild)


@pytest.mark.parametrize("source", ["llama", {"model_type": "llama"}, {"architectures": [], "model_type": "", "x": 1}])
def test_an_unreadable_source_is_refused(source):
    with pytest.raises(CheckpointError, match=f"{SOURCE} is .*; expected an object with architectures"):
        plain({"model_type": "nemotron-nas", SOURCE: source})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"sliding_window": None, "hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"model_type": "ministral3"}, "model_type is 'ministral3'; expected one of llama, mistral"),
    ],
)
def test_what_cannot_be_expressed_is_refused(changes, message, tmp_path):
    write_checkpoint(tmp_path, MISTRAL | changes)
    with pytest.raises(MaskError, match=message):
        plan_surgery(tmp_path, MASK, dialect="nemotron-nas")


def test_mistrals_default_sliding_window_counts(tmp_path):
    write_checkpoint(tmp_path, {key: value for key, value in MISTRAL.items() if key != "sliding_window"})
    with pytest.raises(MaskError, match="sliding_window is 4096"):
        plan_surgery(tmp_path, MASK, dialect="nemotron-nas")


@pytest.mark.parametrize(
    ("mask", "changes", "expected"),
    [
        (DropMask(8, (2,), (2,)), {}, []),
        (DropMask(8, (0,)), {}, ["the first kept sublayer, in layer 0, is an MLP"]),
        (DropMask(8, (0, 1), (0,)), {}, ["the first kept sublayer, in layer 1, is an MLP"]),
        (DropMask(8, (0,), (0,)), {}, []),
        (DropMask(8, (2,), (7, 3)), {}, ["llama.cpp ignores the attention of layers without an MLP: 3, 7"]),
        (DropMask(8, (2,)), {"intermediate_size": 128}, ["intermediate_size is 128"]),
        (DropMask(8, (2,)), {"head_dim": 16}, ["head_dim is 16"]),
        (DropMask(8, (2,)), {"vocab_size": 256}, ["the vocabulary of Llama 3 only (128,256 tokens)"]),
        (DropMask(8, (2,)), {"attention_bias": True, "mlp_bias": True}, ["attention biases", "MLP biases"]),
    ],
)
def test_engines_that_would_not_serve_it_are_named(mask, changes, expected):
    found = warnings(mask, LlamaConfig.from_dict(REGULAR | {"vocab_size": 128_256} | changes))
    assert len(found) == len(expected)
    assert all(part in warning for part, warning in zip(expected, found, strict=True))


def test_the_config_class_in_the_checkpoint_gives_attributes_and_stays_json(tmp_path, monkeypatch):
    out, _ = written(tmp_path, REGULAR)
    # Where a vLLM with our plugin ran in this process, Transformers knows the model type.
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "nemotron-nas", raising=False)
    with pytest.raises(ValueError, match=r"nemotron-nas|trust_remote_code"):
        AutoConfig.from_pretrained(out, trust_remote_code=False)
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    for each in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert each.block_configs[6].attention.no_op
        assert each.block_configs[1].attention.n_heads_in_group == 2
        assert not hasattr(each.block_configs[1].ffn, "intermediate_size")
        assert DropMask.from_config(each) == MASK
    assert json.loads(config.to_json_string())["block_configs"] == config.block_configs
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


@pytest.mark.processes
@pytest.mark.parametrize("config", [REGULAR, TINY_LLAMA], ids=["regular", "narrow"])
def test_stock_vllm_serves_it_as_transformers_computes_it(config, tmp_path):
    """Without our plugin, in the processes that vLLM usually starts."""
    out, _ = written(tmp_path, config)
    options = {"trust_remote_code": True, "enforce_eager": True}
    stock = run_job({"VLLM_PLUGINS": ""}, model=out, prompt=PROMPT, tokens=1, **options)
    assert "Resolved architecture: DeciLMForCausalLM" in stock["log"]
    assert "attention dropped in" not in stock["log"]
    expected = logits(hf.from_pretrained(out, dtype=torch.float32))[0].log_softmax(-1)
    for position, token in enumerate(PROMPT[1:]):
        assert stock["logprobs"][position][0] == pytest.approx(expected[position, token].item(), abs=1e-5)
    assert stock["tokens"] == [expected[-1].argmax().item()]
