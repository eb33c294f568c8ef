"""What healing is said to take before it begins."""

import json
import subprocess

import pytest
import torch

from llmdrop_vllm import DropMask
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.healing.cost import closed_form_cost, training_cost
from llmdrop_vllm.healing.distill import TrainOptions
from llmdrop_vllm.healing.heal import DEFAULT, healed
from llmdrop_vllm.healing.run import HealOptions
from tests.healing.test_families import data
from tests.tiny import TINY_LLAMA, write_checkpoint
from tests.warm import PYTHON

MEASURE = """
import json, re, sys
from pathlib import Path
from llmdrop_vllm import DropMask
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.healing.cost import closed_form_cost, training_cost
from llmdrop_vllm.healing.distill import TrainOptions
from llmdrop_vllm.healing.heal import healed
from llmdrop_vllm.healing.run import HealOptions
from tests.healing.test_families import data

train = TrainOptions(**json.loads(sys.argv[3]), epochs=1) if sys.argv[3:] else None

def heal(path):
    said = []
    masked = [Checkpoint.open(path).under(DropMask(8, attention=gone)) for gone in ((2,), ())]
    options = {"train": train, "dtype": "float32", "announce": said.append}
    with healed(*masked, data(), HealOptions(closed_form=train is None), **options):
        return (training_cost(said[0], train) if train else closed_form_cost(said[0])).memory_bytes

def peak():
    status = Path("/proc/self/status").read_text()  # of this program alone: getrusage has its parent's as well
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) * 1024

heal(sys.argv[1])
before = peak()
print(json.dumps({"said": heal(sys.argv[2]), "took": peak() - before}))
"""


def said(options=DEFAULT, gone=(7, 8, 11)):
    found = []
    checkpoint, mask = Checkpoint.open(MODEL), DropMask(12, attention=gone)
    with healed(
        checkpoint.under(mask), checkpoint.under(DropMask(12)), data(), options, dtype="float32", announce=found.append
    ) as result:
        return found[0], result.record


def test_what_is_said_is_what_is_done():
    run, record = said()
    assert run.lost == 3
    mended = [each for each in record.layers if each.columns]
    cost = closed_form_cost(run)
    assert cost.columns == max(each.columns for each in mended)
    assert (cost.device, cost.dtype) == (torch.device("cpu"), torch.float32)
    assert cost.seconds > 0


def test_more_is_said_to_take_longer():
    both, less, more = (
        closed_form_cost(run) for run, _ in (said(), said(HealOptions(later="nothing")), said(gone=(3, 7, 8, 11)))
    )
    assert less.flops < both.flops < more.flops
    assert less.sum_flops < both.sum_flops < more.sum_flops


def test_memory_peaks_where_it_was_said(tmp_path):
    """In a process of its own, where a smaller run has loaded everything else that is needed."""
    small, large = (
        write_checkpoint(tmp_path / str(columns), TINY_LLAMA | {"intermediate_size": columns})
        for columns in (128, 4096)
    )
    found = measured(small, large)
    assert 0.5 * found["said"] < found["took"] < found["said"] + 64 * 2**20


@pytest.mark.parametrize("options", [{}, {"parts": "all", "step_tokens": 4096}, {"rank": 8}])
def test_training_peaks_where_it_was_said(options, tmp_path):
    small, large = (
        write_checkpoint(tmp_path / str(size), TINY_LLAMA | {"intermediate_size": size, "vocab_size": vocabulary})
        for size, vocabulary in ((128, 512), (8192, 20_000))
    )
    found = measured(small, large, options)
    assert 0.5 * found["said"] < found["took"] < found["said"] + 64 * 2**20


def measured(small, large, options=None):
    """Bytes that the large one is said to take, and takes beside what the small one did."""
    training = [] if options is None else [json.dumps(options)]
    command = [*PYTHON, "-c", MEASURE, str(small), str(large), *training]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_training_is_said_to_take_longer_for_more_and_less_memory_for_adapters(monkeypatch):
    # In float32 the adapters' outputs outweigh what a model as small as this one saves.
    monkeypatch.setattr("llmdrop_vllm.healing.cost.multiplies_in_bfloat16", lambda device: True)
    run, _ = said()
    ways = TrainOptions(epochs=1), TrainOptions(epochs=2), TrainOptions(rank=4)
    once, twice, adapters = (training_cost(run, options) for options in ways)
    assert once.flops < twice.flops < 2 * once.flops  # the teacher is asked once
    assert twice.memory_bytes == once.memory_bytes > adapters.memory_bytes
    model = run.streams.student.model
    tokens = sum(map(len, run.streams.batches.sequences))
    least = 2 * model.num_parameters() * tokens * 2  # forward only, the teacher too
    assert least < once.flops < 2 * least
    assert once.memory_bytes > model.num_parameters() * 4
    assert once.seconds > 0
