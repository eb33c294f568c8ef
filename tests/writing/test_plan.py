"""What surgery decides and refuses before it writes anything."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmdrop_vllm.artifacts import COMPARISON_FILE
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import CheckpointError, InputError, MaskError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.writing.plan import plan_surgery
from tests.checkpoints.files import (
    COMPANIONS,
    LEFT_OUT_DIRECTORIES,
    MASK,
    OTHER_WEIGHTS,
    add_companions,
    content,
    split,
)
from tests.tiny import TINY_LLAMA, write_checkpoint

LAYER = "model.layers.{}."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), TINY_LLAMA)


def edited(directory, **changes):
    """The checkpoint with some tensors replaced, or removed where the change is None."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    return directory


def test_the_configs_own_mask_is_the_default(tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA | MASK.to_config("llm-drop-booleans"))
    assert plan_surgery(tmp_path).mask == MASK


def test_a_given_mask_replaces_the_configs(tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA | MASK.to_config("transformers"))
    other = DropMask(8, attention=(1,))
    plan = plan_surgery(tmp_path, other)
    assert (plan.mask, DropMask.from_config(plan.config)) == (other, other)
    assert "per_layer_config" not in plan.config


def test_a_mask_must_drop_what_is_already_gone(tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA | MASK.to_config(), strip=True)
    gone = r"keeps: model\.layers\.6\.input_layernorm\.weight, model\.layers\.6\.self_attn\.k_proj\.weight, .*\[2,5-6\]"
    with pytest.raises(CheckpointError, match=gone):
        plan_surgery(tmp_path, DropMask(8, attention=(5, 2, 1), mlp=(7,)))
    assert len(plan_surgery(tmp_path, DropMask(8, attention=(6, 5, 2, 1), mlp=(7,))).dropped) == 5


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (DropMask(12, (1,)), r"for 12 layers; .* has 8"),
        (DropMask(8, tuple(range(8))), r"every one of the 8 attention sublayers"),
        (DropMask(8), "nothing to drop"),
        (None, "nothing to drop"),
    ],
)
def test_masks_that_cannot_be_applied(mask, message, model):
    with pytest.raises(MaskError, match=message):
        plan_surgery(model, mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dialect": "runtime"}, "'runtime' is not a dialect for checkpoints; expected one of llm-drop, "),
        ({"portable": True, "keep_dropped": True}, "exclude each other"),
        ({"portable": True, "dialect": "nemotron-nas"}, "portable is for engines that know no masks"),
        ({"config_only": True, "dialect": "nemotron-nas"}, "refuse weights of dropped sublayers"),
    ],
)
def test_options_that_contradict_each_other(options, message, model):
    with pytest.raises(InputError, match=message):
        plan_surgery(model, MASK, **options)


def test_only_dropped_tensors_go(model):
    plan = plan_surgery(model, MASK)
    gone = {LAYER.format(layer) + name for layer in (2, 5, 6) for name in ("self_attn.", "input_layernorm.")}
    gone |= {LAYER.format(7) + name for name in ("mlp.", "post_attention_layernorm.")}
    names = [tensor.name for tensor in plan.dropped]
    assert len(names) == 3 * 5 + 4
    assert all(name.startswith(tuple(gone)) for name in names)
    total = sum(tensor.num_bytes for tensor in Checkpoint.open(model).tensors.values())
    assert plan.weight_bytes == total - sum(tensor.num_bytes for tensor in plan.dropped)


def test_stripped_weights_have_names_of_their_own(model, tmp_path):
    assert [shard.name for shard in plan_surgery(model, MASK).shards] == ["model.dropped.safetensors"]
    nemotron = plan_surgery(model, MASK, dialect="nemotron-nas")
    whole = plan_surgery(model, MASK, portable=True)
    kept = plan_surgery(model, MASK, keep_dropped=True)
    assert [plan.shards[0].name for plan in (nemotron, whole, kept)] == ["model.safetensors"] * 3
    write_checkpoint(tmp_path, TINY_LLAMA | MASK.to_config(), strip=True)
    assert plan_surgery(tmp_path, keep_dropped=True).shards[0].name == "model.dropped.safetensors"


def test_weights_without_any_mlp_are_not_whole(tmp_path):
    """No layer is left that could show what the others lack."""
    mask = DropMask(8, mlp=tuple(range(8)))
    write_checkpoint(tmp_path, TINY_LLAMA | mask.to_config(), strip=True)
    assert plan_surgery(tmp_path, keep_dropped=True).shards[0].name == "model.dropped.safetensors"


def test_shards_that_become_empty_are_not_written(tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA)
    split(tmp_path, (tuple(LAYER.format(5) + name for name in ("self_attn.", "input_layernorm.")), ("lm_head.",)))
    plan = plan_surgery(tmp_path, MASK)
    assert [shard.name for shard in plan.shards] == [f"model.dropped-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert [shard.metadata["part"] for shard in plan.shards] == ["2", "3"]
    assert plan.index == "model.safetensors.index.dropped.json"
    assert plan_surgery(tmp_path, MASK, portable=True).index == "model.safetensors.index.json"


def test_one_shard_that_is_left_needs_no_index(tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA)
    split(tmp_path, (tuple(LAYER.format(5) + name for name in ("self_attn.", "input_layernorm.")),))
    plan = plan_surgery(tmp_path, MASK)
    assert [shard.name for shard in plan.shards] == ["model.dropped.safetensors"]
    assert plan.index is None


def test_the_architecture_gets_a_name_that_other_engines_refuse(model):
    assert plan_surgery(model, MASK).config["architectures"] == ["DroppedLlamaForCausalLM"]
    assert plan_surgery(model, MASK, config_only=True).config["architectures"] == ["DroppedLlamaForCausalLM"]
    assert plan_surgery(model, MASK, portable=True).config["architectures"] == ["LlamaForCausalLM"]
    assert plan_surgery(model, keep_dropped=True).config["architectures"] == ["LlamaForCausalLM"]


def test_the_config_keeps_its_order_and_everything_else(tmp_path):
    layers = {"layer_types": ["full_attention"] * 8, "quantity": {"nested": [1]}}
    config = {"drop_mlp_list": [], "drop_attn_list": [1]} | TINY_LLAMA | layers
    write_checkpoint(tmp_path, config)
    written = plan_surgery(tmp_path, MASK).config
    expected = config | {
        "architectures": ["DroppedLlamaForCausalLM"],
        "drop_mlp_list": [7],
        "drop_attn_list": [6, 5, 2],
    }
    assert [*written.items()] == [*expected.items()]


def test_every_other_file_comes_along_but_other_weights(tmp_path):
    add_companions(write_checkpoint(tmp_path, TINY_LLAMA))
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / COMPARISON_FILE).write_text("{}")  # of answers that the new weights do not give
    plan = plan_surgery(tmp_path, MASK)
    assert set(plan.copies) == set(COMPANIONS)
    assert set(plan.left_out) == {*OTHER_WEIGHTS, *(f"{name}/" for name in LEFT_OUT_DIRECTORIES), "loop/", "broken"}


def test_planning_writes_nothing(tmp_path):
    add_companions(write_checkpoint(tmp_path, TINY_LLAMA))
    before = content(tmp_path)
    plan_surgery(tmp_path, MASK)
    assert content(tmp_path) == before


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path):
    name = "model.layers.3.self_attn.q_proj.weight"
    edited(write_checkpoint(tmp_path, TINY_LLAMA), **{name: np.zeros((64, 64), np.float32)})
    with pytest.raises(CheckpointError, match=r"3\.self_attn\.q_proj\.weight .*\[64, 64\].*\[128, 64\]"):
        plan_surgery(tmp_path, MASK)
    # Of a sublayer that goes, the shape does not matter.
    plan_surgery(tmp_path, DropMask(8, attention=(3,)))


def test_a_tensor_of_the_wrong_dtype_is_named(tmp_path):
    edited(write_checkpoint(tmp_path, TINY_LLAMA), **{"lm_head.weight": np.zeros((256, 64), np.int32)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* dtype I32"):
        plan_surgery(tmp_path, MASK)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(name, tmp_path):
    edited(write_checkpoint(tmp_path, TINY_LLAMA), **{name: None})
    with pytest.raises(CheckpointError, match=rf"lacks .*{name}"):
        plan_surgery(tmp_path, MASK)


def test_weights_that_many_layers_lack_are_named_and_counted(tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA, without=tuple(f"model.layers.{layer}.mlp." for layer in range(1, 8)))
    named = (
        r"keeps: (model\.layers\.[123]\.mlp\.[\w.]+, ){7}[\w.]+ and 13 more; its config says: attention dropped in 0"
    )
    with pytest.raises(CheckpointError, match=named):
        plan_surgery(tmp_path, DropMask(8, attention=(5,)))


def test_a_tied_head_may_be_missing(tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA | {"tie_word_embeddings": True})
    kept = {tensor.name for shard in plan_surgery(tmp_path, MASK).shards for tensor in shard.tensors}
    assert "model.embed_tokens.weight" in kept
    assert "lm_head.weight" not in kept


def test_tensors_beyond_the_architectures_are_kept(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edited(write_checkpoint(tmp_path, TINY_LLAMA), **{name: np.ones(16, np.float32)})
    assert name in [tensor.name for tensor in plan_surgery(tmp_path, MASK).shards[0].tensors]


def test_quantized_tensors_are_not_compared_with_the_architectures(tmp_path):
    config = TINY_LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(8)]
    changes = {f"{name}.weight": None for name in names}
    changes |= {f"{name}.qweight": np.zeros((8, 128), np.int32) for name in names}
    edited(write_checkpoint(tmp_path, config), **changes)
    plan_surgery(tmp_path, MASK)
    with pytest.raises(CheckpointError, match="is quantized, and zeros have no common form"):
        plan_surgery(tmp_path, MASK, portable=True)


def test_a_portable_checkpoint_needs_the_dropped_weights(tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA | MASK.to_config(), strip=True)
    with pytest.raises(CheckpointError, match=r"no self_attn\.o_proj\.weight in layers 2, 5, 6"):
        plan_surgery(tmp_path, portable=True)


def test_a_config_that_contradicts_itself_is_refused(tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | {"hidden_size": "wide"}))
    with pytest.raises(CheckpointError, match=r"the config does not describe a LlamaForCausalLM: .*hidden_size"):
        plan_surgery(tmp_path, MASK)


def test_a_model_that_transformers_does_not_know_is_not_compared(tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA | {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3"})
    (warning,) = plan_surgery(tmp_path, MASK).warnings
    assert "does not know model_type 'internlm3'" in warning
    with pytest.raises(MaskError, match="cannot express this model: model_type is 'internlm3'"):
        plan_surgery(tmp_path, MASK, dialect="nemotron-nas")
