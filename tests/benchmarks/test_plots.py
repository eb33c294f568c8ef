"""Which pictures a result has what it needs for."""

from benchmarks.plots import PICTURES


def pictures_of(*lines):
    """Names of the pictures that a throughput result of these lines is drawn in."""
    result = {"benchmark": "throughput", "lines": lines}
    return {name for name, _, _, suits in PICTURES if suits(result)}


def line(dropped=0, workload="paper", batch=1):
    return {
        "label": f"{workload}, {batch}",
        "attention_dropped": dropped,
        "workload": {"name": workload, "batch": batch},
    }


def test_a_speedup_curve_is_of_one_workload():
    assert pictures_of(line(0), line(2), line(4)) == {"speedup"}
    assert pictures_of(line(0), line(4)) == set()
    assert pictures_of(line(0), line(2), line(4), line(4, "chats")) == set()


def test_latency_is_drawn_of_the_papers_requests():
    assert pictures_of(line(), line(batch=8)) == {"latency"}
    assert pictures_of(line(workload="chats", batch=4), line(workload="prefill-heavy", batch=8)) == set()


def test_contexts_have_a_picture_and_other_benchmarks_their_own():
    assert pictures_of(line(workload="context", batch=4)) == {"context"}
    load = {"benchmark": "load", "lines": [{"rate_per_s": None}, {"rate_per_s": 2.0}]}
    assert [name for name, _, _, suits in PICTURES if suits(load)] == ["ttft"]
    assert [name for name, _, _, suits in PICTURES if suits({"speed": {}})] == []
