import re
from html import unescape

from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.measures import columns
from llmdrop_vllm.report.page import render
from tests.report.sweeps import TASKS, healed, sweep


def rows(findings):
    """The text of the cells of each row of all points."""
    (table,) = re.findall(r'<table class="points">.*?</table>', render(findings, []), re.DOTALL)
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.DOTALL)
    return [[unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in found]


def test_every_point_of_every_series_is_a_row_with_the_numbers_of_its_record():
    records = sweep(names=["attention", "mlp"], counts=(1, 4))
    head, full, *found = rows(Findings(records, []))
    assert [row[0] for row in found if len(row) > 1] == ["1", "4", "1", "4"]
    for row, mask in zip(
        (each for each in found if len(each) > 1), sum((s.masks for s in records.series), ()), strict=True
    ):
        point, cells = records.points[mask], dict(zip(head, row, strict=True))
        quality, divergence = point.quality, point.quality.divergence
        assert cells["perplexity"] == f"{quality.perplexity.value:.2f} ± {quality.perplexity.stderr:.2f}"
        assert cells["arc_easy acc, %"] == f"{100 * quality.tasks[0].value:.1f} ± {100 * quality.tasks[0].stderr:.1f}"
        assert cells["generation, %"].startswith(f"{100 * quality.task_average('generation'):.1f} ±")
        assert (
            cells["agreement, %"] == f"{100 * divergence.agreement.value:.1f} ± {100 * divergence.agreement.stderr:.1f}"
        )
        assert cells["KL, nats"] == f"{divergence.kl.value:.3f} ± {divergence.kl.stderr:.3f}"
        low, high = records.speedup_spread(point)
        assert cells["speedup (range)"] == f"{records.speedup(point):.2f} ({low:.2f} to {high:.2f})"
        assert cells["KV cache, %"] == f"{100 * point.kv_share:.1f}"
        lost = 100 * (records.full.quality.task_average() - quality.task_average())
        ratio = lost / (100 * (records.speedup(point) - 1))
        assert cells["points lost per % of speedup"] == f"{ratio:.2f}"
    assert dict(zip(head, full, strict=True))["speedup (range)"] == "1"


def test_what_was_not_measured_has_no_column():
    titles = [*columns(sweep(tasks=(), speed=False, divergence=False))]
    assert titles == ["perplexity", "KV cache, %", "parameters"]


def test_a_metric_that_one_point_lacks_is_a_dash():
    records = sweep(names=["attention"], counts=(1,))
    (mask,) = records.series[0].masks
    bare = sweep(names=["attention"], counts=(1,), tasks=TASKS[:1]).points[mask]
    head, _, _, row = rows(Findings(records.model_copy(update={"points": {**records.points, mask: bare}}), []))
    assert dict(zip(head, row, strict=True))["gsm8k exact_match, %"] == "–"


def test_healed_points_are_rows_after_those_that_they_come_from():
    records = sweep(names=["attention"], counts=(2, 4))
    evaluation = healed(records, 4)
    found = rows(Findings(records, [], [evaluation]))
    assert [row[0] for row in found[2:]] == [
        "attention <span class='muted'>(attention sublayers, by importance)</span>",
        "2",
        "4",
        "attention, healed <span class='muted'>(attention sublayers, by importance, healed)</span>",
        "4",
    ]
    assert found[-1][1].startswith(f"{evaluation.quality.perplexity.value:.2f} ±")
