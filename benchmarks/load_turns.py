"""Servers under load in turn: rates, interleaved runs, one result line for each rate and contender."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.bench_serve import LATENCIES, MODEL_NAME, bench
from benchmarks.contenders import Contender
from benchmarks.lineup import OURS
from benchmarks.measures import Comparison
from benchmarks.servers import Served, leave_a_core, serving
from benchmarks.turns import Plan
from benchmarks.workloads import Workload
from llmdrop_vllm import DropMask, InputError

# Fewer have no tail to speak of.
MIN_REQUESTS = 8
Runs = dict[Contender, list[dict[str, Any]]]


@dataclass(frozen=True)
class Rate:
    """Requests per second, or the same as a share of what the full model serves at most; infinite: all at once."""

    value: float
    of_saturation: bool = False

    @classmethod
    def parse(cls, text: str) -> "Rate":
        """`4`, `80%` or `inf`. Raises InputError for anything else."""
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = math.nan
        if not value > 0:
            raise InputError(f"--rates {text!r}: expected requests per second, a share of saturation like 80%, or inf")
        return cls(value / 100, True) if text.endswith("%") else cls(value)

    def per_s(self, saturation_per_s: float) -> float:
        """Requests per second."""
        return self.value * saturation_per_s if self.of_saturation else self.value


@dataclass(frozen=True)
class Turns:
    """What is sent to whom: `workload` is one request, `seconds` how long requests keep coming in each run."""

    servers: Mapping[Contender, Served]
    model: Path
    workload: Workload
    seconds: float
    saturations_per_s: Mapping[Contender, float]

    @classmethod
    def calibrated(
        cls, servers: Mapping[Contender, Served], model: Path, workload: Workload, seconds: float, at_once: int
    ) -> "Turns":
        """Warm everyone up, and see how many requests per second each serves when `at_once` have come."""
        burst = replace(workload, batch=at_once)
        runs = {each: bench(server, model, burst, math.inf, seed=0, warmups=2) for each, server in servers.items()}
        return cls(servers, model, workload, seconds, {each: run["requests_per_s"] for each, run in runs.items()})

    @property
    def saturation_per_s(self) -> float:
        """The full model's."""
        return next(iter(self.saturations_per_s.values()))

    def requests(self, rate_per_s: float) -> int:
        """As many as come in `seconds`; as many as the full model serves in them where all come at once."""
        coming = rate_per_s if math.isfinite(rate_per_s) else self.saturation_per_s
        return max(MIN_REQUESTS, round(coming * self.seconds))

    def predicted_s(self, rates: Sequence[float], repeats: int) -> float:
        """How long all runs will take: until all requests have come, or until they are served."""
        each = (self.requests(rate) / min(rate, most) for rate in rates for most in self.saturations_per_s.values())
        return repeats * sum(each)

    def interleaved(self, rates: Sequence[float], repeats: int) -> dict[float, Runs]:
        """Rounds in which each has its turn at every rate, in an order that changes; the others have nothing to do."""
        runs: dict[float, Runs] = {rate: defaultdict(list) for rate in rates}
        order = [*self.servers]
        for turn in range(repeats):
            for place, rate in enumerate(rates):
                work = replace(self.workload, batch=self.requests(rate))
                # All contenders get the same requests; no server gets any of them twice, as it would know them.
                seed = 1 + turn * len(rates) + place
                for each in order if (turn + place) % 2 else order[::-1]:
                    run = bench(self.servers[each], self.model, work, rate, seed=seed)
                    runs[rate][each].append(run)
                    show(turn, rate, each, run)
        return runs

    def lines(self, runs: Mapping[float, Runs]) -> Iterator[dict[str, Any]]:
        """Rate by rate, the full model first."""
        for rate, of_rate in runs.items():
            finite = math.isfinite(rate)
            baseline, *_ = self.servers
            for each in self.servers:
                yield {
                    "workload": asdict(replace(self.workload, batch=self.requests(rate))),
                    "rate_per_s": rate if finite else None,
                    "rate_of_saturation": rate / self.saturation_per_s if finite else None,
                    **each.record(),
                    **summary(of_rate[each]),
                    "versus_full": comparisons(of_rate[baseline], of_rate[each]),
                    "runs": of_rate[each],
                }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over runs, and all failures."""
    latencies = {
        name: {part: statistics.median(run[name][part] for run in runs) for part in ("median", "p95")}
        for name in LATENCIES
    }
    others = ("requests_per_s", "output_tokens_per_s", "preemptions", "queue_s")
    medians = {name: statistics.median(run[name] for run in runs) for name in others}
    return latencies | medians | {"failures": sum(run["failures"] for run in runs)}


def comparisons(baseline: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many times shorter each latency is, and how many times more requests are served."""
    found = {
        f"{name} {part}": Comparison.of([run[name][part] for run in baseline], [run[name][part] for run in runs])
        for name in LATENCIES
        for part in ("median", "p95")
    }
    found["requests_per_s"] = Comparison.of(*([1 / run["requests_per_s"] for run in each] for each in (baseline, runs)))
    return {name: each.record() for name, each in found.items()}


def show(turn: int, rate_per_s: float, contender: Contender, run: Mapping[str, Any]) -> None:
    print(
        f"round {turn + 1}  {rate_per_s:8.2f} requests/s  {contender.name:24} {run['requests_per_s']:8.2f} served/s  "
        f"TTFT {1e3 * run['ttft_s']['median']:8.0f} ms, p95 {1e3 * run['ttft_s']['p95']:8.0f} ms",
        flush=True,
    )


@contextmanager
def serving_all(plan: Plan, model: Path, tokens_per_sequence: int) -> Iterator[dict[Contender, Served]]:
    """A server for each contender: `vllm serve` without plugins for the full model, `llmdrop serve` for masks."""
    settings = plan.settings
    options = ["--served-model-name", MODEL_NAME, "--dtype", settings.dtype]
    options += ["--kv-cache-memory-bytes", str(settings.kv_bytes), "--max-model-len", str(tokens_per_sequence)]
    options += ["--max-num-batched-tokens", str(settings.max_step_tokens), "--gpu-memory-utilization", "0.3"]
    options += [] if settings.compiled else ["--enforce-eager"]
    # VLLM_CPU_KVCACHE_SPACE would win over the size that we ask for, and knows whole GiB only.
    env: dict[str, str | None] = {"VLLM_CPU_KVCACHE_SPACE": None, "HF_HUB_OFFLINE": "1", **leave_a_core()}
    with ExitStack() as stack:
        found = {}
        for number, each in enumerate(plan.line()):
            directory = model.with_name(f"server-{number}")
            directory.mkdir()
            ours = each.variant == OURS
            found[each] = stack.enter_context(
                serving(
                    directory,
                    *options,
                    *drop_options(each.mask),
                    command=("llmdrop", "serve") if ours else ("vllm", "serve"),
                    model=[str(model)],
                    env=env if ours else env | {"VLLM_PLUGINS": ""},
                )
            )
        yield found


def drop_options(mask: DropMask) -> list[str]:
    """The mask on `llmdrop serve`'s command line; a layer alone needs its comma."""
    kinds = {"--drop-attention": mask.attention, "--drop-mlp": mask.mlp}
    return [text for name, kind in kinds.items() if kind for text in (name, "".join(f"{layer}," for layer in kind))]
