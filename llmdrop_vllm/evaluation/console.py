"""What the evaluation commands show: tables and lines for people."""

from rich.console import Console
from rich.table import Table

from llmdrop_vllm.evaluation.recommend import TASK_KINDS, Choice, Goal
from llmdrop_vllm.evaluation.records import Evaluation, Quality, Sweep


def show_evaluation(found: Evaluation) -> None:
    """One line per measure."""
    print(found.quality.mask.mask.summary())
    table = Table("", "value", "standard error", "chance", "over")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in _rows(found.quality):
        table.add_row(*row)
    Console().print(table)


def show_sweep(found: Sweep) -> None:
    """One row per point, series by series."""
    # Short names: all of it fits 80 columns.
    table = Table(title="n dropped; mean scores of tasks; speed and KV cache: full model = 1")
    for name in ("series", "n", "perplexity", "agree", "choice", "generation", "speed", "KV"):
        table.add_column(name, justify="left" if name == "series" else "right")
    for series in found.series:
        for number, point in found.of(series):
            quality, speedup = point.quality, found.speedup(point)
            table.add_row(
                series.name,
                str(number),
                f"{quality.perplexity.value:.2f}",
                f"{quality.divergence.agreement.value:.1%}" if quality.divergence else "-",
                *(_score(quality.task_average(kind)) for kind in TASK_KINDS),
                f"{speedup:.2f}x" if speedup else "-",
                f"{point.kv_share:.0%}",
                end_section=number == series.counts[-1],
            )
    Console().print(table)


def show_choice(found: Sweep, choice: Choice, goal: Goal, *, meets: bool) -> None:
    """The mask, what it brings and what was given up for it."""
    full = found.full.quality
    quality = choice.point.quality
    print(f"{'recommended' if meets else 'nearest'} for {goal}: {quality.mask.mask.summary()}")
    table = Table("", "full", "dropped", "loss")
    for column in table.columns[1:]:
        column.justify = "right"
    before = {row[0]: row[1] for row in _rows(full)}
    losses = choice.losses | {f"{kind}, mean": loss for kind, loss in choice.losses.items()}
    means = [(f"{kind}, mean", *(_score(each.task_average(kind)) for each in (full, quality))) for kind in TASK_KINDS]
    rows = [(name, before.get(name, "-"), value) for name, value, *_ in _rows(quality)]
    for name, whole, value in [*rows, *(row for row in means if row[0] in losses)]:
        table.add_row(name, whole, value, f"{losses[name]:+.1%}" if name in losses else "")
    table.add_row("KV cache", "100%", f"{choice.kv_share:.0%}", "")
    table.add_row("speed", "1.00x", f"{choice.speedup:.2f}x" if choice.speedup else "not measured", "")
    Console().print(table)
    if full.task_average("generation") is None:
        print("note: the sweep measured no generation task, and generation breaks first; give one with --tasks")


def _rows(quality: Quality) -> list[tuple[str, str, str, str, str]]:
    """Name, value, standard error, chance, over what."""
    perplexity, divergence = quality.perplexity, quality.divergence
    stderr = "-" if perplexity.stderr is None else f"{perplexity.stderr:.3f}"
    rows = [("perplexity", f"{perplexity.value:.3f}", stderr, "", f"{perplexity.tokens:,} tokens")]
    if divergence is not None:
        over = f"{divergence.tokens:,} tokens"
        rows.append(("agreement", _score(divergence.agreement.value), _score(divergence.agreement.stderr), "", over))
        kl = divergence.kl
        rows.append(("KL, nats", f"{kl.value:.4f}", "-" if kl.stderr is None else f"{kl.stderr:.4f}", "", over))
    for task in quality.tasks:
        chance = "" if task.chance is None else _score(task.chance)
        name = f"{task.task} ({task.metric}, {task.kind})"
        rows.append((name, _score(task.value), _score(task.stderr), chance, f"{task.samples:,} rows"))
    return rows


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
