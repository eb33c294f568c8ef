"""From the times of one run to what people compare, and from repeated runs to a verdict."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.workloads import Workload

NO_DIFFERENCE = "no difference"


@dataclass(frozen=True)
class Run:
    """One contender, one workload, once. Prefill ends with the last request's first token, decode with the last token.

    Where requests wait for KV cache the two overlap, and the split tells little; the total always holds.
    """

    prefill_s: float
    total_s: float
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    kv_usage: float
    running: int
    preemptions: int

    @classmethod
    def of(cls, reply: Mapping[str, Any], workload: Workload) -> "Run":
        """From an engine's reply."""
        first_s, last_s = reply["first_s"], reply["last_s"]
        steps = workload.output_tokens - 1
        return cls(
            prefill_s=max(first_s),
            total_s=max(last_s),
            ttft_s=tuple(first_s),
            tpot_s=tuple((last - first) / steps for first, last in zip(first_s, last_s, strict=True)),
            kv_usage=reply["kv_usage"],
            running=reply["running"],
            preemptions=reply["preemptions"],
        )

    @property
    def decode_s(self) -> float:
        """What comes after the prefill."""
        return self.total_s - self.prefill_s


@dataclass(frozen=True)
class Comparison:
    """How much faster than the baseline, from pairs of runs that came one after the other.

    `spread` is the distance of the quartiles of the pairs' ratios; as wide as the effect or wider, there is none.
    """

    speedup: float
    spread: float

    @classmethod
    def of(cls, baseline_s: Sequence[float], seconds: Sequence[float]) -> "Comparison":
        """From as many runs of each."""
        ratios = [before / after for before, after in zip(baseline_s, seconds, strict=True)]
        low, middle, high = quartiles(ratios)
        return cls(middle, high - low)

    @property
    def differs(self) -> bool:
        """Whether the effect is wider than the spread."""
        return abs(self.speedup - 1) > self.spread

    @property
    def verdict(self) -> str:
        """For tables: `1.25x`, or that there is nothing to tell."""
        return f"{self.speedup:.2f}x" if self.differs else NO_DIFFERENCE

    def record(self) -> dict[str, Any]:
        """For a result."""
        return asdict(self) | {"differs": self.differs, "verdict": self.verdict}


def summary(runs: Sequence[Run], workload: Workload) -> dict[str, Any]:
    """Medians over runs; percentiles over the requests of all runs."""
    total_s, prefill_s, decode_s = (
        statistics.median(getattr(run, name) for run in runs) for name in ("total_s", "prefill_s", "decode_s")
    )
    decoded = workload.batch * (workload.output_tokens - 1)
    ttft_s, tpot_s = ([value for run in runs for value in getattr(run, name)] for name in ("ttft_s", "tpot_s"))
    return {
        "total_s": total_s,
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "prefill_tokens_per_s": workload.batch * workload.prompt_tokens / prefill_s,
        "decode_tokens_per_s": decoded / decode_s,
        "output_tokens_per_s": workload.batch * workload.output_tokens / total_s,
        "requests_per_s": workload.batch / total_s,
        "ttft_s": {"median": statistics.median(ttft_s), "p95": p95(ttft_s)},
        "tpot_s": {"median": statistics.median(tpot_s), "p95": p95(tpot_s)},
        "kv_usage": max(run.kv_usage for run in runs),
        "running": max(run.running for run in runs),
        "preemptions": statistics.median(run.preemptions for run in runs),
        "total_s_of_runs": [run.total_s for run in runs],
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower one, the median and the upper one; a single value is all three."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return low, statistics.median(values), high


def p95(values: Sequence[float]) -> float:
    """The value that 95% do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, -(-95 * len(ranked) // 100) - 1)]
