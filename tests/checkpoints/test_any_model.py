"""ModelOpt's AnyModel exports: a mask where all that is left is of one width, else refused by what was found."""

import json

import pytest

from llmdrop_vllm import DropMask
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.tiny import TINY_LLAMA, write_checkpoint

ATTENTION = {"kind": "attention", "name": "attention", "no_op": False, "num_query_heads": 4, "num_kv_heads": 2}
FFN = {"kind": "ffn", "name": "ffn", "no_op": False, "intermediate_size": 128}
NO_ATTENTION = {"kind": "attention", "name": "attention", "no_op": True, "num_query_heads": None, "num_kv_heads": None}
MASK = DropMask(8, attention=(2, 5))


def export(directory, changes=(), **entries):
    """An export of a tiny Llama without two attentions; `changes` are (layer, subblock, entries)."""
    blocks = [
        {"subblock_configs": [dict(NO_ATTENTION if i in MASK.attention else ATTENTION), dict(FFN)]} for i in range(8)
    ]
    for layer, number, change in changes:
        blocks[layer]["subblock_configs"][number] |= change
    named = {"architectures": ["AnyModel"], "base_architecture": "LlamaForCausalLM", "block_configs": blocks}
    write_checkpoint(directory, TINY_LLAMA | MASK.to_config(), strip=True)
    (directory / "config.json").write_text(json.dumps(TINY_LLAMA | named | entries))
    return directory


def test_one_of_uniform_widths_is_a_mask_and_converts_to_a_checkpoint_of_ours(tmp_path):
    directory = export(tmp_path / "export")
    checkpoint = Checkpoint.open(directory)
    assert (checkpoint.architecture, checkpoint.mask) == ("LlamaForCausalLM", MASK)
    write(plan_surgery(directory, keep_dropped=True), tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_bytes())
    assert config["architectures"] == ["DroppedLlamaForCausalLM"]
    assert config["drop_attn_list"] == [2, 5]
    assert not {"block_configs", "base_architecture"} & config.keys()


def test_the_older_form_is_read_as_well(tmp_path):
    blocks = [
        {"attention": {"no_op": i in MASK.attention, "num_key_value_heads": 2}, "ffn": {"intermediate_size": 128}}
        for i in range(8)
    ]
    blocks = [block | {"attention": {"no_op": True}} if block["attention"]["no_op"] else block for block in blocks]
    assert Checkpoint.open(export(tmp_path, block_configs=blocks)).mask == MASK


REFUSED = {
    "a narrower MLP": (
        [(3, 1, {"intermediate_size": 96})],
        {},
        r"\[3\].*\[1\].intermediate_size is 96, the config's is 1",
    ),
    "fewer heads": ([(1, 0, {"num_kv_heads": 1})], {}, r"\[1\].*\[0\].num_kv_heads is 1, the config's is 2"),
    "a window in one layer": (
        [(4, 0, {"sliding_window_size": 64})],
        {},
        r"\[4\].*\[0\].sliding_window_size is 64, .*None",
    ),
    "an unknown kind": (
        [(0, 1, {"kind": "kan"})],
        {},
        "a subblock of kind 'kan'; expected one of attention, mla, mamba",
    ),
    "no base": ([], {"base_architecture": None}, "base_architecture is None; expected the architecture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_what_was_found(name, tmp_path):
    changes, entries, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(export(tmp_path, changes, **entries))
