"""The table of all points, as HTML."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from llmdrop_vllm.evaluation.records import Point, Sweep, TaskScore
from llmdrop_vllm.report.findings import NOUNS, Findings
from llmdrop_vllm.report.measures import AGREEMENT, ALL_TASKS, KL, PERPLEXITY, TASK_MEASURES, Measure, percent
from llmdrop_vllm.report.summary import speedup_text
from llmdrop_vllm.report.tradeoff import degradation_of

DASH = "–"


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
    for curve in findings.curves:
        series, rows = curve.series, []
        for n, point in curve.points[1:]:
            rows.append(f'<tr><td class="number">{n}</td>{_cells(point, chosen)}</tr>')
        title = f"{escape(series.name)} <span class='muted'>({NOUNS[series.what]}, {escape(series.order)})</span>"
        over = f'<tr><th scope="rowgroup" colspan="{len(chosen) + 1}">{title}</th></tr>'
        groups.append(f"<tbody>{over}{''.join(rows)}</tbody>")
    first = '<th class="number" scope="col">number dropped</th>'
    body = full + "\n".join(groups)
    table = f'<table class="points"><thead><tr>{first}{head}</tr></thead>{body}</table>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="All points">{table}</div>'


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
