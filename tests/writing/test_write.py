"""A written checkpoint holds what was planned, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llmdrop_vllm import hf
from llmdrop_vllm.artifacts import read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.writing.plan import ON_DISK, plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.checkpoints.files import COMPANIONS, MASK, SMALL, add_companions, content, split, stored
from tests.engines import engine, greedy
from tests.tiny import TINY_LLAMA, write_checkpoint

MASKS = {
    "attention": DropMask(8, attention=(6, 5, 2)),
    "MLP": DropMask(8, mlp=(7, 0)),
    "block": DropMask(8, attention=(4, 3), mlp=(4, 3)),
    "joint": DropMask(8, attention=(6, 0, 2), mlp=(7, 5)),
}
# The rankings of the literature: (layers, attention in rank order, MLP in rank order).
PUBLISHED = {
    "Mistral-7B attention": DropMask(32, (25, 26, 24, 22, 27, 28, 23, 21)),
    "Mistral-7B MLP": DropMask(32, (), (26, 27, 25, 24, 23, 22, 29, 28)),
    "Llama-2-13B attention": DropMask(40, (33, 32, 35, 30, 34, 31, 29, 27)),
    "Llama-2-70B attention": DropMask(80, (22, 30, 32, 36, 43, *range(45, 80))),
}
TOKENS = torch.tensor([[1, 7, 42, 99, 3, 250]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """In three shards, with files beside them."""
    directory = write_checkpoint(tmp_path_factory.mktemp("parent") / "model", TINY_LLAMA)
    return add_companions(split(directory, (("model.layers.0.", "model.layers.5."), ("model.layers.",))))


def logits(loaded):
    with torch.no_grad():
        return loaded.eval()(TOKENS).logits


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_kept_tensor_is_bit_identical(mask, model, tmp_path):
    plan = plan_surgery(model, mask)
    write(plan, tmp_path / "out")
    gone = {tensor.name for tensor in plan.dropped}
    assert gone
    assert stored(tmp_path / "out") == {name: entry for name, entry in stored(model).items() if name not in gone}


def test_shards_keep_their_metadata_and_the_index_lists_them(model, tmp_path):
    plan = plan_surgery(model, MASK)
    write(plan, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    names = [f"model.dropped-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert {path.name: dict(found) for path, found in written.metadata.items()} == {
        name: {"format": "pt", "part": str(part)} for part, name in enumerate(names, start=1)
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.dropped.json").read_text())
    assert index["weight_map"] == {name: tensor.path.name for name, tensor in written.tensors.items()}
    assert index["metadata"] == {"total_size": sum(tensor.num_bytes for tensor in written.tensors.values())}


def test_the_new_checkpoint_holds_the_companions_and_nothing_else(model, tmp_path):
    before = content(model)
    write(plan_surgery(model, MASK), tmp_path / "out")
    assert content(model) == before
    files = {name: value for name, value in content(tmp_path / "out").items() if value is not None}
    weights = {name for name in files if name.startswith("model")} - set(COMPANIONS)
    assert set(files) == {*COMPANIONS, "config.json", *weights}
    assert {name: files[name].decode() for name in COMPANIONS} == COMPANIONS
    assert len(weights) == 4


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_stripped_and_portable_compute_what_the_masked_model_does(mask, tmp_path):
    write_checkpoint(tmp_path / "model", TINY_LLAMA | mask.to_config())
    expected = logits(hf.from_pretrained(tmp_path / "model"))
    full = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert (full - expected).abs().max() > 0.01
    write(plan_surgery(tmp_path / "model"), tmp_path / "stripped")
    assert torch.equal(logits(hf.from_pretrained(tmp_path / "stripped")), expected)
    write(plan_surgery(tmp_path / "model", portable=True), tmp_path / "portable")
    portable = AutoModelForCausalLM.from_pretrained(tmp_path / "portable")
    torch.testing.assert_close(logits(portable), expected, rtol=0, atol=1e-6)


def test_plain_transformers_refuses_stripped_weights(model, tmp_path):
    write(plan_surgery(model, MASK), tmp_path / "sharded")
    write(plan_surgery(tmp_path / "sharded", keep_dropped=True, dialect="transformers"), tmp_path / "again")
    write_checkpoint(tmp_path / "small", TINY_LLAMA)
    write(plan_surgery(tmp_path / "small", MASK), tmp_path / "single")
    for name in ("sharded", "again", "single"):
        with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
            LlamaForCausalLM.from_pretrained(tmp_path / name)


def test_vllm_serves_stripped_shards_as_transformers_computes_them(model, tmp_path):
    write(plan_surgery(model, MASK), tmp_path / "out")
    prompt = TOKENS[0].tolist()
    with engine(tmp_path / "out") as llm:
        served = greedy(llm, prompt, tokens=1)[2]
    expected = logits(hf.from_pretrained(tmp_path / "out"))[0].log_softmax(-1)
    assert served == pytest.approx([expected[i, token].item() for i, token in enumerate(prompt[1:])], abs=1e-5)


def test_only_output_projections_of_dropped_sublayers_become_zeros(model, tmp_path):
    write(plan_surgery(model, MASK, portable=True), tmp_path / "out")
    before, after = stored(model), stored(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    expected = {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in MASK.attention}
    assert changed == expected | {"model.layers.7.mlp.down_proj.weight"}
    assert not any(any(after[name][2]) for name in changed)
    assert all(after[name][:2] == before[name][:2] for name in before)


def test_config_only_links_to_the_weights(model, tmp_path):
    write(plan_surgery(model, MASK, config_only=True), tmp_path / "out")
    files = content(tmp_path / "out")
    linked = [*sorted(path.name for path in model.glob("model-*")), "model.safetensors.index.json"]
    assert {name: target for name, target in files.items() if isinstance(target, str)} == {
        name: str(model / name) for name in linked
    }
    assert set(COMPANIONS) < set(files)
    assert Checkpoint.open(tmp_path / "out").mask == MASK
    assert stored(tmp_path / "out") == stored(model)


def test_a_snapshot_in_the_hubs_cache_is_copied_as_files(model, tmp_path):
    """There every file is a link to a blob, which no new checkpoint may depend on."""
    snapshot = tmp_path / "snapshots" / "1"
    shutil.copytree(model, snapshot, copy_function=lambda source, there: Path(there).symlink_to(source))
    write(plan_surgery(snapshot, MASK), tmp_path / "out")
    write(plan_surgery(model, MASK), tmp_path / "expected")
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("strip", [False, True])
def test_converting_keeps_every_tensor(strip, tmp_path):
    write_checkpoint(tmp_path / "model", TINY_LLAMA | MASK.to_config(), strip=strip)
    write(plan_surgery(tmp_path / "model", keep_dropped=True, dialect="transformers"), tmp_path / "out")
    assert stored(tmp_path / "out") == stored(tmp_path / "model")
    assert Checkpoint.open(tmp_path / "out").mask == MASK
    assert DropMask.dialects(Checkpoint.open(tmp_path / "out").config) == ("transformers",)


@pytest.mark.parametrize("mask", PUBLISHED.values(), ids=PUBLISHED)
def test_published_rankings_go_through_every_dialect_and_back(mask, tmp_path):
    here = write_checkpoint(tmp_path / "model", SMALL | {"num_hidden_layers": mask.num_hidden_layers})
    write(plan_surgery(here, mask), tmp_path / "first")
    here = tmp_path / "first"
    for dialect in (*ON_DISK, "llm-drop"):
        there = tmp_path / f"{here.name} {dialect}"[-40:]
        write(plan_surgery(here, keep_dropped=True, dialect=dialect), there)
        written = Checkpoint.open(there)
        assert written.mask == mask
        assert DropMask.dialects(written.config) == (dialect.removesuffix("-booleans"),)
        here = there
    assert json.loads((here / "config.json").read_text()) == json.loads((tmp_path / "first/config.json").read_text())
    assert stored(here) == stored(tmp_path / "first")


def test_records_come_along_in_place_of_the_models(parent):
    (parent / "model" / "mask.json").write_text("an older one")
    record = MaskFile.of(MASK, "by hand")
    write(plan_surgery(parent / "model", MASK), parent / "out", records={"mask.json": record})
    assert read_record(MaskFile, parent / "out" / "mask.json") == record


def test_progress_adds_up_to_the_planned_bytes(model, tmp_path):
    for options in ({}, {"portable": True}):
        plan, steps = plan_surgery(model, MASK, **options), []
        write(plan, tmp_path / f"out{len(options)}", progress=steps.append)
        assert sum(steps) == plan.weight_bytes
