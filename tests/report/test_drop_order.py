import pytest

from llmdrop_vllm.report.drop_order import drop_order
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.style import LOOK_OF_WHAT
from tests.report.sweeps import sweep


def filled(axes, kind):
    """{(row, layer)} under the bars of one kind."""
    from matplotlib.colors import to_rgba

    cells = set()
    for bar in axes.patches:
        if bar.get_facecolor() == to_rgba(LOOK_OF_WHAT[kind].color):
            top, height = bar.get_y(), bar.get_height()
            layer = round(bar.get_x() + bar.get_width() / 2)
            cells |= {(row, layer) for row in range(round(top + 0.5), round(top + 0.5 + height))}
    return cells


@pytest.mark.parametrize("name", ["attention", "mlp", "blocks", "joint", "consecutive"])
def test_a_cell_is_filled_where_the_mask_of_that_row_drops_the_layer(name):
    findings = Findings.of(sweep(names=[name], counts=(1, 2, 4, 5)), [])
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
    findings = Findings.of(records.model_copy(update={"series": (swapped,)}), [])
    (axes,) = drop_order(findings)[0].axes
    third = [point.quality.mask.attention for _, point in findings.curves[0].points]
    assert filled(axes, "attention") == {(row, layer) for row, layers in enumerate(third) for layer in layers}


def test_random_orders_have_no_panel():
    titles = [axes.get_title() for axes in drop_order(Findings.of(sweep(), []))[0].axes]
    assert "joint" in titles
    assert not [title for title in titles if "random" in title]
