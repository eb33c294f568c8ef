"""From times to measures, and from runs to verdicts."""

import pytest

from benchmarks.measures import Comparison, Run, p95, quartiles, summary
from benchmarks.workloads import Workload

WORKLOAD = Workload("any", 2, 10, 5)
REPLY = {"first_s": [1.0, 2.0], "last_s": [5.0, 4.0], "kv_usage": 0.5, "running": 2, "preemptions": 1}


def test_prefill_ends_with_the_last_first_token():
    run = Run.of(REPLY, WORKLOAD)
    assert (run.prefill_s, run.decode_s, run.total_s) == (2, 3, 5)
    assert (run.ttft_s, run.tpot_s) == ((1, 2), (1, 0.5))


def test_rates_count_prompt_tokens_in_prefill_and_all_but_the_first_in_decode():
    found = summary([Run.of(REPLY, WORKLOAD)] * 3, WORKLOAD)
    assert found["prefill_tokens_per_s"] == 2 * 10 / 2
    assert found["decode_tokens_per_s"] == pytest.approx(2 * 4 / 3)
    assert found["requests_per_s"] == 2 / 5
    assert found["tpot_s"] == {"median": 0.75, "p95": 1}
    assert found["preemptions"] == 1


def test_pairs_are_compared_so_that_what_slows_both_does_not_count():
    comparison = Comparison.of([10, 20, 30, 40, 50], [5, 10, 15, 20, 25])
    assert (comparison.speedup, comparison.spread, comparison.verdict) == (2, 0, "2.00x")


def test_a_spread_wider_than_the_effect_is_no_difference():
    comparison = Comparison.of([1.0, 1.2, 0.9, 1.3, 1.1], [1.0] * 5)
    assert comparison.speedup == pytest.approx(1.1)
    assert comparison.spread == pytest.approx(0.2)
    assert comparison.verdict == "no difference"


def test_slower_is_a_difference_too():
    assert Comparison.of([1.0, 1.0, 1.01], [2.0, 2.0, 2.0]).verdict == "0.50x"


def test_p95_is_a_value_that_was_seen():
    assert p95([*range(1, 101)]) == 95
    assert p95([3, 1, 2]) == 3


def test_quartiles_lie_between_the_values_and_one_value_is_all_of_them():
    assert quartiles([4, 1, 3, 2, 5]) == (2, 3, 4)
    assert quartiles([7]) == (7, 7, 7)
