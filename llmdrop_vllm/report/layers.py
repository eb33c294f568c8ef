"""Pictures per layer: importance, why sublayers are redundant, and which are gone as more and more are dropped."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from llmdrop_vllm.artifacts import Diagnostics
from llmdrop_vllm.report.findings import Curve, Findings
from llmdrop_vllm.report.style import LOOK_OF, LOOKS, PAPER, Look, NothingToShow, label_of, legend, look, panels, scale
from llmdrop_vllm.selection.candidates import Kind

Values = Sequence[float | None]


def importance(findings: Findings) -> tuple[Figure, str]:
    """A panel for attention, MLP and block each; a line for each calibration set."""
    if not findings.calibrations:
        raise NothingToShow("no scores were given")
    figure, axes = panels("Importance of each sublayer: the lowest go first", findings.model, 3, 3, (4.8, 4.2))
    present: list[float] = []
    kinds = {"attention": "attention", "mlp": "MLP", "block": "block (both)"}
    for each, (kind, title) in zip(axes, kinds.items(), strict=True):
        for place, (name, scores) in enumerate(findings.calibrations.items()):
            values = [None if value is None else 1 - value for value in getattr(scores.similarity, kind)]
            _line(each, values, _short(name), look(place))
            present += [value for value in values if value is not None]
        each.set(title=title, xlabel="layer")
    for each in axes:  # alike, so that attention can be compared with MLP
        scale(each, present)
    limits = [limit for each in axes for limit in each.get_ylim()]
    for each in axes:
        each.set_ylim(min(limits), max(limits))
    kinds_of = {scores.importance for scores in findings.calibrations.values()}
    axes[0].set_ylabel(f"importance\n({' / '.join(sorted(kinds_of))})")
    legend(figure)
    return figure, f"Importance by layer, measured on {', '.join(findings.calibrations)}. {_lowest(findings)}"


def redundancy(findings: Findings) -> tuple[Figure, str]:
    """The first calibration set in full, the others paler behind it."""
    lines = [_diagnostics(scores.diagnostics) for scores in findings.calibrations.values()]
    titles = [title for title in (lines[0] if lines else ()) if any(_measured(each[title]) for each in lines)]
    if not titles:
        raise NothingToShow("the scores hold no diagnostics" if lines else "no scores were given")
    figure, axes = panels("Signs that sublayers are redundant", findings.model, len(titles), 2, (6, 3.7))
    for each, title in zip(axes, titles, strict=True):
        for place, found in enumerate(lines):
            for label, (values, chosen) in found[title].items():
                _line(each, values, label if place == 0 else "", chosen, alpha=1 if place == 0 else 0.35)
        each.set(title=title, xlabel="layer")
        each.set_ylim(bottom=min(0, each.get_ylim()[0]))
    first, *others = map(_short, findings.calibrations)
    legend(figure, columns=5, title=f"measured on {first}" + (f"; paler: {', '.join(others)}" if others else ""))
    return figure, f"By layer, measured on {', '.join(findings.calibrations)}: {'; '.join(titles)}."


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
    looks = {"attention gone": LOOK_OF["attention"], "MLP gone": LOOK_OF["mlp"]}
    handles = [Patch(color=each.color, label=label) for label, each in looks.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=2)
    largest = [f"{each.series.name}: {each.points[-1][1].quality.mask.summary()}" for each in curves]
    return figure, f"The sublayers that are gone by number dropped. The largest masks: {'; '.join(largest)}."


def _line(axes: Axes, values: Values, label: str, look: Look, alpha: float = 1) -> None:
    """With a gap where a layer has no such sublayer."""
    drawn = [float("nan") if value is None else value for value in values]
    axes.plot(range(len(drawn)), drawn, **{**look.line(label), "markersize": 5, "alpha": alpha})


def _lowest(findings: Findings) -> str:
    """For those who cannot see the picture."""
    values = next(iter(findings.calibrations.values())).similarity.attention
    present = [(1 - value, layer) for layer, value in enumerate(values) if value is not None]
    if not present:
        return "No attention is left."
    return f"Of attention, layer {min(present)[1]} has the lowest: {min(present)[0]:.3g}."


def _diagnostics(found: Diagnostics) -> Mapping[str, Mapping[str, tuple[Values, Look]]]:
    """Panel title to its lines."""
    attention, mlp = found.attention, found.mlp
    blue, orange, grey = LOOK_OF["attention"], LOOK_OF["mlp"], LOOKS[6]
    return {
        "Size of the output: ‖sublayer(x)‖ / ‖x‖": {
            "attention": (attention.magnitude_ratio, blue),
            "MLP": (mlp.magnitude_ratio, orange),
        },
        "Likeness of tokens: mean cosine between two": {
            "before attention": (attention.token_cosine_before, grey),
            "after attention": (attention.token_cosine_after, blue),
            "after MLP": (mlp.token_cosine_after, orange),
        },
        "Concentration of attention (1 = on one token)": {"attention": (attention.concentration, blue)},
        "Share of attention on the first token": {"attention": (attention.first_token, blue)},
    }


def _measured(lines: Mapping[str, tuple[Values, Look]]) -> bool:
    return any(value is not None for values, _ in lines.values() for value in values)


def _short(name: str) -> str:
    """The end of a long path or name says most."""
    return name if len(name) <= 36 else f"…{name[-35:]}"


def _panel(axes: Axes, curve: Curve, depth: int) -> None:
    """Attention fills the left half of a layer's column, its MLP the right half; the whole where only one kind goes."""
    masks = [point.quality.mask for _, point in curve.points]
    both = any(mask.attention for mask in masks) and any(mask.mlp for mask in masks)
    width, aside = (0.4, 0.2) if both or curve.series.what not in ("attention", "mlp") else (0.8, 0.0)
    shifts: dict[Kind, float] = {"attention": -aside, "mlp": aside}
    for kind, shift in shifts.items():
        runs = [
            (layer + shift, start - 0.5, length)
            for layer in range(depth)
            for start, length in _runs(row for row, mask in enumerate(masks) if layer in getattr(mask, kind))
        ]
        if runs:
            xs, tops, heights = zip(*runs, strict=True)
            axes.bar(xs, heights, width, tops, color=LOOK_OF[kind].color, linewidth=0)
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
