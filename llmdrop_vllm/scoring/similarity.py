"""Running sums of what one layer does to the residual stream; nothing but a few numbers is kept."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

COSINES = ("attention", "mlp", "block", "attention_ratio", "mlp_ratio")
PAIRS = ("attention_before", "attention_after", "mlp_before", "mlp_after")
# Which of a layer's streams lie before and after attention, MLP and block.
SEQUENTIAL = ((0, 1), (1, 2), (0, 2))
PARALLEL = ((0, 1), (0, 2), (0, 3))
# float32 tiles that stay in a CPU core's cache while they are read several times; a GPU wants few and large ones.
TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}


@dataclass
class ResidualSums:
    """Sums over tokens, of the residual stream at several points of a layer.

    Each cosine is computed in float32, as in arXiv 2406.15786; sums are Python floats (float64). Those named before and
    after are sums over sequences of the mean cosine between two different tokens: (|sum of unit vectors|^2 - n) /
    (n (n - 1)).
    """

    tokens: int = 0
    sequences: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COSINES + PAIRS, 0.0))

    def add(self, streams: Sequence[torch.Tensor], spans: Iterable[slice]) -> None:
        """Add sequences, each tensor [batch, tokens, hidden] in the model's dtype; `spans` are the tokens that count.

        The layer's input, the stream after attention, and the layer's output; of a layer whose attention and MLP run
        side by side its input, the input and what attention adds, the input and what the MLP adds, and its output.
        """
        for span, *sequence in zip(spans, *streams, strict=True):
            self._add_sequence(*(stream[span] for stream in sequence))

    def means(self) -> dict[str, float]:
        """Means over tokens, or over sequences for the pairs of tokens."""
        return {name: total / (self.sequences if name in PAIRS else self.tokens) for name, total in self.sums.items()}

    def _add_sequence(self, *streams: torch.Tensor) -> None:
        tokens, hidden = streams[0].shape
        steps = SEQUENTIAL if len(streams) == 3 else PARALLEL
        step = max(1, TILE_ELEMENTS[streams[0].device.type] // hidden)
        units = torch.zeros(len(streams), hidden, device=streams[0].device)
        totals = torch.zeros(len(COSINES), dtype=torch.float64, device=streams[0].device)
        for start in range(0, tokens, step):
            tile = torch.stack([stream[start : start + step].float() for stream in streams], dim=1)
            # All norms and dot products of the streams at once: [tokens, streams, streams].
            gram = tile @ tile.transpose(1, 2)
            squares = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-24)
            cosines = [gram[:, i, j] / (squares[:, i] * squares[:, j]).sqrt() for i, j in steps]
            # |y - x| / |x|
            ratios = [
                ((squares[:, i] + squares[:, j] - 2 * gram[:, i, j]) / squares[:, i]).clamp_min(0).sqrt()
                for i, j in steps[:2]
            ]
            totals += torch.stack([*cosines, *ratios]).double().sum(1)
            for row, lengths in enumerate(squares.rsqrt().unbind(1)):
                units[row] += lengths @ tile[:, row]
        pairs = (units.square().sum(-1).double() - tokens) / max(1, tokens * (tokens - 1))
        ends = [end for step in steps[:2] for end in step]
        for name, value in zip(COSINES + PAIRS, torch.cat([totals, pairs[ends]]).tolist(), strict=True):
            self.sums[name] += value
        self.tokens += tokens
        self.sequences += 1
