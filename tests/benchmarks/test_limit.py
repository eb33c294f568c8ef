"""The limit, against the literature's table and numbers computed by hand."""

import math

import pytest

from benchmarks.limit import Ceilings, Model, Step, Work, measure_ceilings, predict
from benchmarks.shapes import Shape, find
from benchmarks.workloads import Workload
from llmdrop_vllm import DropMask

# (shape, attention kept, parameters cut, batch 1 at 2k, batch 32 at 4k): bf16 decode, weights and KV cache read once.
BYTES_MOVED = (
    ("llama-2-13b", 20, "16.1%", "1.23", "1.77"),
    ("mistral-7b", 24, "4.6%", "1.05", "1.19"),
    ("llama-3-8b", 20, "6.3%", "1.08", "1.30"),
    ("llama-2-70b", 40, "8.8%", "1.10", "1.23"),
)
ONE = Ceilings(read_bytes_per_s=1.0, flops_per_s=1.0)


@pytest.mark.parametrize(("name", "kept", "cut", "short", "long"), BYTES_MOVED)
def test_the_bytes_moved_limit_of_decoding(name, kept, cut, short, long):
    shape = find(name)
    mask = shape.mask("attention", shape.num_layers - kept)
    full, dropped = (Model.of(shape, each, "bfloat16") for each in (DropMask(shape.num_layers), mask))
    assert f"{1 - dropped.num_parameters / full.num_parameters:.1%}" == cut
    for step, expected in ((Step(1, 1, 2048), short), (Step(32, 1, 4096), long)):
        assert f"{full.step_bytes(step) / dropped.step_bytes(step):.2f}" == expected


def small(mask=None, **config):
    """2 layers, hidden 4, 2 heads and 1 KV head of 2, FFN 8, vocabulary 16."""
    shape = find("smoke", num_layers=2)
    sizes = {"hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    entries = {**shape.config, **sizes, "head_dim": 2, "vocab_size": 16, **config}
    return Model.of(Shape("small", entries), mask or DropMask(2), "float32")


def test_parts_of_a_step_by_hand():
    """3 sequences, 5 new tokens each, which see 10. Attention: 4x4 + 2x4 + 2x4 + 4x4 and a norm of 4."""
    projections, attention, mlps, head = small().parts(Step(3, 5, 10))
    assert projections == Work(2 * (2 * 52) * 15, 2 * 52 * 4)
    assert attention == Work(4 * 4 * 10 * 15 * 2, (2 * 1 * 2 * 4) * 10 * 3 * 2)
    assert mlps == Work(2 * (2 * 100) * 15, 2 * 100 * 4)
    assert head == Work(2 * 64 * 3, 64 * 4)


def test_dropped_sublayers_cost_nothing():
    projections, attention, mlps, _ = small(DropMask(2, attention=(0,), mlp=(0, 1))).parts(Step(1, 1, 10))
    assert (projections.bytes_moved, attention.bytes_moved, mlps.bytes_moved) == (52 * 4, 160, 0)


def test_a_sliding_window_bounds_what_its_layers_see():
    kinds = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    _, sliding, full, *_ = small(**kinds).parts(Step(1, 1, 10))
    assert (sliding.bytes_moved, full.bytes_moved) == (16 * 4, 16 * 10)


def test_of_a_mixture_a_step_reads_the_experts_that_its_tokens_chose():
    model = Model.of(find("mixtral-8x7b", 1), DropMask(1), "bfloat16")
    *_, one, _ = model.parts(Step(1, 1, 1))
    *_, many, _ = model.parts(Step(1, 1000, 1))
    assert one.bytes_moved == pytest.approx(model.mlp_values * 2 / 4)
    assert many.bytes_moved == pytest.approx(model.mlp_values * 2)
    assert one.flops == pytest.approx(2 * model.mlp_values / 4)


def test_the_later_ceiling_counts():
    assert Work(6, 2).seconds(Ceilings(1, 2)) == 3
    assert Work(6, 8).seconds(Ceilings(1, 2)) == 8


def test_a_workload_in_waves():
    """6 requests of which 2 fit decode in 3 waves, but are prefilled once."""
    workload, memory_bound = Workload("any", 6, 10, 5), Ceilings(1.0, 1e12)
    at_once, waves, pair = (
        predict(small(), each, memory_bound, max_step_tokens=100, kv_tokens=kv_tokens)
        for each, kv_tokens in ((workload, math.inf), (workload, 30), (Workload("any", 2, 10, 5), math.inf))
    )
    assert waves.decode_s == pytest.approx(3 * pair.decode_s)
    assert waves.prefill_s == at_once.prefill_s
    assert at_once.total_s < waves.total_s


def test_decode_is_the_mean_over_its_contexts():
    steps = sum(small().step_seconds(Step(1, 1, 10 + i + 0.5), ONE) for i in range(4))
    assert predict(small(), Workload("any", 1, 10, 5), ONE, max_step_tokens=100).decode_s == pytest.approx(steps)


def test_a_prefill_of_many_steps_reads_the_weights_in_each():
    workload, bandwidth = Workload("any", 4, 50, 2), Ceilings(1.0, 1e12)
    one, four = (predict(small(), workload, bandwidth, max_step_tokens=each).prefill_s for each in (200, 50))
    projections, _, mlps, _ = (work.bytes_moved for work in small().parts(Step(1, 1, 1)))
    assert four - one == pytest.approx(3 * (projections + mlps + 64 * 4))


def test_ceilings_are_measured():
    found = measure_ceilings("float32", seconds=0.01)
    assert 1e8 < found.read_bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s < 1e16
