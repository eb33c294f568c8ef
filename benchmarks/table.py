"""A result as a markdown table for people."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.shapes import Shape

COLUMNS = (
    "workload",
    "contender",
    "prefill tokens/s",
    "decode tokens/s",
    "requests/s",
    "TTFT ms, median / p95",
    "TPOT ms, median / p95",
    "KV tokens, used",
    "preempted",
    "peak MiB",
    "load s",
    "speedup ± spread",
    "limit",
    "ratio",
)
# A ratio of measured to predicted speedup outside of these is to be explained.
EXPECTED_RATIO = (0.9, 1.1)


def markdown(shape: Shape, lines: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]) -> str:
    """One row for each contender and workload, and the reason for each contender that has none."""
    published = any("published_speedup" in line for line in lines)
    columns = (*COLUMNS, "published") if published else COLUMNS
    found = [cells(line, published=published) for line in lines]
    found += [("all", name, f"skipped: {reason}", *[""] * (len(columns) - 3)) for name, reason in skipped.items()]
    title = f"# {shape.name}, {shape.num_layers} layers, {shape.num_parameters / 1e6:,.0f} M parameters\n\n"
    return title + rows(columns, found)


def rows(columns: Sequence[str], found: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    table = [columns, ["---"] * len(columns), *found]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in table)


def cells(line: Mapping[str, Any], *, published: bool) -> tuple[str, ...]:
    """The row of one line."""
    kv = "as memory allows" if line["kv_tokens"] is None else f"{line['kv_tokens']:,}, {line['kv_usage']:.0%}"
    found = (
        line["label"],
        line["contender"],
        f"{line['prefill_tokens_per_s']:,.0f}",
        f"{line['decode_tokens_per_s']:,.0f}",
        f"{line['requests_per_s']:.2f}",
        *(f"{1e3 * line[key]['median']:.1f} / {1e3 * line[key]['p95']:.1f}" for key in ("ttft_s", "tpot_s")),
        kv,
        f"{line['preemptions']:g}",
        f"{line['peak_bytes'] / 2**20:,.0f}",
        f"{line['load_s']:.1f}",
        *against_limit(line["total"]),
    )
    speedup = line.get("published_speedup")
    return (*found, "" if speedup is None else f"{speedup:.2f}x") if published else found


def against_limit(part: Mapping[str, Any]) -> tuple[str, str, str]:
    """Speedup, limit, and the ratio of the two, marked where it is to be explained."""
    low, high = EXPECTED_RATIO
    ratio = f"{part['ratio']:.2f}" + ("" if low <= part["ratio"] <= high else " (!)")
    return verdict(part), f"{part['predicted_speedup']:.2f}x", ratio


def verdict(comparison: Mapping[str, Any]) -> str:
    """`1.25x ± 0.03`."""
    return f"{comparison['verdict']} ± {comparison['spread']:.2f}"
