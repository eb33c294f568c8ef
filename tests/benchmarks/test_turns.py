"""What is said of contenders with the same mask."""

from benchmarks.lineup import NO_OP, OURS, STOCK
from benchmarks.turns import against_rivals


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
