"""The picture of a search: what every mask that it judged does to the answers."""

from matplotlib.figure import Figure

from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.style import GREY, LOOKS, NothingToShow, legend, panels, scale

Points = list[tuple[int, float]]


def search(findings: Findings) -> tuple[Figure, str]:
    """KL on the answers by number gone: all masks, the best of each number, and cosine's."""
    if findings.searched is None:
        raise NothingToShow("no search was given (--search)")
    if not findings.searched.masks:
        raise NothingToShow("the search has judged no mask on all its answers yet")
    depth, masks = findings.depth, findings.searched.masks
    if any({*mask.windows} - {*findings.searched.header.start.windows} for mask, _ in masks):
        raise NothingToShow("the search was for windows too, and its masks are drawn by what is gone alone")
    judged = [(_gone(mask), kl) for mask, kl in masks]
    title = "What a search found among the masks that it judged"
    figure, (axes,) = panels(title, findings.model, 1, 1, (9.0, 5.0))
    numbers, losses = zip(*judged, strict=True)
    axes.plot(numbers, losses, ".", color=GREY, alpha=0.5, label=f"{len(judged)} masks")
    by_number = {n: [kl for count, kl in judged if count == n] for n in sorted({*numbers})}
    # Of some numbers there is cosine's mask alone, which no search has found.
    best = [(n, min(found)) for n, found in by_number.items() if len(found) > 1] or [(numbers[-1], losses[-1])]
    by_cosine = _prefixes([mask for mask, _ in masks], dict(masks))
    axes.plot(*zip(*by_cosine, strict=True), label="by cosine", **LOOKS[0].line)
    axes.plot(*zip(*best, strict=True), label="best of the search", **LOOKS[1].line)
    axes.set(xlabel=f"sublayers gone, of {2 * depth}", ylabel="KL to the full model on its answers, nats per token")
    scale(axes, losses)
    legend(figure)
    (n, least), cosine = best[-1], dict(by_cosine)
    beside = f", by cosine {cosine[n]:.3f}" if n in cosine else ""
    return figure, f"{title}. {len(judged)} masks; the best without {n} sublayers has a KL of {least:.3f}{beside}."


def _gone(mask: DropMask) -> int:
    return len(mask.attention) + len(mask.mlp)


def _prefixes(masks: list[DropMask], kl: dict[DropMask, float]) -> Points:
    """A search judges cosine's masks first: each has one sublayer more than the one before, in its order."""
    found: Points = []
    for before, mask in zip([None, *masks], masks, strict=False):
        extends = before is None or (
            mask.attention[: len(before.attention)] == before.attention and mask.mlp[: len(before.mlp)] == before.mlp
        )
        if not extends or (before is not None and _gone(mask) != _gone(before) + 1):
            break
        found.append((_gone(mask), kl[mask]))
    return found
