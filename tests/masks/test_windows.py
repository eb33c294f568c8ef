"""Windows in a mask: what a config says of them, and what is left of them when more is dropped."""

from dataclasses import replace

import pytest

from llmdrop_vllm import DropMask, MaskError
from llmdrop_vllm.artifacts import read_record, write_record
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.dialects import ON_DISK, windows_of, without_mask

WINDOWS = ((1, 1024), (3, 64))
MASK = DropMask(6, attention=(5, 2), mlp=(3,), windows=WINDOWS)


@pytest.mark.parametrize("dialect", [*ON_DISK, "runtime"])
def test_they_stand_beside_every_dialect(dialect):
    entries = {"num_hidden_layers": 6} | MASK.to_config(dialect)
    assert DropMask.from_config(entries) == MASK
    assert without_mask(entries) == {"num_hidden_layers": 6}


@pytest.mark.parametrize("mask", [DropMask(6), DropMask(6, attention=(1, 3)), DropMask(6, windows=((2, 8),)), MASK])
def test_what_goes_over_a_config_at_run_time_leaves_nothing_of_it(mask):
    entries = {"num_hidden_layers": 6} | MASK.to_config() | mask.to_config("runtime")
    assert DropMask.from_config(entries).effect == mask.effect


def test_they_stand_by_themselves():
    mask = DropMask.from_config({"num_hidden_layers": 6, "llmdrop_windows": {"3": 64, "1": 1024}})
    assert mask == DropMask(6, windows=WINDOWS)
    assert mask
    assert mask.dropped == DropMask(6).dropped
    assert mask.effect != DropMask(6).effect
    assert DropMask.dialects_that_drop({"llmdrop_windows": {"3": 64}}) == ("llmdrop_windows",)


def test_what_is_dropped_has_none():
    assert replace(MASK, attention=(3, 2)).windows == ((1, 1024),)


def test_they_are_told():
    assert MASK.summary() == (
        "attention dropped in 2 of 6 layers [2,5], MLP in 1 [3], windows of 64 tokens in 1 [3], "
        "windows of 1,024 tokens in 1 [1]"
    )


def test_a_mask_file_keeps_them(tmp_path):
    write_record(MaskFile.of(MASK, "by hand"), tmp_path / "mask.json")
    assert read_record(MaskFile, tmp_path / "mask.json").mask == MASK


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"llmdrop_windows": [3]}, r"llmdrop_windows is \[3\]; expected an object like"),
        ({"llmdrop_windows": {"a": 3}}, "llmdrop_windows has the key 'a'"),
        ({"llmdrop_windows": {"6": 3}}, "windows names layer 6; the model's 6 layers are 0 to 5"),
        ({"llmdrop_windows": {"3": 0}}, "layer 3 is 0 tokens; expected 1 or more; a window of nothing is dropped"),
        ({"llmdrop_windows": {"3": -1}}, "layer 3 is -1 tokens"),
        ({"llmdrop_windows": {"3": True}}, "layer 3 is True tokens"),
        ({"llmdrop_windows": {"3": 8, 3: 9}}, "windows names layer 3 twice"),
        ({"llmdrop_windows": {"3": 8}, "drop_attn_list": [3]}, r"layers \[3\] have a window, and their attention is"),
    ],
)
def test_what_makes_no_sense_is_refused(entries, message):
    with pytest.raises(MaskError, match=message):
        DropMask.from_config({"num_hidden_layers": 6} | entries)


@pytest.mark.parametrize(("layers", "tokens"), [((3,), None), ((), 64)])
def test_layers_and_tokens_are_said_together(layers, tokens):
    with pytest.raises(MaskError, match="give both"):
        windows_of(layers, tokens)
