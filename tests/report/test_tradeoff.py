import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdrop_vllm.mask import DropMask
from llmdrop_vllm.report.tradeoff import degradation_of, pareto_front, speedup_degradation
from tests.report.sweeps import point, sweep


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


def test_the_front_is_what_no_other_point_beats():
    points = {
        "full": (1.0, 70.0),
        "good": (1.2, 69.0),
        "worse": (1.1, 68.0),
        "slower": (1.15, 69.0),
        "fast": (1.5, 40.0),
    }
    assert pareto_front(points) == ["full", "good", "fast"]


def test_equal_points_are_both_on_the_front():
    assert sorted(pareto_front({"a": (1.0, 2.0), "b": (1.0, 2.0)})) == ["a", "b"]


@given(st.dictionaries(st.integers(), st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_along_the_front_quality_falls_as_speed_grows(points):
    values = [points[key] for key in pareto_front(points)]
    assert sorted(values) == values
    assert [quality for _, quality in values] == sorted((quality for _, quality in values), reverse=True)
    assert bool(values) == bool(points)
