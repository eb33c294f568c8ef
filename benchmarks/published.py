"""Speedups that arXiv 2406.15786v6 prints: 2048 prompt and 2048 generated tokens, Transformers, 48 GB GPU, fp16."""

from benchmarks.shapes import Kind

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


def table(shape: str, num_layers: int) -> list[tuple[Kind, int, float | None]]:
    """(kind, number of dropped sublayers, published speedup if any) for a shape at its own depth, or another."""
    rows: list[tuple[Kind, int, float | None]] = []
    for kind, shares in OTHERWISE.items():
        counts = dict.fromkeys(max(1, round(share * num_layers)) for share in shares)
        rows += [(kind, count, None) for count in counts if count < num_layers]
    published = SPEEDUPS.get(shape)
    if published is None:
        return rows
    return [(kind, count, speedup) for kind, row in published.items() for count, speedup in row.items()]
