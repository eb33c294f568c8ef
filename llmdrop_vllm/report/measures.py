"""What can be plotted and tabulated of a point: its value with its standard error, in the units people read."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from llmdrop_vllm.evaluation.records import Estimate, Point, Sweep, TaskKind

DASH = "–"
Cell = Callable[[Point], str]


@dataclass(frozen=True)
class Measure:
    """`of` gives None where a point was not measured so; scores and agreement are in percent."""

    name: str
    axis: str
    of: Callable[[Point], Estimate | None]
    lower_is_better: bool = False
    decimals: int = 1
    kind: TaskKind | None = None

    def text(self, estimate: Estimate | None) -> str:
        """`11.88 ± 0.21` for people; a dash for nothing."""
        if estimate is None:
            return DASH
        stderr = "" if estimate.stderr is None else f" ± {number(estimate.stderr, self.decimals)}"
        return number(estimate.value, self.decimals) + stderr

    def chance(self, point: Point) -> float | None:
        """What guessing would get; None where it is not known of every task."""
        found = [task.chance for task in point.quality.tasks_of(self.kind)] if self.kind else []
        known = [each for each in found if each is not None]
        return 100 * fmean(known) if known and len(known) == len(found) else None


def number(value: float, decimals: int) -> str:
    """With a comma for thousands, and no decimals where they say nothing."""
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.{0 if abs(value) >= 1000 else decimals}f}"


def percent(value: float, stderr: float | None) -> Estimate:
    """Of a share and its standard error."""
    return Estimate(value=100 * value, stderr=None if stderr is None else 100 * stderr)


def task_average(point: Point, kind: TaskKind | None = None) -> Estimate | None:
    """In percent. Tasks are independent, so the error of k of them is the root of their squares' sum over k."""
    value = point.quality.task_average(kind)
    if value is None:
        return None
    errors = [task.stderr for task in point.quality.tasks_of(kind)]
    known = [each for each in errors if each is not None]
    return percent(value, math.hypot(*known) / len(known) if len(known) == len(errors) else None)


def speedup_degradation(lost_points: float, speedup: float) -> float | None:
    """Lost average points (of 100) per percent of speedup (arXiv 2406.15786); None where nothing got faster."""
    return lost_points / (100 * (speedup - 1)) if speedup > 1 else None


def degradation_of(sweep: Sweep, point: Point) -> float | None:
    """The speedup-degradation ratio of a point over all tasks; None without tasks, speed, or a gain in speed."""
    full, found, speedup = task_average(sweep.full), task_average(point), sweep.speedup(point)
    if full is None or found is None or speedup is None:
        return None
    return speedup_degradation(full.value - found.value, speedup)


def speedup_text(sweep: Sweep, point: Point) -> str:
    """`1.12 (1.10 to 1.13)`: the range is over rounds; empty where it was not measured."""
    speedup, spread = sweep.speedup(point), sweep.speedup_spread(point)
    return f"{speedup:.2f} ({spread[0]:.2f} to {spread[1]:.2f})" if speedup and spread else ""


def columns(sweep: Sweep) -> dict[str, Cell]:
    """Of the table of all points, those of which anything was measured: title to what a cell says of a point."""

    def speedup(point: Point) -> str:
        return "1" if point is sweep.full else speedup_text(sweep, point) or DASH

    def degradation(point: Point) -> str:
        found = degradation_of(sweep, point)
        return DASH if found is None or point is sweep.full else f"{found:.2f}"

    points = [*sweep.points.values()]
    kinds = [measure for measure in TASK_MEASURES if any(measure.of(point) for point in points)]
    averages = [*kinds, *([ALL_TASKS] if len(kinds) > 1 else [])]
    tasks = dict.fromkeys((task.task, task.metric) for point in points for task in point.quality.tasks)
    found = {"perplexity": _cell(PERPLEXITY)}
    found |= {f"{each.name}, %": _cell(each) for each in (*averages, *(_of_task(*task) for task in tasks))}
    if any(AGREEMENT.of(point) for point in points):
        found |= {"agreement, %": _cell(AGREEMENT), "KL, nats": _cell(KL)}
    if any(sweep.speedup(point) for point in points):
        found["speedup (range)"] = speedup
    found["KV cache, %"] = lambda point: f"{100 * point.kv_share:.1f}"
    found["parameters"] = lambda point: f"{point.parameters:,}"
    if any(degradation_of(sweep, point) is not None for point in points):
        found["points lost per % of speedup"] = degradation
    return found


def _cell(measure: Measure) -> Cell:
    return lambda point: measure.text(measure.of(point))


def _perplexity(point: Point) -> Estimate:
    return point.quality.perplexity


def _agreement(point: Point) -> Estimate | None:
    found = point.quality.divergence
    return None if found is None else percent(found.agreement.value, found.agreement.stderr)


def _kl(point: Point) -> Estimate | None:
    return None if point.quality.divergence is None else point.quality.divergence.kl


def _of_task(name: str, metric: str) -> Measure:
    def score(point: Point) -> Estimate | None:
        tasks = (each for each in point.quality.tasks if (each.task, each.metric) == (name, metric))
        found = next(tasks, None)
        return None if found is None else percent(found.value, found.stderr)

    return Measure(f"{name} {metric}", f"{name} {metric}, %", score)


def _of_kind(kind: TaskKind, name: str) -> Measure:
    return Measure(name, f"{name}, mean score, %", lambda point: task_average(point, kind), kind=kind)


PERPLEXITY = Measure("perplexity", "perplexity (lower is better)", _perplexity, lower_is_better=True, decimals=2)
MULTIPLE_CHOICE = _of_kind("multiple choice", "multiple choice")
GENERATION = _of_kind("generation", "generation")
OTHER_TASKS = _of_kind("other", "other tasks")
ALL_TASKS = Measure("all tasks", "mean score of all tasks, %", task_average)
AGREEMENT = Measure("agreement", "same next token as in full, %", _agreement)
KL = Measure("KL divergence", "KL(full || dropped), nats/token", _kl, lower_is_better=True, decimals=3)
TASK_MEASURES = (MULTIPLE_CHOICE, GENERATION, OTHER_TASKS)
