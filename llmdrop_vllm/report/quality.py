"""Pictures of quality by number dropped: by importance, in other orders, against the full model, and in a search."""

from collections.abc import Iterator, Sequence
from itertools import product
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmdrop_vllm.evaluation.records import Estimate
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.report.findings import Curve, Findings, sizes
from llmdrop_vllm.report.measures import AGREEMENT, ALL_TASKS, KL, PERPLEXITY, TASK_MEASURES, Measure
from llmdrop_vllm.report.style import GREY, INK, LOOK_OF, LOOKS, Look, NothingToShow, legend, look, panels, scale
from llmdrop_vllm.selection.candidates import NOUNS

DROPPED = "number dropped (sublayers, or blocks)"


def values(curve: Curve, measure: Measure) -> list[tuple[float, Estimate]]:
    """(number dropped, value) where it was measured."""
    return [(n, found) for n, point in curve.points if (found := measure.of(point)) is not None]


def look_of(findings: Findings, curve: Curve) -> Look:
    """Of a curve by importance, and of what became of one by healing."""
    if curve in findings.mended:
        return look(len(LOOK_OF) + findings.mended.index(curve))
    return LOOK_OF[curve.series.what]


def quality(findings: Findings) -> tuple[Figure, str]:
    """A panel for perplexity and for each kind of task."""
    measures = [each for each in (PERPLEXITY, *TASK_MEASURES) if each.of(findings.sweep.full) is not None]
    return _by_importance(findings, measures, "Quality as the least important go first", levels=True)


def divergence(findings: Findings) -> tuple[Figure, str]:
    """Agreement and KL divergence; the full model against itself would be 100% and 0, and says nothing."""
    if not any(AGREEMENT.of(point) for curve in findings.by_importance for n, point in curve.points if n):
        raise NothingToShow("the next-token distributions were not compared with the full model's")
    return _by_importance(findings, [AGREEMENT, KL], "How often the next token stays the same", levels=False)


def _by_importance(findings: Findings, measures: Sequence[Measure], title: str, *, levels: bool) -> tuple[Figure, str]:
    """With the full model's values, or from the first sublayer that goes on."""
    curves = [*findings.by_importance, *findings.mended]
    if not findings.by_importance:
        raise NothingToShow("no series that drops the least important first is measured yet")
    figure, axes = panels(title, findings.model, len(measures), 3 if len(measures) == 3 else 2, (5.2, 4.2))
    said = []
    for each, measure in zip(axes, measures, strict=True):
        shown: list[float] = []
        for curve in curves:
            # What was healed does not begin at the full model: a line from there would tell of numbers between.
            begins = levels and curve not in findings.mended
            if pairs := [(n, value) for n, value in values(curve, measure) if n or begins]:
                said.append(_draw(each, curve, pairs, measure, look_of(findings, curve)))
                shown += [value.value for _, value in pairs]
        if levels:
            _levels(each, measure, findings)
        each.set(xlabel=DROPPED, ylabel=measure.axis, title=measure.name)
        if measure.lower_is_better:
            scale(each, shown)
    legend(figure)
    return figure, f"{title}. {' '.join(said)}"


def _draw(axes: Axes, curve: Curve, pairs: Sequence[tuple[float, Estimate]], measure: Measure, look: Look) -> str:
    """A curve with its standard errors, where there are any; its ends are for those who cannot see it."""
    (first, start), (last, end), name = pairs[0], pairs[-1], curve.series.name
    xs, ys = zip(*((x, value.value) for x, value in pairs), strict=True)
    errors = [value.stderr or 0.0 for _, value in pairs]
    up = errors if any(errors) else None
    axes.errorbar(xs, ys, yerr=up, capsize=3, elinewidth=1.2, **look.line(name))
    return f"{measure.name}, {name}: {measure.text(start)} at {first:g}, {measure.text(end)} at {last:g}."


def _levels(axes: Axes, measure: Measure, findings: Findings) -> None:
    """The full model as a line, with its standard error as a band, and what guessing would get."""
    full = measure.of(findings.sweep.full)
    if full is None:
        return
    axes.axhline(full.value, color=INK, linewidth=1.5, linestyle="-", label="full model", zorder=1)
    if full.stderr:
        axes.axhspan(full.value - full.stderr, full.value + full.stderr, color=GREY, alpha=0.2, linewidth=0)
    if (chance := measure.chance(findings.sweep.full)) is not None:
        axes.axhline(chance, color=GREY, linewidth=2, linestyle=(0, (1, 2)), label="guessing", zorder=1)


def controls(findings: Findings) -> tuple[Figure, str]:
    """The same number dropped in another order: a panel for each kind of sublayer that has several orders."""
    orders = {what: [curve for curve in findings.curves if curve.series.what == what] for what in LOOK_OF}
    kinds = {what: curves for what, curves in orders.items() if len(curves) > 1}
    if not kinds:
        raise NothingToShow("only one order is measured")
    measures = [PERPLEXITY, *([ALL_TASKS] if ALL_TASKS.of(findings.sweep.full) else [])]
    title = "Does it matter which ones are dropped?"
    figure, axes = panels(title, findings.model, len(kinds) * len(measures), 2, (6.4, 3.9))
    looks = _looks([curve for curves in kinds.values() for curve in curves])
    said = []
    for each, ((what, curves), measure) in zip(axes, product(kinds.items(), measures), strict=True):
        for curve in curves:
            if not curve.random:
                said.append(_draw(each, curve, values(curve, measure), measure, looks[curve.series.name]))
        if seeds := [dict(values(curve, measure)) for curve in curves if curve.random]:
            _band(each, seeds)
        full = measure.of(findings.sweep.full)
        each.axhline(full.value if full else 0, color=INK, linewidth=1.2, label="full model", zorder=1)
        each.set(xlabel=f"{NOUNS[what]} dropped", ylabel=measure.axis, title=f"{NOUNS[what]}: {measure.name}")
        if measure.lower_is_better:
            scale(each, [value.value for curve in curves for _, value in values(curve, measure)])
    legend(figure, columns=3)
    return figure, f"{title} {' '.join(said)}"


def _looks(curves: Sequence[Curve]) -> dict[str, Look]:
    """By series name: by importance as in the other pictures, the others what these leave over."""
    found = {each.series.name: LOOK_OF[each.series.what] for each in curves if each.by_importance}
    free = [each for each in LOOKS if each not in found.values()] or [*LOOKS]
    others = [each.series.name for each in curves if not (each.by_importance or each.random)]
    return found | {name: free[place % len(free)] for place, name in enumerate(others)}


def _band(axes: Axes, seeds: Sequence[dict[float, Estimate]]) -> None:
    """From the lowest to the highest of several seeds, and their mean."""
    counts = sorted({n for seed in seeds for n in seed})
    rows = [[seed[n].value for seed in seeds if n in seed] for n in counts]
    name = f"random: mean and range of {len(seeds)}" if len(seeds) > 1 else "random"
    axes.fill_between(counts, [*map(min, rows)], [*map(max, rows)], color=GREY, alpha=0.25, linewidth=0)
    axes.plot(counts, [*map(fmean, rows)], color=GREY, linewidth=2, marker="s", markersize=4, label=name)


def search(findings: Findings) -> tuple[Figure, str]:
    """KL on the answers by number gone: all masks, the best of each number, and cosine's."""
    if findings.searched is None:
        raise NothingToShow("no search was given (--search)")
    if not findings.searched.masks:
        raise NothingToShow("the search has judged no mask on all its answers yet")
    depth, masks = findings.depth, findings.searched.masks
    if any({*mask.windows} - {*findings.searched.header.start.windows} for mask, _ in masks):
        raise NothingToShow("the search was for windows too, and its masks are drawn by what is gone alone")
    judged = [(sum(sizes(mask)), kl) for mask, kl in masks]
    title = "What a search found among the masks that it judged"
    figure, (axes,) = panels(title, findings.model, 1, 1, (9.0, 5.0))
    numbers, losses = zip(*judged, strict=True)
    axes.plot(numbers, losses, ".", color=GREY, alpha=0.5, label=f"{len(judged)} masks")
    by_number = {n: [kl for count, kl in judged if count == n] for n in sorted({*numbers})}
    # Of some numbers there is cosine's mask alone, which no search has found.
    best = [(n, min(found)) for n, found in by_number.items() if len(found) > 1] or [(numbers[-1], losses[-1])]
    by_cosine = dict(_prefixes(masks))
    axes.plot([*by_cosine], [*by_cosine.values()], **LOOKS[0].line("by cosine"))
    axes.plot(*zip(*best, strict=True), **LOOKS[1].line("best of the search"))
    axes.set(xlabel=f"sublayers gone, of {2 * depth}", ylabel="KL to the full model on its answers, nats per token")
    scale(axes, losses)
    legend(figure)
    n, least = best[-1]
    beside = f", by cosine {by_cosine[n]:.3f}" if n in by_cosine else ""
    return figure, f"{title}. {len(judged)} masks; the best without {n} sublayers has a KL of {least:.3f}{beside}."


def _prefixes(masks: Sequence[tuple[DropMask, float]]) -> Iterator[tuple[int, float]]:
    """A search judges cosine's masks first: each has one sublayer more than the one before, in its order."""
    before = None
    for mask, kl in masks:
        if before is not None and (
            mask.attention[: len(before.attention)] != before.attention
            or mask.mlp[: len(before.mlp)] != before.mlp
            or sum(sizes(mask)) != sum(sizes(before)) + 1
        ):
            return
        yield sum(sizes(mask)), kl
        before = mask
