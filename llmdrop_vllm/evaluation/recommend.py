"""The mask that meets a constraint with the least loss, among the points of a sweep."""

from collections.abc import Iterator
from dataclasses import dataclass

from llmdrop_vllm.errors import DataError, MaskError
from llmdrop_vllm.evaluation.records import Point, Sweep, TaskKind

TOLERANCE = 1e-9  # of what is computed in floating point
TASK_KINDS: tuple[TaskKind, ...] = ("multiple choice", "generation")


@dataclass(frozen=True)
class Goal:
    """Shares: 0.01 is 1%. At least one is given; all that are must be met."""

    max_loss: float | None = None
    max_kv_share: float | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        if self.max_loss is None and self.max_kv_share is None and self.min_speedup is None:
            raise MaskError("nothing was asked for; expected --max-loss, --kv-budget or --speedup")
        if self.max_kv_share == 0:
            raise MaskError("--kv-budget is 0%; expected more: vLLM needs one attention sublayer, and its KV cache")

    def __str__(self) -> str:
        asked = {
            "a loss of at most {:.3g}%": self.max_loss and 100 * self.max_loss,
            "a KV cache of at most {:.3g}%": self.max_kv_share and 100 * self.max_kv_share,
            "a speedup of at least {:.3g}": self.min_speedup,
        }
        return " and ".join(text.format(value) for text, value in asked.items() if value is not None)


@dataclass(frozen=True)
class Choice:
    """A point with what it costs and gains. `losses` are relative to the full model, by measure; negative: better."""

    point: Point
    losses: dict[str, float]
    speedup: float | None

    @property
    def loss(self) -> float:
        """The worst of the task groups, so that generation cannot hide behind multiple choice; without tasks, how much
        perplexity rose.
        """
        tasks = [self.losses[kind] for kind in TASK_KINDS if kind in self.losses]
        return max(tasks) if tasks else self.losses["perplexity"]

    def shortfall(self, goal: Goal) -> float:
        """How far the point is from the goal, as the largest relative miss; 0 where it is met."""
        misses = [0.0]
        if goal.max_loss is not None:
            misses.append(max(0.0, self.loss) - goal.max_loss)
        if goal.max_kv_share is not None:
            misses.append(self.point.kv_share / goal.max_kv_share - 1)
        if goal.min_speedup is not None:
            misses.append(goal.min_speedup / (self.speedup or 1.0) - 1)
        return max(misses)


def choices(sweep: Sweep) -> list[Choice]:
    """Every point of a sweep, the full model too. Raises DataError where the full model was not measured."""
    return [Choice(point, dict(_losses(sweep.full, point)), sweep.speedup(point)) for point in sweep.points.values()]


def choose(sweep: Sweep, goal: Goal) -> tuple[Choice, bool]:
    """The best point, and whether it meets the goal; where none does, the one that misses by the least.

    With a limit on the loss alone, the best is the one that saves most: the fastest, or without speeds the one with the
    smallest KV cache. Otherwise it is the one that loses least.
    """
    if goal.min_speedup is not None and sweep.request.workload is None:
        raise DataError("the sweep measured no speed (--no-speed), so --speedup cannot be met from it")
    found = choices(sweep)
    meeting = [choice for choice in found if choice.shortfall(goal) < TOLERANCE]
    if not meeting:
        return min(found, key=lambda choice: (choice.shortfall(goal), choice.loss)), False
    if goal.max_kv_share is None and goal.min_speedup is None:
        return min(meeting, key=lambda choice: (-(choice.speedup or 0.0), choice.point.kv_share, choice.loss)), True
    return min(meeting, key=lambda choice: (choice.loss, choice.point.kv_share)), True


def _losses(full: Point, point: Point) -> Iterator[tuple[str, float]]:
    """By measure: how much of the full model's score is gone, or by how much its perplexity rose."""
    for kind in TASK_KINDS:
        before, after = (each.quality.task_average(kind) for each in (full, point))
        if before and after is not None:
            yield kind, 1 - after / before
    yield "perplexity", point.quality.perplexity.value / full.quality.perplexity.value - 1
    if point.quality.divergence is not None:
        yield "agreement", 1 - point.quality.divergence.agreement.value
