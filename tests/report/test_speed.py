import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.measures import PERPLEXITY
from llmdrop_vllm.report.speed import kv_cache, pareto_front, speedup
from llmdrop_vllm.report.style import NothingToShow
from tests.report.sweeps import healed, sweep


def test_every_measured_mask_is_a_marker_and_the_front_is_a_line():
    records = sweep(names=["attention", "mlp", "random 0"], tasks=())
    (axes,) = speedup(Findings(records, []))[0].axes
    lines = [*axes.get_lines(), *(container.lines[0] for container in axes.containers)]
    markers = {tuple(map(float, line.get_xydata()[0])) for line in lines if len(line.get_xydata()) == 1}
    expected = {
        mask: (1.0 if mask == "full" else records.speedup(point), PERPLEXITY.of(point).value)
        for mask, point in records.points.items()
    }
    assert markers == {*expected.values()}
    front = pareto_front({mask: (x, -y) for mask, (x, y) in expected.items()})
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    line = handles["Pareto front: nothing beats these"].get_xydata()
    assert [tuple(map(float, each)) for each in line] == [expected[mask] for mask in front]


def test_the_ends_of_the_front_are_labelled_and_few_between_them():
    records = sweep(names=["attention"], tasks=())
    (axes,) = speedup(Findings(records, []))[0].axes
    texts = [text.get_text() for text in axes.texts]
    assert {"full model", "attention 10"} <= {*texts}
    assert len(texts) < 8


@pytest.mark.parametrize("changes", [{"speed": False}, {"workload": None}, {"keep": 0}])
def test_without_speed_there_is_no_such_picture(changes):
    with pytest.raises(NothingToShow, match="speed was not measured"):
        speedup(Findings(sweep(**changes), []))


def test_series_of_the_same_kv_cache_are_one_line_that_names_them():
    records = sweep(names=["attention", "mlp", "last"], keep=1.0)
    (axes,) = kv_cache(Findings(records, []))[0].axes
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    assert {*handles} == {"attention, last", "mlp"}
    assert [*handles["attention, last"].get_ydata()] == [pytest.approx(100 * (1 - n / 12)) for n in range(11)]
    assert {*handles["mlp"].get_ydata()} == {100.0}


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


def test_a_healed_point_is_as_fast_as_its_mask_and_pushes_the_front():
    records = sweep(names=["attention"], tasks=())
    evaluation = healed(records, 10)
    (axes,) = speedup(Findings(records, [], [evaluation]))[0].axes
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    (spot,) = handles["attention, healed"].lines[0].get_xydata().tolist()
    assert spot == [records.speedup(records.points[records.series[0].steps[10]]), evaluation.quality.perplexity.value]
    assert spot in handles["Pareto front: nothing beats these"].get_xydata().tolist()
    assert "attention, healed 10" in [text.get_text() for text in axes.texts]
