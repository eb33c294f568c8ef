"""KV capacity as predicted: whole blocks, and for hybrid models whole groups and the sliding window's extra block."""

import pytest

from benchmarks.kv_capacity import CASES, predict
from benchmarks.shapes import find
from llmdrop_vllm import DropMask

GIB = 2**30
# What vLLM 0.32.0 plans for 1 GiB in blocks of 128 tokens, sequences of 1024.
PLANNED = {
    ("mistral-7b", "full"): (8192, 8),
    ("mistral-7b", "attention 8"): (10880, 10),
    ("llama-2-70b", "full"): (3200, 3),
    ("gemma-2-9b", "full"): (2891, 2),
    ("gemma-2-9b", "attention 8"): (3614, 3),
    ("gemma-2-9b", "8 sliding"): (3194, 3),
}


@pytest.mark.parametrize(("name", "label"), PLANNED)
def test_tokens_and_sequences_are_those_that_vllm_plans(name, label):
    masks = {(shape.name, case): mask for shape, case, mask in CASES}
    shape = find(name)
    assert predict(shape, masks.get((name, label), DropMask(shape.num_layers)), GIB, 128) == PLANNED[name, label]


def test_without_padding_the_gain_is_layers_over_remaining_layers():
    for shape, label, mask in CASES:
        if shape.name != "gemma-2-9b":
            full, dropped = (predict(shape, each, 64 * GIB, 16)[0] for each in (DropMask(shape.num_layers), mask))
            expected = shape.num_layers / len(mask.kept_attention)
            assert dropped / full == pytest.approx(expected, rel=1e-3), label
