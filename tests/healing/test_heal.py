"""Healing a tiny model: what is gained, what is kept, and that an interrupted run goes on."""

import json
import re
import subprocess
import time
from dataclasses import replace

import pytest
import torch

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.artifacts import HEAL_FILE
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.healing import heal as healing
from llmdrop_vllm.healing import run as running
from llmdrop_vllm.healing.distill import TrainOptions
from llmdrop_vllm.healing.heal import healed
from llmdrop_vllm.healing.run import HealOptions
from llmdrop_vllm.healing.task import units
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint
from tests.architectures.cases import CASES
from tests.healing.interruptions import interrupted_once
from tests.healing.test_families import data
from tests.warm import PYTHON

LLAMA = CASES["LlamaForCausalLM"]
FULL, MASK = DropMask(5), DropMask(5, attention=(2, 3))
OPTIONS = ("--data", "embedded", "--samples", "24", "--seq-len", "128")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint.open(LLAMA.write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    out = tmp_path_factory.mktemp("dropped") / "dropped"
    assert main(["apply", str(MODEL), str(out), "--attention", "7,8,11"]) == 0
    return out


def test_what_a_run_does_in_which_order():
    mask = DropMask(6, attention=(0, 2, 3, 4), mlp=(0, 3, 4, 5))
    found = [(unit.layer, unit.target, unit.lost, unit.mends) for unit in units(LLAMA.family, DropMask(6), mask)]
    assert found == [
        (1, 1, ("attention 0", "mlp 0"), "mlp"),
        (2, 4, ("attention 2", "attention 3", "mlp 3", "attention 4", "mlp 4"), "mlp"),
        (5, 5, ("mlp 5",), "attention"),
    ]


def test_an_interrupted_run_goes_on_and_ends_alike(checkpoint, tmp_path, monkeypatch):
    def tensors(found):
        return {name: each.path.read_bytes()[each.start : each.stop] for name, each in sorted(found.tensors.items())}

    with healed(checkpoint.under(MASK), checkpoint.under(FULL), data()) as found:
        expected = tensors(found), found.record.layers
    taught = interrupted_once(monkeypatch, running.Run, "_teach", at=3)
    arguments = (checkpoint.under(MASK), checkpoint.under(FULL), data())
    with pytest.raises(KeyboardInterrupt), healed(*arguments, scratch=tmp_path / "scratch"):
        pass
    with healed(*arguments, scratch=tmp_path / "scratch") as found:
        assert (tensors(found), found.record.layers) == expected
    assert taught == [0, 1, 2, 3, 3, 4]
    assert not (tmp_path / "scratch").exists()


def test_a_killed_command_goes_on_and_ends_alike(dropped, tmp_path):
    def command(out):
        return ["heal", str(dropped), str(out), "--teacher", str(MODEL), *OPTIONS]

    assert main(command(tmp_path / "whole")) == 0
    out, state = tmp_path / "out", tmp_path / ".out.llmdrop-healing" / "progress.json"
    run = "import sys; from llmdrop_vllm.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen([*PYTHON, "-c", run, *command(out)], stderr=subprocess.DEVNULL) as child:
        while not (state.exists() and len(json.loads(state.read_text())["layers"]) > 10):
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
    assert not out.exists()
    assert main(command(out)) == 0
    name = "model.dropped.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_training_lowers_the_divergence_of_a_healed_model(tmp_path):
    checkpoint = Checkpoint.open(MODEL)
    texts = load_calibration(checkpoint, samples=48, seq_len=96)
    mask = DropMask(12, attention=(7, 8, 11))
    options = TrainOptions(epochs=3, learning_rate=3e-4, step_tokens=768)
    with healed(checkpoint.under(mask), checkpoint.under(DropMask(12)), texts, train=options) as found:
        training = found.record.training
        assert training.kl_after < training.kl_before * 0.95
        assert set(training.tensors) <= found.tensors.keys()
        assert all(each.shape == checkpoint.tensors[name].shape for name, each in found.tensors.items())


def test_healing_again_says_so_and_that_text_mends_text(dropped, tmp_path, capsys):
    healed, text = tmp_path / "healed", ["--teacher", str(MODEL), "--samples", "4", "--seq-len", "64"]
    assert main(["heal", str(dropped), str(healed), *text]) == 0
    said = capsys.readouterr().err
    assert "text mends text; what mends answers is --data of llmdrop answers" in said
    assert "already" not in said
    assert main(["heal", str(healed), str(tmp_path / "again"), *text]) == 0
    assert f"{healed} is healed already: this goes on from there" in capsys.readouterr().err


def test_a_healed_checkpoint_is_an_ordinary_one_nearer_to_the_full_model(dropped, tmp_path, capsys):
    out = tmp_path / "healed"
    assert main(["heal", str(dropped), str(out), "--teacher", str(MODEL), *OPTIONS]) == 0
    said = capsys.readouterr()
    assert "3 layers healed" in said.out
    assert re.search(r"warning: [\d,]+ tokens for [\d,]+ columns are few, .*; [\d,]+ would do better", said.err)
    ids = torch.randint(5, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    full, before, after = (hf.from_pretrained(path, dtype=torch.float32).eval() for path in (MODEL, dropped, out))
    with torch.inference_mode():
        truth, lost, mended = (model(ids).logits.log_softmax(-1) for model in (full, before, after))
    assert (dropped / "config.json").read_bytes() == (out / "config.json").read_bytes()
    assert (truth.exp() * (truth - mended)).sum() < (truth.exp() * (truth - lost)).sum()
    record = json.loads((out / HEAL_FILE).read_text())
    assert {each["layer"] for each in record["layers"] if each["tensors"] and each["lost"]} == {7, 8, 11}
    # And healed again: its own record says which weights may differ.
    again = ["heal", str(out), str(tmp_path / "again"), "--teacher", str(MODEL), *OPTIONS]
    assert main(again) == 0


def test_healed_blocks_can_get_new_numbers(tmp_path):
    from transformers import AutoModelForCausalLM

    dropped, out = tmp_path / "dropped", tmp_path / "healed"
    assert main(["apply", str(MODEL), str(dropped), "--attention", "7,8", "--mlp", "7,8"]) == 0
    text = ("--samples", "8", "--seq-len", "64")
    assert main(["heal", str(dropped), str(out), "--teacher", str(MODEL), *text, "--dtype", "float32"]) == 0
    assert main(["convert", str(out), str(tmp_path / "renumbered"), "--renumber"]) == 0
    ids = torch.arange(5, 60)[None]
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "renumbered", dtype=torch.float32)
    unhealed, mended = (hf.from_pretrained(path, dtype=torch.float32) for path in (dropped, out))
    with torch.inference_mode():
        expected, found, before = (model.eval()(ids).logits for model in (mended, ordinary, unhealed))
    assert (found - expected).abs().max() < 1e-5
    assert (found - before).abs().max() > 1e-2


def test_dropping_can_heal_at_once(tmp_path):
    out = tmp_path / "out"
    text = ("--samples", "8", "--seq-len", "64")
    assert main(["drop", str(MODEL), str(out), "--attention", "3", *text, "--heal", "embedded"]) == 0
    assert (out / HEAL_FILE).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: (d, d), "lost nothing"),
        (lambda d, t: (t, t), "lost nothing"),
        (lambda d, t: (d, LLAMA.write(t)), "is not the full model of"),
    ],
)
def test_a_teacher_that_is_no_parent_is_refused(change, message, dropped, tmp_path, capsys):
    student, teacher = change(dropped, tmp_path / "other") if "full" in message else change(dropped, MODEL)
    command = ["heal", str(student), str(tmp_path / "out"), "--teacher", str(teacher), *OPTIONS]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_that_are_neither_equal_nor_healed_are_refused(dropped, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    assert main(["convert", str(dropped), str(other), "--dialect", "llm-drop"]) == 0
    path = other / "model.dropped.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"] += 1
    save_file(tensors, path, {"format": "pt"})
    assert main(["heal", str(other), str(tmp_path / "out"), "--teacher", str(MODEL), *OPTIONS]) == 1
    assert "layers.1.mlp.down_proj.weight has other values" in capsys.readouterr().err


def test_training_alone_goes_on_where_it_was(tmp_path, monkeypatch):
    full, mask = Checkpoint.open(MODEL), DropMask(12, attention=(7, 11))
    asked = (full.under(mask), full.under(full.mask), load_calibration(full, samples=16, seq_len=64))
    options = HealOptions(closed_form=False)
    train = TrainOptions(epochs=1, step_tokens=256)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(healing, "distill", interrupted)
    with pytest.raises(KeyboardInterrupt), healed(*asked, options, train=train, scratch=tmp_path / "scratch"):
        pytest.fail("came to its end")
    monkeypatch.undo()
    monkeypatch.setattr(healing, "load_mended", teacher_stays_away(healing.load_mended, full))
    with healed(*asked, options, train=train, scratch=tmp_path / "scratch") as found:
        assert found.record.training.tokens_seen > 0
    assert not (tmp_path / "scratch").exists()


def teacher_stays_away(load, full):
    def loaded(masked, tensors, **more):
        assert masked.mask != full.mask, "the teacher was asked again"
        return load(masked, tensors, **more)

    return loaded


def test_what_was_healed_before_can_be_trained_alone(tmp_path, monkeypatch):
    mask = DropMask(12, attention=(7, 11))
    full = Checkpoint.open(MODEL)
    student, teacher = full.under(mask), full.under(full.mask)
    ids = load_calibration(full, samples=24, seq_len=64)
    with healed(student, teacher, ids, dtype="float32") as found:
        plan = plan_surgery(full, mask).healed(found.tensors)
        write_checkpoint(plan, tmp_path / "healed", records={HEAL_FILE: found.record})
    before = Checkpoint.open(tmp_path / "healed")
    monkeypatch.setattr(running.Run, "layers", lambda *_, **__: pytest.fail("refitted again"))
    train = TrainOptions(epochs=2, learning_rate=3e-4, step_tokens=256)
    options = HealOptions(closed_form=False)
    with healed(before.under(mask), teacher, ids, options, train=train, dtype="float32") as again:
        assert again.record.layers == found.record.layers
        assert again.record.training.kl_after < again.record.training.kl_before
        assert set(again.record.training.tensors) == again.tensors.keys()
        assert (again.record.tokens, again.record.provenance.data) == (found.record.tokens, ids.identity)
        plan = plan_surgery(before, mask, keep_dropped=True).healed(again.tensors)
        write_checkpoint(plan, tmp_path / "trained", records={HEAL_FILE: again.record})
    # A training that gains nothing takes nothing from the record of what was changed before.
    trained = Checkpoint.open(tmp_path / "trained")
    worse = TrainOptions(epochs=1, learning_rate=1.0, step_tokens=256)
    with healed(trained.under(mask), teacher, ids, options, train=worse, dtype="float32") as last:
        assert not last.tensors
        assert last.record.training.tensors == again.record.training.tensors
        assert last.record.training.data == ids.identity


def test_windows_are_not_mended():
    checkpoint = Checkpoint.open(MODEL)
    student, windowed = DropMask(12, attention=(5,)), DropMask(12, windows=((1, 24), (5, 24)))
    masks = (checkpoint.under(each) for each in (replace(windowed, attention=(5,)), student))
    with pytest.raises(MaskError, match="give both the same windows, or neither"), healed(*masks, data()):
        pytest.fail("healed")
    with healed(checkpoint.under(replace(windowed, attention=(5,))), checkpoint.under(windowed), data()) as found:
        assert found.record.layers
