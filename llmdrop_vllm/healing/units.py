"""What a healing run does in which order: each kept layer with the depth at which it must meet the full model."""

from dataclasses import dataclass

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
    depth = student.num_hidden_layers
    attention, mlp = set(student.attention), set(student.mlp)
    kept = [layer for layer in range(depth) if not {layer} <= attention & mlp]
    found: list[Unit] = []
    for place, layer in enumerate(kept):
        target = (kept[place + 1] if place + 1 < len(kept) else depth) - 1
        first = layer if found else 0
        lost = [
            f"{name} {each}"
            for each in range(first, target + 1)
            for name, gone, before in (("attention", attention, teacher.attention), ("mlp", mlp, teacher.mlp))
            if each in gone and each not in before
        ]
        found.append(Unit(layer, target, tuple(lost), "attention" if layer in mlp else "mlp"))
    return tuple(found)
