"""What `llmdrop` shows: tables and lines for people."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from llmdrop_vllm.artifacts import Scores
from llmdrop_vllm.surgery.selection import Selection

if TYPE_CHECKING:
    from llmdrop_vllm.surgery.inspection import Inspection


def show_inspection(found: "Inspection") -> None:
    """What a mask saves."""
    weights = "gone" if found.stripped else "in the files" if found.mask.mask else "none"
    print(f"{found.model}: {found.architecture}, {found.summary}; dropped weights: {weights}; {found.kv_layout}")
    table = Table("", "full", "dropped", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in found.rows():
        table.add_row(*row)
    Console().print(table)


def show_scores(scores: Scores) -> None:
    """One row per layer."""
    table = Table(title="importance (1 - cosine similarity); x: dropped already")
    for column in ("layer", "attention", "MLP", "block", "attn out/in", "attn focus", "token cos"):
        table.add_column(column, justify="right")
    similarity, attention = scores.similarity, scores.diagnostics.attention
    rows = zip(similarity.attention, similarity.mlp, similarity.block, strict=True)
    for layer, values in enumerate(rows):
        importance = ["x" if value is None else f"{1 - value:.4f}" for value in values]
        extra = (attention.magnitude_ratio, attention.concentration, attention.token_cosine_after)
        shown = ["x" if column[layer] is None else f"{column[layer]:.3f}" for column in extra]
        table.add_row(str(layer), *importance, *shown)
    Console().print(table)


def show_selection(chosen: Selection) -> None:
    """The mask, how it was chosen and what its user should know."""
    print(f"{chosen.method}: {chosen.mask.summary()}")
    print(f"rank order: attention {list(chosen.mask.attention)}, MLP {list(chosen.mask.mlp)}")
    for note in chosen.notes:
        print(f"note: {note}")
