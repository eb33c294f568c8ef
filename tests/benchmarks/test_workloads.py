"""Workloads: scaled with floors, prompts that share what they should and nothing else."""

import pytest

from benchmarks.workloads import PAPER, WORKLOADS, Workload, as_many_as_fit, chosen
from llmdrop_vllm import InputError


def test_scaling_keeps_proportions_down_to_the_floors():
    assert PAPER.scaled(1 / 8) == Workload("paper", 1, 256, 256)
    tiny = Workload("chats", 4, 1024, 256, shared_prefix_tokens=768).scaled(1 / 1000)
    assert (tiny.prompt_tokens, tiny.output_tokens, tiny.shared_prefix_tokens) == (16, 8, 1)


@pytest.mark.parametrize("factor", [0, -1, 1.5])
def test_a_scale_outside_of_its_range_is_refused(factor):
    with pytest.raises(InputError, match="expected a number above 0 and not above 1"):
        PAPER.scaled(factor)


def test_prompts_share_their_prefix_within_a_round_only():
    workload = Workload("chats", 3, 12, 4, shared_prefix_tokens=8)
    first, second = workload.prompts(1000, seed=0), workload.prompts(1000, seed=1)
    assert [len(prompt) for prompt in first] == [12] * 3
    assert len({tuple(prompt[:8]) for prompt in first}) == 1
    assert len({tuple(prompt[8:]) for prompt in first}) == 3
    assert first[0][:8] != second[0][:8]
    assert first == workload.prompts(1000, seed=0)


def test_a_shared_prefix_is_prefilled_once():
    assert Workload("chats", 3, 12, 4, shared_prefix_tokens=8).prefill_tokens == 8 + 3 * 4


def test_as_many_as_fit():
    assert as_many_as_fit(1000, 1 / 32).batch == 1000 // 128


def test_names_choose_workloads():
    assert chosen(None) == WORKLOADS
    assert {each.name for each in chosen("paper,chats")} == {"paper", "chats"}
    with pytest.raises(InputError, match="unknown workload 'papers'; known: paper, prefill-heavy"):
        chosen("papers")
