import math

import pytest

from llmdrop_vllm.evaluation.records import Estimate
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.report.measures import (
    AGREEMENT,
    GENERATION,
    KL,
    MULTIPLE_CHOICE,
    OTHER_TASKS,
    PERPLEXITY,
    degradation_of,
    number,
    speedup_degradation,
    task_average,
)
from tests.report.sweeps import TASKS, point, sweep

POINT = point(DropMask(12, (11,)))


def test_an_average_over_tasks_is_in_percent_with_the_error_of_independent_means():
    found = MULTIPLE_CHOICE.of(POINT)
    values = [task.value for task in POINT.quality.tasks[:2]]
    assert found.value == pytest.approx(100 * sum(values) / 2)
    assert found.stderr == pytest.approx(100 * math.sqrt(2 * 0.012**2) / 2)


def test_one_unknown_error_leaves_the_average_without():
    tasks = POINT.quality.tasks
    unknown = tasks[0].model_copy(update={"stderr": None})
    changed = POINT.model_copy(update={"quality": POINT.quality.model_copy(update={"tasks": (unknown, *tasks[1:])})})
    assert task_average(changed).stderr is None


def test_chance_is_the_mean_over_tasks_and_unknown_where_one_is():
    assert MULTIPLE_CHOICE.chance(POINT) == pytest.approx(37.5)
    assert GENERATION.chance(POINT) is None
    assert PERPLEXITY.chance(POINT) is None


def test_what_was_not_measured_is_none():
    bare = point(DropMask(12, (11,)), tasks=(), divergence=False)
    assert [m.of(bare) for m in (MULTIPLE_CHOICE, GENERATION, OTHER_TASKS, AGREEMENT, KL)] == [None] * 5
    assert OTHER_TASKS.of(point(DropMask(12), tasks=[("x", "m", "other", 0.5, None), *TASKS])).value == 50


@pytest.mark.parametrize(
    ("value", "text"), [(11.876, "11.88"), (1234.6, "1,235"), (12345678, "1.23e+07"), (-0.5, "-0.50")]
)
def test_numbers_for_people(value, text):
    assert number(value, 2) == text


def test_an_estimate_with_and_without_its_error():
    assert PERPLEXITY.text(Estimate(value=11.876, stderr=0.214)) == "11.88 ± 0.21"
    assert PERPLEXITY.text(Estimate(value=11.876)) == "11.88"
    assert PERPLEXITY.text(None) == "–"


def test_the_ratio_is_points_lost_per_percent_of_speedup():
    """Llama-2-13B of arXiv 2406.15786: 20 attention sublayers are 1.40 times as fast and cost 68.2 - 64.9 points."""
    assert speedup_degradation(68.2 - 64.9, 1.40) == pytest.approx(0.0825)
    assert speedup_degradation(-0.3, 1.05) == pytest.approx(-0.06)


@pytest.mark.parametrize("speedup", [1.0, 0.9])
def test_without_a_gain_in_speed_there_is_no_ratio(speedup):
    assert speedup_degradation(1.0, speedup) is None


def test_the_ratio_of_a_point_is_over_all_its_tasks():
    records = sweep(names=["attention"], counts=(4,))
    (found,) = (each for mask, each in records.points.items() if mask != "full")
    lost = 100 * (records.full.quality.task_average() - found.quality.task_average())
    assert degradation_of(records, found) == pytest.approx(lost / (100 * (records.speedup(found) - 1)))


def test_without_tasks_or_speed_a_point_has_no_ratio():
    mask = DropMask(12, (11,))
    assert degradation_of(sweep(tasks=()), point(mask, tasks=())) is None
    assert degradation_of(sweep(), point(mask, speed=False)) is None
