"""Pictures of what is gained: speed against quality, and the KV cache."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llmdrop_vllm.evaluation.records import Estimate
from llmdrop_vllm.report.findings import Curve, Findings
from llmdrop_vllm.report.measures import ALL_TASKS, PERPLEXITY, Measure
from llmdrop_vllm.report.quality import DROPPED, look_of
from llmdrop_vllm.report.style import (
    GREY,
    INK,
    LOOK_OF_WHAT,
    Look,
    NothingToShow,
    label_of,
    legend,
    look,
    panels,
    scale,
)

Spots = dict[str, tuple[float, Estimate]]
K = TypeVar("K", bound=Hashable)


def speedup(findings: Findings) -> tuple[Figure, str]:
    """A panel for perplexity, and one for the tasks where there are any; every measured mask is a marker."""
    sweep = findings.sweep
    if not any(sweep.speedup(point) for mask, point in sweep.points.items() if mask != sweep.base):
        raise NothingToShow("speed was not measured")
    measures = [PERPLEXITY, *([ALL_TASKS] if ALL_TASKS.of(sweep.full) else [])]
    figure, axes = panels("What speed costs in quality", findings.model, len(measures), 2, (6.8, 5))
    said = []
    for each, measure in zip(axes, measures, strict=True):
        spots = _spots(findings, measure)
        _markers(each, findings, spots)
        sign = -1 if measure.lower_is_better else 1
        front = pareto_front({mask: (x, sign * value.value) for mask, (x, value) in spots.items()})
        line = [(spots[mask][0], spots[mask][1].value) for mask in front]
        each.plot(
            *zip(*line, strict=True), color=INK, linewidth=1.5, zorder=1, label="Pareto front: nothing beats these"
        )
        each.set(xlabel="speedup, prefill and decode (full model = 1)", ylabel=measure.axis)
        if measure.lower_is_better:
            scale(each, [value.value for _, value in spots.values()])
        each.margins(x=0.05, y=0.12)
        each.xaxis.set_major_locator(MaxNLocator(nbins=7))
        left, right = each.get_xlim()
        each.set_xlim(left, right + 0.2 * (right - left))  # room for the last label
        labels = [(*place, findings.names.get(mask, mask)) for mask, place in zip(front, line, strict=True)]
        _labels(each, labels, above=not measure.lower_is_better)
        names = ", ".join(f"{findings.names.get(mask, mask)} ({spots[mask][0]:.2f}x)" for mask in front)
        said.append(f"Best trade-offs by {measure.name}: {names}.")
    legend(figure)
    return figure, f"Speedup against quality. {' '.join(said)}"


def pareto_front(points: Mapping[K, tuple[float, float]]) -> list[K]:
    """Those that no other one beats, slowest first, of (speedup, quality): more of both is better.

    To beat is to be at least as good in both and better in one; equals stay together.
    """

    def beaten(mine: tuple[float, float]) -> bool:
        return any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in points.values())

    return sorted((key for key, value in points.items() if not beaten(value)), key=lambda key: points[key])


def _spots(findings: Findings, measure: Measure) -> Spots:
    """Mask id, or the name of a healed point, to (speedup, quality); the full model's speedup is 1 by definition."""
    sweep, found = findings.sweep, {}
    healed = {name: point for name, (_, point) in findings.mended_points.items()}
    for mask, point in {**sweep.points, **healed}.items():
        faster, value = 1.0 if mask == sweep.base else sweep.speedup(point), measure.of(point)
        if faster is not None and value is not None:
            found[mask] = faster, value
    return found


def _markers(axes: Axes, findings: Findings, spots: Spots) -> None:
    """Coloured by what is dropped; controls are grey, so that they do not hide what is recommended."""
    healed = findings.mended_points
    owners = {mask: curve for curve in reversed(_by_rank(findings)) for mask in curve.series.masks}
    for mask, (x, value) in spots.items():
        curve, point = healed.get(mask) or (owners.get(mask), findings.sweep.points[mask])
        label, chosen = _appearance(findings, curve)
        if mask == findings.sweep.base:
            label, chosen = "full model", Look(INK, "*", "none")
        if not (curve is None or curve.by_importance or mask in healed):
            axes.plot([x], [value.value], **{**chosen.line, "linestyle": "none", "label": label_of(label)}, zorder=1)
            continue
        low, high = (None if mask == findings.sweep.base else findings.sweep.speedup_spread(point)) or (x, x)
        stderr = value.stderr or 0.0
        style = {**chosen.line, "linestyle": "none", "label": label_of(label), "elinewidth": 1}
        across = [[max(0.0, x - low)], [max(0.0, high - x)]]
        axes.errorbar([x], [value.value], xerr=across, yerr=[stderr] if stderr else None, zorder=2, **style)


def _by_rank(findings: Findings) -> list[Curve]:
    """By importance first: a mask that several series reach is shown as theirs."""
    return sorted(findings.curves, key=lambda curve: (not curve.by_importance, curve.random))


def _appearance(findings: Findings, curve: Curve | None) -> tuple[str, Look]:
    if curve is None:
        return "other masks", Look(GREY, "x", "none")
    if curve.by_importance or curve in findings.mended:
        return curve.series.name, look_of(findings, curve)
    return ("random", Look(GREY, ".", "none")) if curve.random else ("other orders", Look(GREY, "x", "none"))


def _labels(axes: Axes, spots: Sequence[tuple[float, float, str]], above: bool) -> None:
    """The ends of the front and what has room between them, on its empty side: nothing lies beyond the front."""
    placed: list[tuple[float, float]] = []
    for x, y, name in [*spots[:1], *spots[:0:-1]]:
        across, up = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        if any(abs(across - a) < 0.24 and abs(up - u) < 0.08 for a, u in placed):
            continue
        placed.append((across, up))
        side = 7 if above else -7
        axes.annotate(
            name if len(name) <= 24 else f"{name[:23]}…",
            (x, y),
            xytext=(7, side),
            textcoords="offset points",
            va="bottom" if above else "top",
            fontsize=11,
        )


def kv_cache(findings: Findings) -> tuple[Figure, str]:
    """Series of the same share are one line that names them all."""
    curves = _by_rank(findings)
    if not curves:
        raise NothingToShow("no series is measured yet")
    groups: list[tuple[dict[int, float], list[Curve]]] = []
    for curve in sorted(curves, key=lambda each: -len(each.points)):
        shares = {n: 100 * point.kv_share for n, point in curve.points}
        for known, members in groups:
            if shares.items() <= known.items():
                members.append(curve)
                break
        else:
            groups.append((shares, [curve]))
    figure, (axes,) = panels("KV cache that is left", findings.model, 1, 1, (9, 4.4))
    said = []
    for place, (shares, members) in enumerate(groups):
        name = ", ".join(curve.series.name for curve in members)
        lead = next((curve for curve in members if curve.by_importance), None)
        chosen = LOOK_OF_WHAT[lead.series.what] if lead else look(place + 4)
        axes.plot([*shares], [*shares.values()], label=label_of(name, width=72), **chosen.line)
        said.append(f"{name}: {shares[max(shares)]:.1f}% with {max(shares)} dropped.")
    axes.set(xlabel=DROPPED, ylabel="KV cache as stored,\n% of the full model's", ylim=(0, 105))
    legend(figure, columns=1)
    return figure, f"KV cache that is left, padding included. {' '.join(said)}"
