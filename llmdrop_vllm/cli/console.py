"""What `llmdrop` shows: tables and lines for people."""

import sys
from collections.abc import Iterable, Sequence
from operator import eq
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from llmdrop_vllm.artifacts import Scores
from llmdrop_vllm.data.answers import Answer
from llmdrop_vllm.data.comparison import Comparison
from llmdrop_vllm.errors import command
from llmdrop_vllm.evaluation.recommend import TASK_KINDS, Choice, Goal
from llmdrop_vllm.evaluation.records import Evaluation, Perplexity, Point, Quality, Sweep
from llmdrop_vllm.mask_file import Compared, Finalist, MaskFile
from llmdrop_vllm.selection.selection import Selection

if TYPE_CHECKING:
    from llmdrop_vllm.evaluation.inspection import Inspection


def print_table(headings: Sequence[str], *sections: Iterable[Sequence[str]], title: str | None = None) -> None:
    """The first column at the left, the others, which are numbers, at the right; a line between sections of rows."""
    table = Table(headings[0], *(Column(name, justify="right") for name in headings[1:]), title=title)
    for rows in sections:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    Console().print(table)


def warn(text: str) -> None:
    """What a user should know before it matters."""
    print(f"llmdrop: warning: {text}", file=sys.stderr)


def show_next(written: object, *words: object) -> None:
    """What a command wrote, and the command of ours that takes it."""
    print(f"written to {written}; next: {command(*words)}")


def show_inspection(found: "Inspection") -> None:
    """What a mask saves."""
    weights = "gone" if found.stripped else "in the files" if any(found.mask.dropped) else "none"
    print(f"{found.model}: {found.architecture}, {found.summary}; dropped weights: {weights}; {found.kv_layout}")
    print_table(("", "full", "with the mask", "share"), found.rows())
    for note in found.notes:
        print(note)
    if found.healing is not None:
        print(f"healed: {found.healing.summary()}")


def show_scores(scores: Scores) -> None:
    """One row per layer."""
    headings = ("layer", "attention", "MLP", "block", "attn out/in", "attn focus", "token cos")
    similarity, attention = scores.similarity, scores.diagnostics.attention
    extra = (attention.magnitude_ratio, attention.concentration, attention.token_cosine_after)
    rows = []
    for layer, values in enumerate(zip(similarity.attention, similarity.mlp, similarity.block, strict=True)):
        importance = ["x" if value is None else f"{1 - value:.4f}" for value in values]
        shown = ["x" if column[layer] is None else f"{column[layer]:.3f}" for column in extra]
        rows.append((f"{layer:>5}", *importance, *shown))
    print_table(headings, rows, title=f"importance ({scores.importance}); x: dropped already")


def show_selection(chosen: Selection) -> None:
    """The mask, how it was chosen and what its user should know."""
    print(f"{chosen.method}: {chosen.mask.summary()}")
    print(f"rank order: attention {list(chosen.mask.attention)}, MLP {list(chosen.mask.mlp)}")
    for note in chosen.notes:
        print(f"note: {note}")


def show_search(found: MaskFile, on: str = "answers") -> None:
    """What was compared, and what was taken."""
    evidence = found.evidence
    assert evidence is not None, "a search gives evidence"
    print(
        f"{evidence.judged:,} masks judged on {evidence.tokens:,} tokens of {on}; compared on "
        f"{evidence.held_out_tokens:,} held-out tokens of {evidence.held_out_prompts:,} {on}:"
    )
    for each in evidence.compared:
        low, high = each.difference
        lost = f"KL {each.held_out_kl:.4f}, {low:+.4f} to {high:+.4f} of {evidence.compared[0].name}'s"
        print(f"  {each.name:34} {lost}; {_said(each)}")
    print(f"{found.method}: {found.mask.summary()}")


def show_finals(found: MaskFile) -> None:
    """What tasks say of the best."""
    evidence = found.evidence
    assert evidence is not None, "a search gives evidence"
    rows = [(_layers(each) or "nothing", *map(_score, each.scores.values())) for each in evidence.finalists]
    print_table(("without", *evidence.finalists[0].scores), rows)
    print(f"{found.method}: {found.mask.summary()}")


def _said(each: Compared) -> str:
    parts = {"without": _layers(each), "windows in": ",".join(map(str, each.windows))}
    return "; ".join(f"{word} {layers}" for word, layers in parts.items() if layers)


def _layers(each: Compared | Finalist) -> str:
    kinds = (("attention", each.attention), ("MLP", each.mlp))
    return ", ".join(f"{name} {','.join(map(str, sorted(layers)))}" for name, layers in kinds if layers)


def show_answers(found: Sequence[Answer], max_tokens: int) -> None:
    """How much there is to learn from, and to judge by."""
    tokens, cut = sum(len(each.answer) for each in found), sum(each.finish_reason == "length" for each in found)
    print(f"{len(found):,} answers, {tokens:,} tokens; {cut:,} cut at {max_tokens} tokens or the end of the context")
    held_out = [each for each in found if each.held_out]
    told = sum(len(each.answer) for each in held_out)
    print(f"held out for judging: {len(held_out):,} of the answers, {told:,} tokens")


def show_evaluation(found: Evaluation) -> None:
    """One line per measure."""
    print(found.quality.mask.summary())
    rows = _rows(found.quality)
    if found.full_perplexity is not None:
        rows.insert(1, _perplexity_row("of the full model", found.full_perplexity))
    print_table(("", "value", "standard error", "chance", "over"), rows)


def show_comparison(found: Comparison) -> None:
    """What each form takes, and how often it says what the full model says."""
    rows = []
    for form in found.forms:
        same = f"{sum(map(eq, form.answers, found.forms[0].answers))} of {len(form.answers)}"
        rows.append((form.name, f"{form.weight_bytes:,}", f"{form.kv_bytes_per_token:,}", same))
    print_table(("", "weights, bytes", f"KV bytes per token ({found.kv_dtype})", "answers as in full"), rows)


def show_sweep(found: Sweep) -> None:
    """One row per point, series by series."""

    def row(name: str, number: int, point: Point) -> tuple[str, ...]:
        quality, speedup = point.quality, found.speedup(point)
        return (
            name,
            str(number),
            f"{quality.perplexity.value:.2f}",
            _score(quality.divergence.agreement.value if quality.divergence else None),
            *(_score(quality.task_average(kind)) for kind in TASK_KINDS),
            f"{speedup:.2f}x" if speedup else "-",
            f"{point.kv_share:.0%}",
        )

    # Short names: all of it fits 80 columns.
    print_table(
        ("series", "n", "perplexity", "agree", "choice", "generation", "speed", "KV"),
        *([row(series.name, *step) for step in found.of(series)] for series in found.series),
        title="n dropped; mean scores of tasks; speed and KV cache: full model = 1",
    )


def show_choice(found: Sweep, choice: Choice, goal: Goal, *, meets: bool) -> None:
    """The mask, what it brings and what was given up for it."""
    full = found.full.quality
    quality = choice.point.quality
    print(f"{'recommended' if meets else 'nearest'} for {goal}: {quality.mask.summary()}")
    before = {name: value for name, value, *_ in _rows(full)}
    losses = {name: f"{loss:+.1%}" for name, loss in choice.losses.items()}
    rows = [[name, before.get(name, "-"), value, losses.get(name, "")] for name, value, *_ in _rows(quality)]
    for kind in TASK_KINDS:
        if kind in losses:
            means = (_score(each.task_average(kind)) for each in (full, quality))
            rows.append([f"{kind}, mean", *means, losses[kind]])
    rows.append(["KV cache", "100%", f"{choice.point.kv_share:.0%}", ""])
    rows.append(["speed", "1.00x", f"{choice.speedup:.2f}x" if choice.speedup else "not measured", ""])
    print_table(("", "full", "dropped", "loss"), rows)
    if full.task_average("generation") is None:
        print("note: the sweep measured no generation task, and generation breaks first; give one with --tasks")


def _perplexity_row(name: str, found: Perplexity) -> tuple[str, str, str, str, str]:
    return name, _score(found.value, ".3f"), _score(found.stderr, ".3f"), "", f"{found.tokens:,} tokens"


def _rows(quality: Quality) -> list[tuple[str, str, str, str, str]]:
    """Name, value, standard error, chance, over what."""
    rows = [_perplexity_row("perplexity", quality.perplexity)]
    if (divergence := quality.divergence) is not None:
        over = f"{divergence.tokens:,} tokens of {divergence.on}"
        agreement, kl = divergence.agreement, divergence.kl
        rows.append(("agreement", _score(agreement.value), _score(agreement.stderr), "", over))
        rows.append(("KL, nats", _score(kl.value, ".4f"), _score(kl.stderr, ".4f"), "", over))
    for task in quality.tasks:
        chance = "" if task.chance is None else _score(task.chance)
        name = f"{task.task} ({task.metric}, {task.kind}, {task.prompting})"
        rows.append((name, _score(task.value), _score(task.stderr), chance, f"{task.samples:,} rows"))
    return rows


def _score(value: float | None, form: str = ".1%") -> str:
    return "-" if value is None else f"{value:{form}}"
