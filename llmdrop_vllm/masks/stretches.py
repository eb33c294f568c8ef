"""What attention with a window of ours sees: the first stretch of a text, and the last few.

The first tokens stay in sight because attention leans on them: without them a window loses a third of its perplexity,
with them a hundredth (benchmarks/results/README.md, "Windows"). Stretches are whole blocks of any engine's KV cache, so
that what is out of sight can be freed, and what is seen depends on nothing but a token's place.
"""

STRETCH = 128  # tokens


def stretches_back(window: int) -> int:
    """How many stretches before its own a token looks back, so that it sees `window` tokens with itself at least."""
    return -(-(window - 1) // STRETCH)


def span(window: int) -> int:
    """Tokens that the last token of a stretch sees, with itself, beside the first stretch."""
    return STRETCH * (stretches_back(window) + 1)
