import pytest

from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.measures import PERPLEXITY
from llmdrop_vllm.report.quality import controls, divergence, quality
from llmdrop_vllm.report.style import NothingToShow
from tests.report.sweeps import TASKS, healed, sweep


def drawn(axes):
    """Label to (xs, ys) of what stands in the legend."""
    return {
        label: tuple(map(list, getattr(handle, "lines", [handle])[0].get_data()))
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }


def test_the_curves_are_the_records():
    findings = Findings(sweep(names=["attention", "mlp", "last"]), [])
    perplexity = drawn(quality(findings)[0].axes[0])
    for curve in findings.by_importance:
        xs, ys = perplexity[curve.series.name]
        assert xs == [n for n, _ in curve.points]
        assert ys == [PERPLEXITY.of(point).value for _, point in curve.points]
    assert "last" not in perplexity
    assert set(perplexity["full model"][1]) == {findings.sweep.full.quality.perplexity.value}


def test_there_is_a_panel_for_each_kind_of_task_with_the_chance_level_where_it_is_known():
    axes = quality(Findings(sweep(), []))[0].axes
    assert [each.get_title() for each in axes] == ["perplexity", "multiple choice", "generation"]
    assert drawn(axes[1])["guessing"][1] == pytest.approx([37.5, 37.5])
    assert "guessing" not in drawn(axes[2])
    assert len(quality(Findings(sweep(tasks=()), []))[0].axes) == 1


def test_the_next_token_is_compared_from_the_first_drop_on():
    axes = divergence(Findings(sweep(names=["attention"]), []))[0].axes
    assert [each.get_title() for each in axes] == ["agreement", "KL divergence"]
    assert drawn(axes[0])["attention"][0] == [*range(1, 11)]


def test_without_divergence_there_is_nothing_to_compare():
    with pytest.raises(NothingToShow, match="not compared"):
        divergence(Findings(sweep(divergence=False), []))


def test_controls_show_every_order_and_the_range_of_the_random_ones():
    findings = Findings(sweep(tasks=()), [])
    attention, blocks = controls(findings)[0].axes
    found = drawn(attention)
    assert {*found} == {
        "attention",
        "last",
        "last keeping the last layer",
        "reverse",
        "random: mean and range of 3",
        "full model",
    }
    seeds = [dict(curve.points) for curve in findings.curves if curve.random]
    values = [[PERPLEXITY.of(seed[n]).value for seed in seeds] for n in range(11)]
    assert found["random: mean and range of 3"][1] == pytest.approx([sum(row) / 3 for row in values])
    (band,) = attention.collections[-1:] if len(attention.collections) == 1 else [_band(attention)]
    corners = band.get_paths()[0].vertices
    assert {round(y, 6) for _, y in corners} >= {round(v, 6) for row in values for v in (min(row), max(row))}
    assert {*drawn(blocks)} == {"blocks", "consecutive", "full model"}


def _band(axes):
    from matplotlib.collections import PolyCollection

    (band,) = (each for each in axes.collections if isinstance(each, PolyCollection))
    return band


def test_tasks_are_a_control_too():
    assert len(controls(Findings(sweep(tasks=TASKS), []))[0].axes) == 4


def test_one_order_alone_controls_nothing():
    with pytest.raises(NothingToShow, match="only one order"):
        controls(Findings(sweep(names=["attention", "mlp"]), []))


def test_healed_points_are_a_curve_beside_the_one_they_come_from():
    found = sweep(names=["attention"])
    findings = Findings(found, [], [healed(found, 4), healed(found, 8)])
    perplexity, kl = (drawn(picture(findings)[0].axes[place]) for picture, place in ((quality, 0), (divergence, 1)))
    assert perplexity["attention, healed"][0] == [4, 8]
    assert kl["attention, healed"][0] == [4, 8]
    assert kl["attention, healed"][1][1] < kl["attention"][1][7]
