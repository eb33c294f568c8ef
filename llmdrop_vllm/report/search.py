"""The picture of a search: what every mask that it judged does to the answers."""

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.report.findings import Findings, sizes
from llmdrop_vllm.report.style import GREY, LOOKS, NothingToShow, legend, panels, scale


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
    axes.plot([*by_cosine], [*by_cosine.values()], label="by cosine", **LOOKS[0].line)
    axes.plot(*zip(*best, strict=True), label="best of the search", **LOOKS[1].line)
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
