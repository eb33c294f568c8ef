"""Pictures of what is gained: speed against quality, and the KV cache."""

from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llmdrop_vllm.evaluation.records import Estimate, Point
from llmdrop_vllm.report.findings import Curve, Findings
from llmdrop_vllm.report.measures import ALL_TASKS, PERPLEXITY, Measure
from llmdrop_vllm.report.quality import DROPPED, look_of
from llmdrop_vllm.report.style import GREY, INK, LOOK_OF, Look, NothingToShow, legend, look, panels, scale


@dataclass(frozen=True)
class Spot:
    """A measured mask, or what became of one; `curve` is whose it is shown as, if any's."""

    curve: Curve | None
    point: Point
    speedup: float
    value: Estimate


def speedup(findings: Findings) -> tuple[Figure, str]:
    """A panel for perplexity, and one for the tasks where there are any; every measured mask is a marker."""
    sweep = findings.sweep
    if not any(sweep.speedup(point) for point in sweep.points.values() if point is not sweep.full):
        raise NothingToShow("speed was not measured")
    measures = [PERPLEXITY, *([ALL_TASKS] if ALL_TASKS.of(sweep.full) else [])]
    figure, axes = panels("What speed costs in quality", findings.model, len(measures), 2, (6.8, 5))
    said = []
    for each, measure in zip(axes, measures, strict=True):
        spots = _spots(findings, measure)
        for spot in spots.values():
            _mark(each, findings, spot)
        sign = -1 if measure.lower_is_better else 1
        front = pareto_front({name: (spot.speedup, sign * spot.value.value) for name, spot in spots.items()})
        line = [(spots[name].speedup, spots[name].value.value) for name in front]
        label = "Pareto front: nothing beats these"
        each.plot(*zip(*line, strict=True), color=INK, linewidth=1.5, zorder=1, label=label)
        each.set(xlabel="speedup, prefill and decode (full model = 1)", ylabel=measure.axis)
        if measure.lower_is_better:
            scale(each, [spot.value.value for spot in spots.values()])
        each.margins(x=0.05, y=0.12)
        each.xaxis.set_major_locator(MaxNLocator(nbins=7))
        left, right = each.get_xlim()
        each.set_xlim(left, right + 0.2 * (right - left))  # room for the last label
        _labels(each, dict(zip(front, line, strict=True)), above=not measure.lower_is_better)
        names = ", ".join(f"{name} ({spots[name].speedup:.2f}x)" for name in front)
        said.append(f"Best trade-offs by {measure.name}: {names}.")
    legend(figure)
    return figure, f"Speedup against quality. {' '.join(said)}"


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Those that no other one beats, slowest first, of (speedup, quality): more of both is better.

    To beat is to be at least as good in both and better in one; equals stay together.
    """

    def beaten(mine: tuple[float, float]) -> bool:
        return any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in points.values())

    return sorted((key for key, value in points.items() if not beaten(value)), key=lambda key: points[key])


def _spots(findings: Findings, measure: Measure) -> dict[str, Spot]:
    """By what a picture calls them; the full model's speedup is 1 by definition."""
    sweep, names = findings.sweep, findings.names
    owners = {mask: curve for curve in reversed(_by_rank(findings)) for mask in curve.series.masks}
    points = {names.get(mask, mask): (owners.get(mask), point) for mask, point in sweep.points.items()}
    points |= {f"{curve.series.name} {n}": (curve, point) for curve in findings.mended for n, point in curve.points[1:]}
    found = {}
    for name, (curve, point) in points.items():
        faster, value = 1.0 if point is sweep.full else sweep.speedup(point), measure.of(point)
        if faster is not None and value is not None:
            found[name] = Spot(curve, point, faster, value)
    return found


def _mark(axes: Axes, findings: Findings, spot: Spot) -> None:
    """Coloured by what is dropped; controls are grey, so that they do not hide what is recommended."""
    x, y, stderr, curve = spot.speedup, spot.value.value, spot.value.stderr, spot.curve
    spread = findings.sweep.speedup_spread(spot.point)
    if spot.point is findings.sweep.full:
        label, chosen, spread = "full model", Look(INK, "*", "none"), None
    elif curve is None:
        label, chosen = "other masks", Look(GREY, "x", "none")
    elif curve.by_importance or curve in findings.mended:
        label, chosen = curve.series.name, look_of(findings, curve)
    else:
        label, marker = ("random", ".") if curve.random else ("other orders", "x")
        axes.plot([x], [y], **Look(GREY, marker, "none").line(label), zorder=1)
        return
    low, high = spread or (x, x)
    across = [[max(0.0, x - low)], [max(0.0, high - x)]]
    style = {**chosen.line(label), "linestyle": "none", "elinewidth": 1}
    axes.errorbar([x], [y], xerr=across, yerr=[stderr] if stderr else None, zorder=2, **style)


def _by_rank(findings: Findings) -> list[Curve]:
    """By importance first: a mask that several series reach is shown as theirs."""
    return sorted(findings.curves, key=lambda curve: (not curve.by_importance, curve.random))


def _labels(axes: Axes, spots: Mapping[str, tuple[float, float]], above: bool) -> None:
    """The ends of the front and what has room between them, on its empty side: nothing lies beyond the front."""
    placed: list[tuple[float, float]] = []
    first, *others = spots.items()
    for name, spot in (first, *reversed(others)):
        across, up = axes.transAxes.inverted().transform(axes.transData.transform(spot))
        if any(abs(across - a) < 0.24 and abs(up - u) < 0.08 for a, u in placed):
            continue
        placed.append((across, up))
        text = name if len(name) <= 24 else f"{name[:23]}…"
        side, va = (7, "bottom") if above else (-7, "top")
        axes.annotate(text, spot, xytext=(7, side), textcoords="offset points", va=va, fontsize=11)


def kv_cache(findings: Findings) -> tuple[Figure, str]:
    """Series of the same share are one line that names them all."""
    curves = _by_rank(findings)
    if not curves:
        raise NothingToShow("no series is measured yet")
    groups: list[tuple[dict[int, float], list[Curve]]] = []
    for curve in sorted(curves, key=lambda each: -len(each.points)):
        shares = {n: 100 * point.kv_share for n, point in curve.points}
        alike = next((members for known, members in groups if shares.items() <= known.items()), None)
        if alike is None:
            groups.append((shares, [curve]))
        else:
            alike.append(curve)
    figure, (axes,) = panels("KV cache that is left", findings.model, 1, 1, (9, 4.4))
    said = []
    for place, (shares, members) in enumerate(groups):
        name = ", ".join(curve.series.name for curve in members)
        lead = next((curve for curve in members if curve.by_importance), None)
        chosen = LOOK_OF[lead.series.what] if lead else look(place + 4)
        axes.plot([*shares], [*shares.values()], **chosen.line(name, width=72))
        said.append(f"{name}: {shares[max(shares)]:.1f}% with {max(shares)} dropped.")
    axes.set(xlabel=DROPPED, ylabel="KV cache as stored,\n% of the full model's", ylim=(0, 105))
    legend(figure, columns=1)
    return figure, f"KV cache that is left, padding included. {' '.join(said)}"
