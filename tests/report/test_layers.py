import math

import pytest

from llmdrop_vllm.artifacts import Similarities
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.layers import drop_order, importance, redundancy
from llmdrop_vllm.report.style import LOOK_OF, NothingToShow
from tests.report.sweeps import scores, sweep


def test_importance_is_one_minus_similarity_for_every_calibration_set():
    one, other = scores(), scores("c4", tilt=0.8)
    axes = importance(Findings(sweep(), [one, other]))[0].axes
    for each, kind in zip(axes, ("attention", "mlp", "block"), strict=True):
        for line, given in zip(each.get_lines(), (one, other), strict=True):
            assert [*line.get_ydata()] == [1 - value for value in getattr(given.similarity, kind)]


def test_a_sublayer_that_was_dropped_before_is_a_gap():
    whole = scores().similarity
    gone = Similarities(attention=(None, *whole.attention[1:]), mlp=(None,) * 12, block=whole.block)
    attention, mlp, _ = importance(Findings(sweep(), [scores().model_copy(update={"similarity": gone})]))[0].axes
    assert math.isnan(attention.get_lines()[0].get_ydata()[0])
    assert not any(map(math.isfinite, mlp.get_lines()[0].get_ydata()))


def test_the_diagnostics_are_the_records():
    given = scores()
    axes = redundancy(Findings(sweep(), [given]))[0].axes
    found = given.diagnostics.attention
    expected = [found.magnitude_ratio, found.token_cosine_before, found.concentration, found.first_token]
    assert [tuple(each.get_lines()[0].get_ydata()) for each in axes] == expected


def test_diagnostics_that_were_not_measured_leave_the_picture_out():
    with pytest.raises(NothingToShow, match="no diagnostics"):
        redundancy(Findings(sweep(), [scores(diagnostics=False)]))


@pytest.mark.parametrize("paint", [importance, redundancy])
def test_without_scores_there_is_nothing_per_layer(paint):
    with pytest.raises(NothingToShow, match="no scores"):
        paint(Findings(sweep(), []))


def filled(axes, kind):
    """{(row, layer)} under the bars of one kind."""
    from matplotlib.colors import to_rgba

    cells = set()
    for bar in axes.patches:
        if bar.get_facecolor() == to_rgba(LOOK_OF[kind].color):
            top, height = bar.get_y(), bar.get_height()
            layer = round(bar.get_x() + bar.get_width() / 2)
            cells |= {(row, layer) for row in range(round(top + 0.5), round(top + 0.5 + height))}
    return cells


@pytest.mark.parametrize("name", ["attention", "mlp", "blocks", "joint", "consecutive"])
def test_a_cell_is_filled_where_the_mask_of_that_row_drops_the_layer(name):
    findings = Findings(sweep(names=[name], counts=(1, 2, 4, 5)), [])
    (axes,) = drop_order(findings)[0].axes
    ((_, *points),) = [[(0, None), *curve.points] for curve in findings.curves]
    masks = [point.quality.mask for _, point in points]
    for kind in ("attention", "mlp"):
        assert filled(axes, kind) == {(row, layer) for row, mask in enumerate(masks) for layer in getattr(mask, kind)}


def test_a_layer_that_comes_back_leaves_a_gap():
    """The choice that avoids KV cache padding need not extend the one before."""
    records = sweep(names=["attention"], counts=(1, 2, 3))
    series = records.series[0]
    swapped = series.model_copy(update={"masks": (series.masks[0], series.masks[2], series.masks[0])})
    findings = Findings(records.model_copy(update={"series": (swapped,)}), [])
    (axes,) = drop_order(findings)[0].axes
    third = [point.quality.mask.attention for _, point in findings.curves[0].points]
    assert filled(axes, "attention") == {(row, layer) for row, layers in enumerate(third) for layer in layers}


def test_random_orders_have_no_panel():
    titles = [axes.get_title() for axes in drop_order(Findings(sweep(), []))[0].axes]
    assert "joint" in titles
    assert not [title for title in titles if "random" in title]
