"""The orders in which sublayers or blocks may be dropped."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llmdrop_vllm.selection.candidates import Unit


class Order(Protocol):
    """A way to sort units, the first to go first; it may leave some out."""

    def arrange(self, units: Sequence[Unit], num_hidden_layers: int) -> list[Unit]:
        """The units in the order of dropping."""


@dataclass(frozen=True)
class LeastImportant:
    """Most similar first (arXiv 2406.15786). Of equals attention goes before MLP, then the lower layer."""

    def __str__(self) -> str:
        return "by importance"

    def arrange(self, units: Sequence[Unit], num_hidden_layers: int) -> list[Unit]:
        """Sorting is stable, as the reference's is on a CPU."""
        return sorted(units, key=lambda unit: -unit.similarity)


@dataclass(frozen=True)
class MostImportant:
    """The exact reverse of LeastImportant: the paper's control, not a way to make a useful model."""

    def __str__(self) -> str:
        return "by importance, reversed"

    def arrange(self, units: Sequence[Unit], num_hidden_layers: int) -> list[Unit]:
        """Least similar first."""
        return LeastImportant().arrange(units, num_hidden_layers)[::-1]


@dataclass(frozen=True)
class Deepest:
    """By position, the deepest first; `keep_last_layer` spares the very last one (arXiv 2407.15516)."""

    keep_last_layer: bool = False

    def __str__(self) -> str:
        return "from the last but one" if self.keep_last_layer else "from the last"

    def arrange(self, units: Sequence[Unit], num_hidden_layers: int) -> list[Unit]:
        """A layer's MLP, which comes after its attention, goes first."""
        spared = num_hidden_layers - 1 if self.keep_last_layer else None
        below = [unit for unit in units if unit.layer != spared]
        return sorted(below, key=lambda unit: (-unit.layer, unit.attention))


@dataclass(frozen=True)
class Random:
    """A control. The seed gives each sublayer its place, whatever else may go."""

    seed: int = 0

    def __str__(self) -> str:
        return f"at random, seed {self.seed}"

    def arrange(self, units: Sequence[Unit], num_hidden_layers: int) -> list[Unit]:
        """Seeded per unit: attention and MLP of one layer are drawn independently."""
        return sorted(units, key=lambda u: random.Random(f"{self.seed} {u.layer} {u.attention} {u.mlp}").random())
