"""Who takes turns with whom, and what is said of contenders with the same mask."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from benchmarks.contenders import Settings
from benchmarks.lineup import NO_OP, OURS, STOCK
from benchmarks.shapes import find
from benchmarks.turns import Plan, against_rivals, measure
from benchmarks.workloads import Workload


def line(label, variant, *seconds):
    contender = f"{variant}, {'full' if variant == STOCK else 'attention 2'}"
    return {"label": label, "variant": variant, "contender": contender, "total_s_of_runs": seconds}


def test_rivals_are_compared_round_by_round_where_the_plugin_gains_the_least():
    found = against_rivals(
        [
            line("short", STOCK, 9, 9, 9),
            line("short", OURS, 1, 10, 2),
            line("short", NO_OP, 2, 20, 4),
            line("long", OURS, 1, 10, 1),
            line("long", NO_OP, 1, 11, 1.3),
        ]
    )
    assert found.keys() == {NO_OP}
    assert (found[NO_OP]["label"], found[NO_OP]["speedup"], found[NO_OP]["differs"]) == ("long", 1.1, False)


@pytest.mark.parametrize("processes", [1, 3])
def test_runs_of_all_processes_are_compared_pair_by_pair(processes):
    shape, work = find("smoke"), (Workload("short", 2, 4, 4), Workload("long", 2, 8, 4))
    settings = Settings("float32", "cpu", 1 << 25, max_step_tokens=64, compiled=False)
    plan = Plan(shape, settings, {"attention 2": shape.mask("attention", 2)}, 2, (NO_OP,), processes, work)
    asked = []

    @contextmanager
    def seated(sitting):
        born = len(asked)

        def process(each):
            def ask(what, *, prompts, tokens):
                asked.append((each.variant, prompts))
                last_s = (1 if each.variant == OURS else 2) + born
                times = {"first_s": [0.5, 0.5], "last_s": [last_s, last_s]}
                return times | {"kv_usage": 0, "running": 2, "preemptions": 0}

            return SimpleNamespace(ask=ask, kv_tokens=128, peak_bytes=1, load_s=born)

        yield {each: process(each) for each in sitting}

    lineup = SimpleNamespace(
        sittings=lambda line, available: [line[:2]], make_references=lambda *_: None, seated=seated, differences={}
    )
    found = [*measure(plan, lineup)]
    assert [(each["label"], each["variant"]) for each in found] == [
        (one.label, variant) for one in work for variant in (STOCK, OURS)
    ]
    assert len(asked) == processes * len(work) * 2 * (plan.repeats + 1)
    # Each process has prompts of its own, and the two contenders have the same.
    assert len({str(prompts) for _, prompts in asked}) == len(asked) / 2
    births = [number * len(asked) // processes for number in range(processes)]
    for line in found:
        expected = [(1 if line["variant"] == OURS else 2) + born for born in births for _ in range(plan.repeats)]
        assert line["total_s_of_runs"] == expected
        assert line["load_s"] == births[-1]
