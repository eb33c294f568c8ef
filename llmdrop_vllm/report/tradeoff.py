"""What speed costs in quality."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

from llmdrop_vllm.evaluation.records import Point, Sweep
from llmdrop_vllm.report.measures import task_average

K = TypeVar("K", bound=Hashable)


def speedup_degradation(lost_points: float, speedup: float) -> float | None:
    """Lost average points (of 100) per percent of speedup (arXiv 2406.15786); None where nothing got faster."""
    return lost_points / (100 * (speedup - 1)) if speedup > 1 else None


def degradation_of(sweep: Sweep, point: Point) -> float | None:
    """The speedup-degradation ratio of a point over all tasks; None without tasks, speed, or a gain in speed."""
    full, found, speedup = task_average(sweep.full), task_average(point), sweep.speedup(point)
    if full is None or found is None or speedup is None:
        return None
    return speedup_degradation(full.value - found.value, speedup)


def pareto_front(points: Mapping[K, tuple[float, float]]) -> list[K]:
    """Those that no other one beats, slowest first, of (speedup, quality): more of both is better.

    To beat is to be at least as good in both and better in one; equals stay together.
    """

    def beaten(mine: tuple[float, float]) -> bool:
        return any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in points.values())

    return sorted((key for key, value in points.items() if not beaten(value)), key=lambda key: points[key])
