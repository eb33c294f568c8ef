"""What may still be dropped, and what would be left."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from llmdrop_vllm.artifacts import Scores
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.kv_cache.kinds import LayerKind, readers
from llmdrop_vllm.kv_cache.layout import KVLayout, kv_layout
from llmdrop_vllm.masks.dialects import is_int
from llmdrop_vllm.masks.mask import DropMask, ranges

Kind = Literal["attention", "mlp", "blocks", "joint"]
Mixers = Literal["all", "attention", "recurrent"]
NOUNS = {
    "attention": "attention sublayers",
    "mlp": "MLP sublayers",
    "blocks": "blocks",
    "joint": "sublayers",
    "consecutive": "blocks in a row",
}


@dataclass(frozen=True)
class Unit:
    """What goes together: an attention sublayer, an MLP sublayer, or what a block still has of both."""

    layer: int
    attention: bool
    mlp: bool
    similarity: float

    @property
    def importance(self) -> float:
        """1 - cosine similarity (arXiv 2406.15786)."""
        return 1 - self.similarity


@dataclass(frozen=True)
class Candidates:
    """What a method picks from: the scores, the mask so far, and the layers that must stay as they are; of hybrids,
    whether all that mixes tokens may go, or only attention, or only recurrent mixers. `notes` tell of what went.
    """

    scores: Scores
    mask: DropMask
    protect: frozenset[int] = frozenset()
    mixers: Mixers = "all"
    notes: tuple[str, ...] = ()

    def units(self, kind: Kind) -> list[Unit]:
        """All that may go, attention before MLP, each in layer order."""
        similarity = self.scores.similarity
        others = {layer for layer, its in enumerate(self.scores.kinds) if self.mixers not in ("all", *its.mixers)}
        attention = self._but(similarity.attention, others.union(self.mask.attention, self.donors))
        mlp = self._but(similarity.mlp, {*self.mask.mlp})
        if kind == "blocks":
            return [
                Unit(layer, layer in attention, layer in mlp, similarity.block[layer])
                for layer in sorted((attention.keys() | mlp.keys()) - self.donors)
            ]
        attentions = [Unit(layer, True, False, value) for layer, value in attention.items() if kind != "mlp"]
        return [*attentions, *(Unit(layer, False, True, value) for layer, value in mlp.items() if kind != "attention")]

    @property
    def donors(self) -> frozenset[int]:
        """Layers whose keys and values others read, which their attention must stay for."""
        return frozenset(readers(self.scores.kinds, self.mask.kept_attention))

    def _but(self, similarities: Sequence[float | None], layers: set[int]) -> dict[int, float]:
        """By layer, those of sublayers that may go: in none of these layers, and in no protected one."""
        out = layers | self.protect
        return {layer: value for layer, value in enumerate(similarities) if value is not None and layer not in out}

    def without(self, units: Sequence[Unit], *notes: str) -> Self:
        """What is left after these went, in this order."""
        attention = (*self.mask.attention, *(unit.layer for unit in units if unit.attention))
        mlp = (*self.mask.mlp, *(unit.layer for unit in units if unit.mlp))
        return replace(self, mask=replace(self.mask, attention=attention, mlp=mlp), notes=(*self.notes, *notes))

    def take(self, units: Iterable[Unit], count: int) -> list[Unit]:
        """The first `count` units, passing over one that would take the last attention sublayer: vLLM needs one."""
        taken: list[Unit] = []
        left = {layer for layer in self.mask.kept_attention if self.scores.kinds[layer].values}
        for unit in units:
            if not unit.attention or left != {unit.layer}:
                taken.append(unit)
                left -= {unit.layer} if unit.attention else set()
        return taken[:count]

    def available(self, units: Sequence[Unit]) -> int:
        """How many of these can go, in whatever order."""
        return len(self.take(units, len(units)))

    @property
    def kinds(self) -> list[LayerKind]:
        """What each attention sublayer that stays keeps in the KV cache, in layer order."""
        return [self.scores.kinds[layer] for layer in self.mask.kept_attention]

    @property
    def kv_layout(self) -> KVLayout:
        """How vLLM stores the KV cache of what stays."""
        return kv_layout(self.kinds)

    def check_count(self, key: str, count: object, available: int) -> None:
        """Raise MaskError unless so many can be dropped."""
        if not is_int(count) or not 1 <= count <= available:
            expected = f"expected 1 to {available}" if available else "but there is nothing to drop"
            raise MaskError(f"{key} is {count!r}; {expected}: {self.limits(key, available)}")

    def limits(self, key: str, available: int) -> str:
        """How many can be dropped and why: `31 attention sublayers can be dropped (32 layers; one attention stays)`."""
        already = self.mask.summary() if self.mask else f"{self.mask.num_hidden_layers} layers"
        protected = f"; protected: {', '.join(map(str, sorted(self.protect)))}" if self.protect else ""
        protected += f"; read by other layers: {ranges(self.donors)}" if self.donors else ""
        return f"{available} {NOUNS[key]} can be dropped ({already}{protected}; vLLM needs one attention sublayer)"
