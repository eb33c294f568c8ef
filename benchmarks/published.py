"""Speedups that arXiv 2406.15786v6 prints: 2048 prompt and 2048 generated tokens, Transformers, 48 GB GPU, fp16."""

from collections.abc import Mapping

from benchmarks.shapes import SHAPES, Kind, Shape

SPEEDUPS: dict[str, dict[Kind, dict[int, float]]] = {
    "llama-2-13b": {
        "attention": {4: 1.05, 8: 1.13, 12: 1.20, 16: 1.29, 20: 1.40},
        "mlp": {4: 1.04, 8: 1.08},
        "block": {4: 1.11, 8: 1.24},
    },
    "mistral-7b": {
        "attention": {4: 1.10, 8: 1.23, 12: 1.40},
        "mlp": {4: 1.03, 8: 1.06},
        "block": {4: 1.14, 8: 1.32},
    },
    "llama-3-8b": {"attention": {4: 1.07, 8: 1.16, 12: 1.26, 16: 1.38, 20: 1.52}},
    "llama-2-70b": {
        "attention": {4: 1.06, 8: 1.12, 16: 1.21, 32: 1.35, 40: 1.48, 48: 1.62},
        "mlp": {4: 1.04, 8: 1.05, 16: 1.08, 32: 1.17},
        "block": {4: 1.07, 8: 1.14, 16: 1.30, 32: 1.67},
    },
    "llama-3-70b": {"attention": {4: 1.04, 8: 1.10, 16: 1.17, 32: 1.35, 40: 1.43, 48: 1.55}},
}
# What `--table paper` drops where the paper has no row.
OTHERWISE: dict[Kind, tuple[float, ...]] = {
    "attention": (1 / 8, 1 / 4, 1 / 2, 3 / 4),
    "mlp": (1 / 4,),
    "block": (1 / 4,),
}


def speedups(shape: Shape) -> Mapping[Kind, Mapping[int, float]]:
    """Kind and number of dropped sublayers to speedup; nothing for a model at another depth than its own."""
    found = SPEEDUPS.get(shape.name, {})
    return found if found and shape.num_layers == SHAPES[shape.name].num_layers else {}


def table(shape: Shape) -> list[tuple[Kind, int]]:
    """(kind, number of dropped sublayers) of every published speedup, or else of shares that fit the shape."""
    if published := speedups(shape):
        return [(kind, count) for kind, row in published.items() for count in row]
    layers = shape.num_layers
    counts = {kind: [max(1, round(share * layers)) for share in shares] for kind, shares in OTHERWISE.items()}
    return [(kind, count) for kind, each in counts.items() for count in dict.fromkeys(each) if count < layers]
