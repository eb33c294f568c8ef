"""Training after the closed form: stopped early, killed, logged, with adapters that are merged."""

import subprocess
import time
from dataclasses import replace

import pytest
import torch

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.artifacts import HEAL_FILE, read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.healing import distill
from llmdrop_vllm.healing import heal as healing
from llmdrop_vllm.healing.distill import TrainOptions
from llmdrop_vllm.healing.heal import healed
from llmdrop_vllm.healing.records import Healing
from llmdrop_vllm.healing.run import HealOptions
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint
from tests.warm import PYTHON

MASK = DropMask(12, attention=(7, 8, 11))
OPTIONS = TrainOptions(epochs=2, learning_rate=3e-4, step_tokens=512)
ALONE = HealOptions(closed_form=False)


@pytest.fixture(scope="module")
def full():
    return Checkpoint.open(MODEL)


@pytest.fixture(scope="module")
def asked(full):
    """What is healed, of which model, and on what."""
    return full.under(MASK), full.under(full.mask), load_calibration(full, samples=32, seq_len=64)


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    out = tmp_path_factory.mktemp("dropped") / "dropped"
    assert main(["apply", str(MODEL), str(out), "--attention", "7,8,11"]) == 0
    return out


def divergence_of(path):
    """The mean KL of a checkpoint's next tokens to the full model's, on tokens that nothing was learnt from."""
    ids = torch.randint(5, 500, (8, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        truth, found = (
            hf.from_pretrained(each, dtype=torch.float32).eval()(ids).logits.log_softmax(-1) for each in (MODEL, path)
        )
    return (truth.exp() * (truth - found)).sum(-1).mean().item()


def test_adapters_are_merged_into_what_is_written(full, asked, dropped, tmp_path):
    train = replace(OPTIONS, epochs=3, learning_rate=2e-3, rank=8, parts="all")
    with healed(*asked, ALONE, train=train, dtype="float32") as found:
        training = found.record.training
        assert training.method == "LoRA of rank 8, all of the layers from the first drop on"
        assert training.kl_after < 0.97 * training.kl_before
        plan = plan_surgery(full, MASK).healed(found.tensors)
        write_checkpoint(plan, tmp_path / "out", records={HEAL_FILE: found.record})
    assert {*Checkpoint.open(tmp_path / "out").tensors} == {*Checkpoint.open(dropped).tensors}
    assert divergence_of(tmp_path / "out") < divergence_of(dropped)


def test_it_ends_where_held_out_answers_get_no_better(asked):
    train = replace(OPTIONS, epochs=20, learning_rate=0.1, patience=2)
    with healed(*asked, ALONE, train=train, dtype="float32") as found:
        training = found.record.training
        assert training.epochs == 1  # of two checks, neither of which was better than nothing
        assert training.kl_after > training.kl_before
        assert not found.tensors  # and the weights are those that it began with


def test_a_log_is_for_tensorboard(asked, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with healed(*asked, ALONE, train=OPTIONS, log_directory=tmp_path / "log", dtype="float32") as found:
        pass
    log = EventAccumulator(str(tmp_path / "log"))
    log.Reload()
    training = found.record.training
    *checks, last = [row["eval_loss"] for row in training.history if "eval_loss" in row]
    assert last == training.kl_after
    logged = [each.value for each in log.Scalars("eval/loss")]
    assert logged == pytest.approx([training.kl_before, *checks])


def test_a_log_without_training_is_refused(dropped, tmp_path, capsys):
    command = ["heal", str(dropped), str(tmp_path / "out"), "--teacher", str(MODEL), "--log-dir", str(tmp_path / "log")]
    assert main([*command, "--samples", "8", "--seq-len", "64"]) == 1
    assert "--log-dir is for --train" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_training_on_another_gpu_than_the_first_is_refused(asked, monkeypatch):
    monkeypatch.setattr(healing, "precision", lambda *_: (torch.device("cuda:1"), torch.float32))
    with pytest.raises(InputError, match="device is cuda:1; CUDA_VISIBLE_DEVICES"), healed(*asked, train=OPTIONS):
        pytest.fail("healed")


def test_a_killed_training_goes_on_from_where_it_saved(dropped, tmp_path, monkeypatch):
    def command(out):
        text = ["--data", "embedded", "--samples", "32", "--seq-len", "64", "--dtype", "float32"]
        return ["heal", str(dropped), str(out), "--teacher", str(MODEL), *text, "--train-only", "--epochs", "6"]

    def saved():
        return [*tmp_path.glob(".out.llmdrop-healing/training-*/checkpoint-*/trainer_state.json")]

    run = "import sys; from llmdrop_vllm.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen([*PYTHON, "-c", run, *command(tmp_path / "out")], stderr=subprocess.DEVNULL) as child:
        while len(saved()) < 2:
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
    assert not (tmp_path / "out").exists()
    begun = []
    train = distill.Trainer.train

    def resumed(self, resume_from_checkpoint):
        begun.append(resume_from_checkpoint)
        return train(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(distill.Trainer, "train", resumed)
    assert main(command(tmp_path / "out")) == 0
    assert main(command(tmp_path / "whole")) == 0
    assert "checkpoint-" in begun[0]
    assert begun[1] is None
    parts, whole = (read_record(Healing, tmp_path / out / HEAL_FILE).training for out in ("out", "whole"))
    assert [row["step"] for row in parts.history] == [row["step"] for row in whole.history]
    assert parts.kl_after == pytest.approx(whole.kl_after, rel=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
