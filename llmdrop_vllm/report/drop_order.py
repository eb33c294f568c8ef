"""Which sublayers are gone as more and more are dropped."""

from collections.abc import Iterable
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from llmdrop_vllm.report.findings import Curve, Findings
from llmdrop_vllm.report.style import LOOK_OF_WHAT, PAPER, NothingToShow, label_of, panels


def drop_order(findings: Findings) -> tuple[Figure, str]:
    """A panel for each series but the random ones; a row for each mask, a column for each layer."""
    curves = [curve for curve in findings.curves if not curve.random]
    if not curves:
        raise NothingToShow("no series is measured yet")
    columns = 2 if len(curves) < 5 else 3
    figure, axes = panels("Which sublayers are gone", findings.model, len(curves), columns, (13 / columns, 3.2))
    for each, curve in zip(axes, curves, strict=True):
        _panel(each, curve, findings.depth)
    for each in axes[-columns:]:
        each.set_xlabel("layer")
    for each in axes[::columns]:
        each.set_ylabel("number dropped")
    colors = {kind: LOOK_OF_WHAT[kind].color for kind in ("attention", "mlp")}
    handles = [Patch(color=colors["attention"], label="attention gone"), Patch(color=colors["mlp"], label="MLP gone")]
    figure.legend(handles=handles, loc="outside lower left", ncols=2)
    largest = [f"{each.series.name}: {each.points[-1][1].quality.mask.mask.summary()}" for each in curves]
    return figure, f"The sublayers that are gone by number dropped. The largest masks: {'; '.join(largest)}."


def _panel(axes: Axes, curve: Curve, depth: int) -> None:
    """Attention fills the left half of a layer's column, its MLP the right half; the whole where only one kind goes."""
    masks = [point.quality.mask for _, point in curve.points]
    one = curve.series.what in ("attention", "mlp") and not (
        any(mask.attention for mask in masks) and any(mask.mlp for mask in masks)
    )
    width = 0.8 if one else 0.4
    for kind in ("attention", "mlp"):
        shift = 0.0 if one else (-width / 2 if kind == "attention" else width / 2)
        runs = [
            (layer + shift, start - 0.5, length)
            for layer in range(depth)
            for start, length in _runs(row for row, mask in enumerate(masks) if layer in getattr(mask, kind))
        ]
        if runs:
            xs, tops, heights = zip(*runs, strict=True)
            axes.bar(xs, heights, width, tops, color=LOOK_OF_WHAT[kind].color, linewidth=0)
    between = [row - 0.5 for row in range(1, len(masks))]
    axes.hlines(between, -0.7, depth - 0.3, color=PAPER if len(masks) <= 16 else "none", linewidth=1.5)
    axes.set(title=label_of(curve.series.name, width=32), xlim=(-0.7, depth - 0.3), ylim=(len(masks) - 0.5, -0.5))
    step = -(-len(masks) // 9)
    axes.set_yticks(range(0, len(masks), step), [str(n) for n, _ in curve.points][::step])
    axes.grid(visible=False)


def _runs(rows: Iterable[int]) -> list[tuple[int, int]]:
    """(first, length) of consecutive ones: a bar for each, where a cell for each would make a large file."""
    groups = (list(group) for _, group in groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0]))
    return [(group[0][1], len(group)) for group in groups]
