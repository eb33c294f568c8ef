"""What a healing run does in which order: each kept layer with the depth at which it must meet the full model."""

from dataclasses import dataclass
from itertools import pairwise

from llmdrop_vllm.architectures.family import Family
from llmdrop_vllm.masks.mask import DropMask


@dataclass(frozen=True)
class Unit:
    """A layer of which something is kept, and the layers behind it, up to `target`, of which nothing is.

    `lost` are sublayers gone since the layer before, such as "attention 7"; `mends` is whose projection is refitted.
    """

    layer: int
    target: int
    lost: tuple[str, ...]
    mends: str


def units(family: Family, teacher: DropMask, student: DropMask) -> tuple[Unit, ...]:
    """In order. What is gone before the first layer that is kept is that one's to make up for."""
    attention, mlp = family.absent(student)
    had = zip(("attention", "mlp"), (attention, mlp), family.absent(teacher), strict=True)
    lost = {kind: gone - before for kind, gone, before in had}
    kept = [layer for layer in range(student.num_hidden_layers) if layer not in attention & mlp]
    found: list[Unit] = []
    for layer, behind in pairwise([*kept, student.num_hidden_layers]):
        layers = range(layer if found else 0, behind)
        names = tuple(f"{kind} {each}" for each in layers for kind, gone in lost.items() if each in gone)
        found.append(Unit(layer, behind - 1, names, "attention" if layer in mlp else "mlp"))
    return tuple(found)
