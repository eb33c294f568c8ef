"""What published directories hold beside a model's own tensors, and what is wrong with those cut by hand."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.errors import CheckpointError, MaskError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.architectures.cases import CASES, model_of
from tests.architectures.wrapper_cases import WRAPPER_CASES
from tests.checkpoints.files import MASK, stored
from tests.tiny import TINY_LLAMA, write_checkpoint

DRAFT = {
    "mtp.layers.2.self_attn.q_proj.weight": (8, 8),
    "model.mtp.layers.5.mlp.down_proj.weight": (8, 8),
    "model.layers.8.self_attn.o_proj.weight": (8, 8),
    "vision_tower.encoder.layers.2.mlp.fc1.weight": (8, 8),
    "visual.blocks.5.attn.qkv.weight": (8, 8),
    "talker.model.layers.6.self_attn.q_proj.weight": (8, 8),
    "eagle_module.layers.2.self_attn.q_proj.weight": (8, 8),
    "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": (4, 8),
}


def add(path, shapes, dtype=np.float32):
    tensors = load_file(path) if path.exists() else {}
    save_file(
        tensors | {name: np.ones(shape, dtype) for name, shape in shapes.items()}, path, metadata={"format": "pt"}
    )


def kept(model, mask=MASK):
    return {tensor.name for shard in plan_surgery(model, mask).shards for tensor in shard.tensors}


def test_layers_of_draft_heads_towers_and_adapters_are_not_the_decoders(tmp_path):
    model = write_checkpoint(tmp_path, TINY_LLAMA)
    add(model / "model.safetensors", DRAFT)
    assert {*DRAFT} <= kept(model)
    mlps = DropMask(8, mlp=tuple(range(8)))
    assert {*DRAFT} <= kept(model, mlps)


# The layer whose parts the MTP layer gets, and one of each kind that goes, by the number of the MTP layer too.
WITH_MTP = {
    "Qwen3NextForCausalLM": (2, DropMask(5, attention=(0, 3), mlp=(0,))),
    "NemotronHForCausalLM": (0, DropMask(5, attention=(0, 1), mlp=(2,))),
    "Qwen3_5ForConditionalGeneration": (2, DropMask(5, attention=(0, 3), mlp=(0,))),
    "Qwen3_5MoeForConditionalGeneration": (2, DropMask(5, attention=(0, 3), mlp=(0,))),
}


@pytest.mark.parametrize("name", WITH_MTP)
def test_mtp_layers_of_hybrids_come_out_bit_for_bit(name, tmp_path):
    layer, mask = WITH_MTP[name]
    model = (WRAPPER_CASES if name in WRAPPER_CASES else CASES)[name].write(tmp_path / "model")
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    within = f".layers.{layer}."
    mtp = {f"mtp.layers.0.{each.partition(within)[2]}": tensors[each] * 3 for each in tensors if within in each}
    mtp |= {f"mtp.{each}": np.full((4, 8), 0.7, np.float32) for each in ("fc.weight", "pre_fc_norm_hidden.weight")}
    save_file(tensors | mtp, weights, metadata={"format": "pt"})
    write(plan_surgery(model, mask), tmp_path / "out")
    before, after = stored(model), stored(tmp_path / "out")
    assert len(after) < len(before)
    assert len(mtp) > 4
    assert {each: after[each] for each in mtp} == {each: before[each] for each in mtp}


def test_scales_and_tables_of_a_dropped_sublayer_go_and_those_of_others_stay(tmp_path):
    model = write_checkpoint(tmp_path, TINY_LLAMA)
    endings = ("self_attn.rotary_emb.inv_freq", "self_attn.k_scale", "self_attn.q_proj.input_scale")
    add(model / "model.safetensors", {f"model.layers.{layer}.{each}": (1,) for layer in (2, 3) for each in endings})
    found = kept(model)
    assert all(f"model.layers.3.{each}" in found and f"model.layers.2.{each}" not in found for each in endings)


def test_tensors_that_the_index_does_not_name_come_along_and_are_told(parent, capsys):
    model = parent / "model"
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("model.norm.weight", "lm_head.weight"):
        del index["weight_map"][name]
    path.write_text(json.dumps(index))
    assert main(["apply", str(model), str(parent / "out"), "--attention", "2,"]) == 0
    assert "the index does not list lm_head.weight (2 such tensors); they come along" in capsys.readouterr().err
    assert stored(parent / "out")["lm_head.weight"] == stored(model)["lm_head.weight"]
    written = json.loads((parent / "out" / "model.safetensors.index.dropped.json").read_text())
    assert "lm_head.weight" in written["weight_map"]


def test_a_shard_that_is_left_over_stays_behind(parent):
    model = parent / "model"
    shutil.copyfile(model / "model-00001-of-00002.safetensors", model / "model-00003-of-00003.safetensors")
    plan = plan_surgery(model, MASK)
    assert plan.left_out == ("model-00003-of-00003.safetensors",)
    assert {tensor.path.name for shard in plan.shards for tensor in shard.tensors} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_shards_that_are_all_there_need_no_index(parent):
    before = stored(parent / "model")
    (parent / "model" / "model.safetensors.index.json").unlink()
    write(plan_surgery(parent / "model", MASK), parent / "out")
    assert stored(parent / "out").items() <= before.items()
    (parent / "model" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has shards like model-00001-of-00002\.safetensors and no model\.saf"):
        Checkpoint.open(parent / "model")


@pytest.mark.parametrize("name", ["mtp.safetensors", "model-mtp-00001-of-00001.safetensors"])
def test_a_draft_head_in_a_file_of_its_own_comes_along(name, parent):
    model = parent / "model"
    heads = {"mtp.layers.0.eh_proj.weight": (8, 16), "mtp.norm.weight": (8,)}
    add(model / name, heads)
    plan = plan_surgery(model, MASK)
    write(plan, parent / "out")
    assert plan.warnings == (f"{name} comes along, though no index lists it",)
    assert {*heads} <= stored(parent / "out").keys()
    # What the model's own files hold already is another copy.
    add(model / name, {"model.norm.weight": (64,)})
    assert plan_surgery(model, MASK).left_out == (name,)


CUT = {
    "cut out, the number too": ((3, 4), 6, r"layers 0-2,5-7, and config\.json says 6 layers: 3-4 were cut out"),
    "cut out": ((3, 4), 8, r"says 8 layers: 3-4 were cut out"),
    "the last ones": ((6, 7), 8, r"says 8 layers: 6-7 are missing; set the number to 6, or find them"),
}


@pytest.mark.parametrize("case", CUT)
def test_layers_that_somebody_cut_out_are_named_and_what_to_do_about_them(case, tmp_path):
    gone, said, message = CUT[case]
    without = tuple(f"model.layers.{layer}." for layer in gone)
    model = write_checkpoint(tmp_path / "model", TINY_LLAMA, without=without)
    (model / "config.json").write_text(json.dumps(TINY_LLAMA | {"num_hidden_layers": said}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(model)


def test_what_the_message_about_a_gap_says_makes_an_ordinary_model(tmp_path):
    without = ("model.layers.3.", "model.layers.4.")
    model = write_checkpoint(tmp_path / "model", TINY_LLAMA, without=without)
    (model / "config.json").write_text(json.dumps(TINY_LLAMA | {"num_hidden_layers": 6}))
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.open(model)
    message = str(refused.value)
    assert "set the number to 8 and add" in message
    entries = json.loads("{" + message[message.index('"drop_attn_list"') : message.index("; then")] + "}")
    (model / "config.json").write_text(json.dumps(TINY_LLAMA | {"num_hidden_layers": 8} | entries))
    assert main(["convert", str(model), str(tmp_path / "out"), "--renumber"]) == 0
    found = Checkpoint.open(tmp_path / "out")
    assert (found.mask, found.is_whole) == (DropMask(6), True)


# What does not fit the layers: an architecture, entries, and what is said of it.
MISFITS = {
    "a type a layer, too few": ("Qwen2ForCausalLM", {"layer_types": ["full_attention"] * 3}, r"layer_types"),
    "a type a layer, too many": ("Gemma3ForCausalLM", {"layer_types": ["full_attention"] * 9}, r"layer_types"),
    "of a hybrid": ("Qwen3NextForCausalLM", {"layer_types": ["linear_attention"] * 2}, "names 2 layers; .* has 5"),
    "of another kind": ("Qwen2ForCausalLM", {"layer_types": "full"}, "layer_types"),
    "positions": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "does not describe a SmolLM3ForCausalLM"),
    "layers without experts": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0, 9]}, r"lacks model\.layers\.0\.mlp"),
    "no list": ("Qwen3MoeForCausalLM", {"mlp_only_layers": 3}, "mlp_only_layers"),
    "no number": ("Qwen2ForCausalLM", {"max_window_layers": "all"}, "max_window_layers"),
    "every none-th": ("Gemma3ForCausalLM", {"sliding_window_pattern": 0, "layer_types": None}, "modulo by zero"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_entries_that_do_not_fit_the_layers_are_told_in_one_line(case, tmp_path, capsys):
    architecture, entries, message = MISFITS[case]
    model = CASES[architecture].save(model_of(architecture), tmp_path / "model")
    path = model / "config.json"
    config = {key: value for key, value in (json.loads(path.read_bytes()) | entries).items() if value is not None}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        plan_surgery(model, DropMask(5, attention=(1,)))
    capsys.readouterr()
    assert main(["inspect", str(model)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_list_may_go_on_with_the_layers_of_draft_heads(tmp_path):
    config = TINY_LLAMA | {"model_type": "not_in_transformers", "architectures": ["InternLM3ForCausalLM"]}
    types = ["full_attention", "sliding_attention"] * 4 + ["full_attention"] * 3
    config |= {"sliding_window": 16, "layer_types": types, "num_nextn_predict_layers": 3}
    model = write_checkpoint(tmp_path, config)
    kinds = Checkpoint.open(model).decoder.kinds
    assert [kind.name for kind in kinds] == ["full", "sliding"] * 4


def test_a_mask_for_another_number_of_layers_is_refused_wherever_it_is_used(tmp_path):
    model = write_checkpoint(tmp_path, TINY_LLAMA)
    with pytest.raises(MaskError, match="the mask is for 9 layers; the model has 8"):
        Checkpoint.open(model).under(DropMask(9, attention=(1,)))
