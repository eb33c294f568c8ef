"""How a soak is judged."""

from collections import Counter

from benchmarks.server_soak import MAX_GROWTH_BYTES, MIN_COMPLETE, Tally, failures


def judged(rss_bytes, *, complete=MIN_COMPLETE, leaked=0, log="", healthy=True):
    tally = Tally(answers=Counter(complete=complete), rss_bytes=rss_bytes)
    return failures(tally, leaked, log, healthy=healthy)


def test_where_all_went_well_nothing_failed():
    assert judged([100] * 12) == []


def test_what_was_seen_too_little_of_is_not_judged_well():
    assert judged([]) == [
        f"{MIN_COMPLETE} complete answers and 0 looks at the memory; at least {MIN_COMPLETE} and 12 are needed to judge"
    ]
    assert len(judged([100] * 12, complete=MIN_COMPLETE - 1)) == 1


def test_memory_may_grow_in_the_first_quarter_only():
    more = 100 + MAX_GROWTH_BYTES + 1
    assert judged([100] * 3 + [more] * 9) == []
    assert judged([100] * 6 + [more] * 6) == [f"memory grew by {MAX_GROWTH_BYTES + 1:,} bytes"]


def test_leaks_tracebacks_and_a_dead_server_are_failures():
    assert judged([100] * 12, leaked=2, log="Traceback (most recent", healthy=False) == [
        "2 blocks are still in use",
        "the server is not healthy",
        "the log has a traceback",
    ]
