"""Contenders in turn: plan, predict, measure, one result line for each contender and workload."""

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.contenders import Contender, Process, Settings
from benchmarks.limit import Ceilings, Model, Prediction, predict
from benchmarks.lineup import NO_OP, OURS, Lineup, contenders
from benchmarks.measures import Comparison, Run, summary
from benchmarks.memory import free_bytes
from benchmarks.shapes import Shape
from benchmarks.workloads import Workload
from llmdrop_vllm import DropMask, InputError
from llmdrop_vllm.kv_cache.kinds import dtype_bytes

# vLLM's defaults.
BLOCK_TOKENS = {"cpu": 128, "cuda": 16}
Runs = dict[Contender, list[Run]]


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first slow step."""

    shape: Shape
    settings: Settings
    masks: dict[str, DropMask]
    repeats: int
    without: tuple[str, ...]
    processes: int = 1
    work: tuple[Workload, ...] = ()
    ceilings: Ceilings = Ceilings(1, 1)

    def kv_tokens(self, mask: DropMask) -> int:
        """Tokens that vLLM's KV cache holds, hybrid padding included."""
        return self.settings.kv_bytes // self.shape.layout(mask).token_bytes(dtype_bytes(self.settings.dtype))

    def check_fits(self, workload: Workload) -> None:
        """Raise InputError for requests longer than the full model's KV cache, or than the model can count."""
        room = min(self.kv_tokens(DropMask(self.shape.num_layers)), self.shape.config["max_position_embeddings"])
        if workload.tokens_per_sequence > room:
            raise InputError(
                f"a request of {workload.label} has {workload.tokens_per_sequence} tokens, and the full model holds "
                f"{room}: ask for fewer tokens or a larger --kv-gib"
            )

    def prediction(self, mask: DropMask, workload: Workload, *, limited: bool = True) -> Prediction:
        """The limit for a mask; `limited` to the KV cache that vLLM is given."""
        return predict(
            Model.of(self.shape, mask, self.settings.dtype),
            workload,
            self.ceilings,
            max_step_tokens=self.settings.max_step_tokens,
            kv_tokens=self.kv_tokens(mask) if limited else math.inf,
        )

    def line(self) -> list[Contender]:
        """Who takes part."""
        return [each for each in contenders(self.shape, self.masks) if each.variant not in self.without]

    def seconds(self) -> float:
        """At least so long will all runs take, warm-up included."""
        rounds = self.processes * (self.repeats + 1)
        return rounds * sum(self.prediction(each.mask, one).total_s for each in self.line() for one in self.work)

    def description(self) -> dict[str, Any]:
        """What a result says of it."""
        return {
            "shape": self.shape.name,
            "layers": self.shape.num_layers,
            "masks": {label: {"attention": mask.attention, "mlp": mask.mlp} for label, mask in self.masks.items()},
            "settings": asdict(self.settings),
            "repeats": self.repeats,
            "processes": self.processes,
        }


def with_room_for(requests: int, workload: Workload, shape: Shape, settings: Settings) -> Settings:
    """KV cache that holds so many requests of the full model at once."""
    block_tokens = BLOCK_TOKENS[settings.device]
    blocks = 1 + requests * -(-workload.tokens_per_sequence // block_tokens)  # one is vLLM's own
    block_bytes = block_tokens * shape.layout(DropMask(shape.num_layers)).token_bytes(dtype_bytes(settings.dtype))
    return replace(settings, kv_bytes=blocks * block_bytes)


def measure(plan: Plan, lineup: Lineup) -> Iterator[dict[str, Any]]:
    """A line for each contender and workload, as soon as it is there.

    Each sitting is held by so many `processes` of each in turn: the memory that one got makes it faster or slower for
    life.
    """
    line = plan.line()
    available = free_bytes(plan.settings.device)
    sittings = lineup.sittings(line, available)
    lineup.make_references(dict.fromkeys(each.mask for each in line), line, available)
    for sitting in sittings:
        runs: dict[Workload, Runs] = {workload: defaultdict(list) for workload in plan.work}
        for number in range(plan.processes):
            with lineup.seated(sitting) as processes:
                for workload in plan.work:
                    interleave(plan, workload, processes, runs[workload], seed=number * (plan.repeats + 1))
                    if number == plan.processes - 1:
                        yield from lines(plan, lineup, workload, processes, runs[workload])


def lines(
    plan: Plan, lineup: Lineup, workload: Workload, processes: Mapping[Contender, Process], runs: Runs
) -> Iterator[dict[str, Any]]:
    """One workload, by everyone who has run it."""
    baseline, *_ = processes
    for contender, process in processes.items():
        yield {
            "workload": asdict(workload),
            "label": workload.label,
            **contender.record(),
            **summary(runs[contender], workload),
            **speedups(plan, workload, contender, runs[baseline], runs[contender]),
            "kv_tokens": None if process.kv_tokens == math.inf else process.kv_tokens,
            "peak_bytes": process.peak_bytes,
            "load_s": process.load_s,
            "max_logprob_difference": lineup.differences.get(contender.name),
        }


def interleave(plan: Plan, workload: Workload, processes: Mapping[Contender, Process], runs: Runs, seed: int) -> None:
    """Rounds in which each has a turn, in random order: whoever had the turn before left the caches as they are.

    The first round warms up and does not count; the others are added to `runs`.
    """
    for turn in range(plan.repeats + 1):
        prompts = workload.prompts(plan.shape.config["vocab_size"], seed=seed + turn)
        for contender in random.Random(seed + turn).sample([*processes], len(processes)):
            reply = processes[contender].ask("run", prompts=prompts, tokens=workload.output_tokens)
            if turn:
                runs[contender].append(Run.of(reply, workload))


def speedups(
    plan: Plan, workload: Workload, contender: Contender, baseline: Sequence[Run], runs: Sequence[Run]
) -> dict[str, Any]:
    """Predicted and measured speedup over the baseline, and their ratio: of everything, of prefill and of decode."""
    limited = contender.engine == "vllm"
    limit = plan.prediction(contender.mask, workload, limited=limited)
    of_full = plan.prediction(DropMask(plan.shape.num_layers), workload)
    found: dict[str, Any] = {"limit_s": limit.total_s}
    for part in ("total", "prefill", "decode"):
        predicted = getattr(of_full, f"{part}_s") / getattr(limit, f"{part}_s")
        before, after = ([getattr(run, f"{part}_s") for run in each] for each in (baseline, runs))
        comparison = Comparison.of(before, after)
        found[part] = {
            "predicted_speedup": predicted,
            **comparison.record(),
            "ratio": comparison.speedup / predicted,
        }
    found["limit_share"] = limit.total_s / statistics.median(run.total_s for run in runs)
    return found


def against_rivals(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How much faster the plugin is than others with the same mask, round by round, where it is so the least."""
    ours = {(line["label"], line["contender"].partition(", ")[2]): line for line in found if line["variant"] == OURS}
    worst: dict[str, dict[str, Any]] = {}
    for line in found:
        mine = ours.get((line["label"], line["contender"].partition(", ")[2]))
        if mine is None or line["variant"] == OURS:
            continue
        key = line["variant"] if line["variant"] == NO_OP else f"{line['variant']}, batch {line['workload']['batch']}"
        compared = Comparison.of(line["total_s_of_runs"], mine["total_s_of_runs"]).record() | {"label": line["label"]}
        worst[key] = min(worst.get(key, compared), compared, key=lambda each: each["speedup"])
    return worst
