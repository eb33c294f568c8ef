"""What a healing run does in which order: each kept layer with the depth at which it must meet the full model."""

from dataclasses import dataclass
from itertools import pairwise

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


def units(teacher: DropMask, student: DropMask) -> tuple[Unit, ...]:
    """In order. What is gone before the first layer that is kept is that one's to make up for."""
    gone = {*student.attention} & {*student.mlp}
    kept = [layer for layer in range(student.num_hidden_layers) if layer not in gone]
    found: list[Unit] = []
    for layer, behind in pairwise([*kept, student.num_hidden_layers]):
        lost = (
            f"{kind} {each}"
            for each in range(layer if found else 0, behind)
            for kind in ("attention", "mlp")
            if each in getattr(student, kind) and each not in getattr(teacher, kind)
        )
        found.append(Unit(layer, behind - 1, tuple(lost), "attention" if layer in student.mlp else "mlp"))
    return tuple(found)
