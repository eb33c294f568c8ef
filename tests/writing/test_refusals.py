"""Bad models and bad places: a clear error, and everything is as it was."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmdrop_vllm.errors import CheckpointError, InputError, MaskError, OutputError
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.checkpoints.files import MASK, SMALL, content, put_nan, truncate
from tests.tiny import TINY_LLAMA, write_checkpoint


def only_pickle(directory):
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80")


def unsupported(directory):
    (directory / "config.json").write_text(json.dumps(TINY_LLAMA | {"architectures": ["MambaForCausalLM"]}))


def shard_elsewhere(directory):
    """A whole shard of another model, in the place that the index names."""
    shutil.copyfile(directory / "model-00002-of-00002.safetensors", directory.parent / "theirs.safetensors")
    path = directory / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002-of-00002", "../theirs"))


def twice(directory):
    """The first shard's tensors in the second as well."""
    first, second = sorted(directory.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second)


def adapter(directory):
    (directory / "config.json").unlink()
    (directory / "adapter_config.json").write_text("{}")


def unmerged(directory):
    """PEFT's own model, saved as if it were the one inside."""
    for path in directory.glob("*.safetensors"):
        renamed = {f"base_model.model.{name}": value for name, value in load_file(path).items()}
        save_file(renamed, path)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {f"base_model.model.{name}": file for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))


BAD_MODELS = {
    "NaN": (put_nan, r"1\.mlp\.up_proj\.weight in .*00001-of-00002\.safetensors holds NaN"),
    "negative NaN": (lambda model: put_nan(model, value=-np.float32(np.nan)), "holds NaN"),
    "missing shard": (lambda model: (model / "model-00002-of-00002.safetensors").unlink(), "00002.* is missing"),
    "truncated shard": (truncate, "truncated or damaged"),
    "pickle": (only_pickle, r"only safetensors are read.*\n?.*Convert: python -c"),
    "unsupported architecture": (unsupported, "MambaForCausalLM has no row in the family table"),
    "shard elsewhere": (
        shard_elsewhere,
        r"index\.json puts lm_head\.weight in '\.\./theirs\.safetensors'; expected the n",
    ),
    "a tensor twice": (
        twice,
        r"is in model-00001-of-00002\.safetensors and again in model-00002-of-00002\.safetensors",
    ),
    "adapter": (adapter, "model is an adapter of PEFT's; merge it into its model first"),
    "unmerged adapter": (unmerged, r"no decoder layers, .*base_model\.model\.lm_head\.weight; it holds an adapter"),
    "no config": (lambda model: (model / "config.json").unlink(), r"has no config\.json"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_leaves_nothing_behind(case, parent):
    spoil, message = BAD_MODELS[case]
    spoil(parent / "model")
    before = content(parent)
    with pytest.raises(InputError, match=message):
        write(plan_surgery(parent / "model", MASK), parent / "new" / "out")
    assert content(parent) == before


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("model", {"overwrite": True}, "is, contains or lies inside the model"),
        ("model/out", {}, "is, contains or lies inside the model"),
        (".", {"overwrite": True}, "is, contains or lies inside the model"),
        ("old", {}, "old exists; .*--overwrite"),
        ("other", {"overwrite": True}, r"other is not a directory with a config\.json"),
        ("file", {"overwrite": True}, r"file is not a directory with a config\.json"),
        ("link", {"overwrite": True}, r"link is not a directory with a config\.json"),
        ("file/out", {}, "cannot be written: .*/file is not a directory"),
        ("linked", {"overwrite": True}, "which must not be overwritten while it is read"),
    ],
)
def test_a_bad_place_is_left_as_it_is(out, options, message, parent):
    write_checkpoint(parent / "old", SMALL)
    (parent / "other").mkdir()
    (parent / "other" / "precious").write_text("mine")
    (parent / "file").write_text("")
    (parent / "link").symlink_to(parent / "old")
    model = parent / "model"
    if out == "linked":  # the weights of the model are links into the place
        write(plan_surgery(parent / "model", MASK, keep_dropped=True), parent / "linked")
        write(plan_surgery(parent / "linked", config_only=True), parent / "links")
        model = parent / "links"
    before = content(parent)
    with pytest.raises(OutputError, match=message):
        write(plan_surgery(model, MASK), parent / out, **options)
    assert content(parent) == before


def test_too_little_disk_is_told_with_both_numbers(parent, monkeypatch):
    plan = plan_surgery(parent / "model", MASK)
    needed, before = plan.num_bytes + (1 << 20), content(parent)
    usage = shutil.disk_usage(parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(OutputError, match=f"needs {needed:,} bytes, and {needed - 1:,} are free"):
        write(plan, parent / "out")
    assert content(parent) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    write(plan, parent / "out")


def test_a_shard_that_is_cut_after_planning_leaves_nothing_behind(parent):
    plan = plan_surgery(parent / "model", MASK)
    truncate(parent / "model")
    before = content(parent)
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors ended early"):
        write(plan, parent / "out")
    assert content(parent) == before


def test_a_dialect_whose_entry_already_tells_widths_is_refused(parent):
    """The mask would take the place of Gemma 4's head sizes."""
    path = parent / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"per_layer_config": {"1": {"head_dim": 32}}}))
    with pytest.raises(
        MaskError, match="per_layer_config tells how wide layers are; say the mask in the dialect llm-d"
    ):
        plan_surgery(parent / "model", MASK, dialect="transformers")
