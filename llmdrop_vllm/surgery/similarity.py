"""Running sums of what one layer does to the residual stream; nothing but a few numbers is kept."""

from dataclasses import dataclass, field

import torch

SUMS = ("attention", "mlp", "block", "attention_ratio", "mlp_ratio", "pair_x", "pair_y", "pair_z")
# float32 tiles that stay in a CPU core's cache while they are read several times; a GPU wants few and large ones.
TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}


@dataclass
class ResidualSums:
    """Sums over tokens, of x (the layer's input), y (after attention) and z (after the MLP).

    Each cosine is computed in float32, as in arXiv 2406.15786; sums are Python floats (float64). `pair_cosine_*` are
    sums over sequences of the mean cosine between two different tokens: (|sum of unit vectors|^2 - n) / (n (n - 1)).
    """

    tokens: int = 0
    sequences: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))

    def add(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
        """Add sequences, each tensor [batch, tokens, hidden] in the model's dtype."""
        for sequence in zip(x, y, z, strict=True):
            self._add_sequence(*sequence)

    def means(self) -> dict[str, float]:
        """Means over tokens, or over sequences for the pairs of tokens."""
        counts = {name: self.sequences if name.startswith("pair") else self.tokens for name in SUMS}
        return {name: self.sums[name] / counts[name] for name in SUMS}

    def _add_sequence(self, *streams: torch.Tensor) -> None:
        tokens, hidden = streams[0].shape
        step = max(1, TILE_ELEMENTS[streams[0].device.type] // hidden)
        units = torch.zeros(3, hidden, device=streams[0].device)
        totals = torch.zeros(5, dtype=torch.float64, device=streams[0].device)
        for start in range(0, tokens, step):
            tile = torch.stack([stream[start : start + step].float() for stream in streams], dim=1)
            # All norms and dot products of x, y and z at once: [tokens, 3, 3].
            gram = tile @ tile.transpose(1, 2)
            squares = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-24)
            (xx, yy, zz), (xy, yz, xz) = squares.unbind(1), (gram[:, 0, 1], gram[:, 1, 2], gram[:, 0, 2])
            added = (xx + yy - 2 * xy, yy + zz - 2 * yz)  # |y - x|^2 and |z - y|^2
            per_token = (
                *(xy / (xx * yy).sqrt(), yz / (yy * zz).sqrt(), xz / (xx * zz).sqrt()),
                *((added[0] / xx).clamp_min(0).sqrt(), (added[1] / yy).clamp_min(0).sqrt()),
            )
            totals += torch.stack(per_token).double().sum(1)
            for row, lengths in enumerate(squares.rsqrt().unbind(1)):
                units[row] += lengths @ tile[:, row]
        pairs = (units.square().sum(-1).double() - tokens) / (tokens * (tokens - 1))
        for name, value in zip(SUMS, torch.cat([totals, pairs]).tolist(), strict=True):
            self.sums[name] += value
        self.tokens += tokens
        self.sequences += 1
