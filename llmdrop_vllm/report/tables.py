"""The tables of the page, as HTML: how many sublayers may go by each measure, and all points."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from llmdrop_vllm.evaluation.records import Point, Sweep, TaskScore
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.measures import (
    AGREEMENT,
    ALL_TASKS,
    KL,
    PERPLEXITY,
    TASK_MEASURES,
    Measure,
    degradation_of,
    percent,
)
from llmdrop_vllm.report.summary import main_curve, speedup_text, verdicts
from llmdrop_vllm.selection.candidates import NOUNS

DASH = "–"


def verdicts_table(findings: Findings) -> str:
    """How many sublayers may go, by one measure a row; nothing where only the full model is measured."""
    curve = main_curve(findings)
    if curve is None:
        return ""
    what = NOUNS[curve.series.what]
    head = ("full model", "limit", f"{what} that can go", "then", "with the next one gone")
    numeric = {"full model", head[2]}
    cells = "".join(f'<th scope="col"{_right(name in numeric)}>{escape(name)}</th>' for name in head)
    rows = []
    for each in verdicts(findings.sweep, curve):
        values = (each.measure.text(each.full), each.limit, str(each.n), each.then, each.beyond)
        if each.blind is not None:
            values = (*values[:2], "cannot tell", *values[3:])
        row = "".join(f"<td{_right(name in numeric)}>{escape(v)}</td>" for name, v in zip(head, values, strict=True))
        unit = "" if each.measure.kind is None else ", %"
        rows.append(f'<tr><th scope="row">{escape(each.measure.name)}{unit}</th>{row}</tr>')
    table = f'<table><thead><tr><th scope="col">measure</th>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return _scrolling(table, "What can go")


@dataclass(frozen=True)
class Column:
    """`text` is what a cell says of a point."""

    title: str
    text: Callable[[Point], str]


def points_table(findings: Findings) -> str:
    """The full model, then a group of rows for each series; a mask that several series reach stands in each."""
    sweep, chosen = findings.sweep, columns(findings.sweep)
    head = "".join(f'<th class="number" scope="col">{escape(column.title)}</th>' for column in chosen)
    full = f'<tbody><tr class="full"><th scope="row">full model</th>{_cells(sweep.full, chosen)}</tr></tbody>'
    groups = []
    for curve in (*findings.curves, *findings.mended):
        series, rows = curve.series, []
        for n, point in curve.points[1:]:
            rows.append(f'<tr><td class="number">{n}</td>{_cells(point, chosen)}</tr>')
        title = f"{escape(series.name)} <span class='muted'>({NOUNS[series.what]}, {escape(series.order)})</span>"
        over = f'<tr><th scope="rowgroup" colspan="{len(chosen) + 1}">{title}</th></tr>'
        groups.append(f"<tbody>{over}{''.join(rows)}</tbody>")
    first = '<th class="number" scope="col">number dropped</th>'
    body = full + "\n".join(groups)
    return _scrolling(f'<table class="points"><thead><tr>{first}{head}</tr></thead>{body}</table>', "All points")


def columns(sweep: Sweep) -> list[Column]:
    """Those of which anything was measured."""
    points = [*sweep.points.values()]
    kinds = [measure for measure in TASK_MEASURES if any(measure.of(point) for point in points)]
    averages = [*kinds, *([ALL_TASKS] if len(kinds) > 1 else [])]
    found = [_of(PERPLEXITY, "perplexity"), *(_of(each, f"{each.name}, %") for each in averages)]
    keys = dict.fromkeys((task.task, task.metric) for point in points for task in point.quality.tasks)
    found += [Column(f"{task} {metric}, %", _task(task, metric)) for task, metric in keys]
    if any(AGREEMENT.of(point) for point in points):
        found += [_of(AGREEMENT, "agreement, %"), _of(KL, "KL, nats")]
    if any(sweep.speedup(point) for point in points):
        found.append(Column("speedup (range)", lambda point: _speedup(sweep, point)))
    found.append(Column("KV cache, %", lambda point: f"{100 * point.kv_share:.1f}"))
    found.append(Column("parameters", lambda point: f"{point.parameters:,}"))
    if any(degradation_of(sweep, point) is not None for point in points):
        found.append(Column("points lost per % of speedup", lambda point: _ratio(sweep, point)))
    return found


def _of(measure: Measure, title: str) -> Column:
    return Column(title, lambda point: measure.text(measure.of(point)))


def _task(name: str, metric: str) -> Callable[[Point], str]:
    def text(point: Point) -> str:
        found: Sequence[TaskScore] = [t for t in point.quality.tasks if (t.task, t.metric) == (name, metric)]
        return ALL_TASKS.text(percent(found[0].value, found[0].stderr)) if found else DASH

    return text


def _speedup(sweep: Sweep, point: Point) -> str:
    if point is sweep.full:
        return "1"
    speedup, spread = sweep.speedup(point), sweep.speedup_spread(point)
    return DASH if speedup is None or spread is None else speedup_text(speedup, spread)


def _ratio(sweep: Sweep, point: Point) -> str:
    found = degradation_of(sweep, point)
    return DASH if found is None or point is sweep.full else f"{found:.2f}"


def _cells(point: Point, chosen: Sequence[Column]) -> str:
    return "".join(f'<td class="number">{escape(column.text(point))}</td>' for column in chosen)


def _right(number: bool) -> str:
    return ' class="number"' if number else ""


def _scrolling(table: str, name: str) -> str:
    """In a frame of its own, so that a wide one does not widen the page."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{table}</div>'
