"""Which masks a search may look at: how they begin, how they grow, and which of them are what was asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.dialects import check_indices
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.selection.candidates import Kind

KINDS: tuple[Kind, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class Space:
    """Masks that extend `start` by so many attention and MLP sublayers, none of them in a layer of `protect`, nor the
    attention of `donors`; when that many are gone, `meets` must accept the mask; `stages` attentions stay. Raises
    MaskError where too few may go.
    """

    start: DropMask
    attention: int = 0
    mlp: int = 0
    protect: frozenset[int] = frozenset()
    stages: int = 1  # of a pipeline: vLLM needs an attention in each
    meets: Callable[[DropMask], bool] = lambda _: True
    donors: frozenset[int] = frozenset()  # of keys and values that other layers read

    def __post_init__(self) -> None:
        depth = self.start.num_hidden_layers
        check_indices("protect", tuple(self.protect), depth)
        if not (self.attention or self.mlp):
            raise MaskError(
                "nothing is left to search; expected a number of attention or MLP sublayers, beside --fixed"
            )
        for kind in KINDS:
            asked, free = getattr(self, kind), len(self.free(self.start, kind))
            if kind == "attention":
                free = min(free, len(self.start.kept_attention) - self.stages)
            if free < 0:
                raise MaskError(f"{self.stages} pipeline stages need an attention each; {free + self.stages} are left")
            if not 0 <= asked <= free:
                already = self.start.summary() if self.start else f"{depth} layers"
                protected = f"; protected: {', '.join(map(str, sorted(self.protect)))}" if self.protect else ""
                staged = f"; pipeline stages: {self.stages}" if self.stages > 1 else ""
                raise MaskError(f"{asked} {kind} sublayers asked; {free} can go ({already}{protected}{staged})")

    def free(self, mask: DropMask, kind: str) -> list[int]:
        """Layers whose sublayer of a kind a mask leaves, and that may go."""
        gone = {*getattr(mask, kind), *self.protect, *(self.donors if kind == "attention" else ())}
        return [layer for layer in range(mask.num_hidden_layers) if layer not in gone]

    def added(self, mask: DropMask, kind: str) -> tuple[int, ...]:
        """Layers whose sublayer of a kind a mask that extends the start drops beside its."""
        gone: tuple[int, ...] = getattr(mask, kind)
        return gone[len(getattr(self.start, kind)) :]

    def is_whole(self, mask: DropMask) -> bool:
        """Whether as many are gone as are to go."""
        return all(len(self.added(mask, kind)) == getattr(self, kind) for kind in KINDS)

    def holds(self, mask: DropMask) -> bool:
        """Whether this is one of the masks that were asked for."""
        starts = all({*getattr(self.start, kind)} <= {*getattr(mask, kind)} for kind in KINDS)
        spared = self.protect.isdisjoint({*mask.attention, *mask.mlp} - {*self.start.attention, *self.start.mlp})
        return starts and spared and self.is_whole(mask) and self.meets(mask)

    def allows(self, mask: DropMask) -> bool:
        """On the way any mask is."""
        return not self.is_whole(mask) or self.meets(mask)

    def extended(self, mask: DropMask) -> Iterator[DropMask]:
        """By one sublayer, of a kind of which more is to go."""
        for kind in KINDS:
            if len(self.added(mask, kind)) < getattr(self, kind):
                masks = (self._with(mask, kind, (*getattr(mask, kind), layer)) for layer in self.free(mask, kind))
                yield from filter(self.allows, masks)

    def reduced(self, mask: DropMask) -> Iterator[DropMask]:
        """By one sublayer that the start has, of a kind of which too much is gone."""
        for kind in KINDS:
            start, added = getattr(self.start, kind), self.added(mask, kind)
            if len(added) > getattr(self, kind):
                lefts = ([each for each in added if each != layer] for layer in added)
                yield from filter(self.allows, (self._with(mask, kind, (*start, *left)) for left in lefts))

    def more(self, ranking: Sequence[tuple[str, int]], extra: int) -> DropMask:
        """The first of the ranking that may go, of each kind that is asked for so many more than are asked for."""
        mask = self.start
        for kind in KINDS:
            if asked := getattr(self, kind):
                left = self.free(mask, kind)
                free = [*dict.fromkeys(layer for other, layer in ranking if other == kind and layer in left)]
                room = len(mask.kept_attention) - self.stages if kind == "attention" else len(free)
                mask = self._with(mask, kind, (*getattr(mask, kind), *free[: min(asked + extra, room)]))
        return mask

    def _with(self, mask: DropMask, kind: str, layers: tuple[int, ...]) -> DropMask:
        """With these gone; what comes back has the window that it had."""
        gone = {"attention": mask.attention, "mlp": mask.mlp, kind: layers}
        return replace(self.start, attention=gone["attention"], mlp=gone["mlp"])

    def can_swap(self, mask: DropMask) -> bool:
        """Whether anything could go in another's place."""
        return any(getattr(self, kind) and self.free(mask, kind) for kind in KINDS)

    def swapped(self, mask: DropMask, rng: np.random.Generator) -> DropMask:
        """With one to three sublayers back and as many others of their kind gone, at random."""
        kinds = [kind for kind in KINDS if getattr(self, kind) and self.free(mask, kind)]
        for _ in range(int(rng.integers(1, 4, size=2).min())):
            kind = kinds[int(rng.integers(len(kinds)))]
            gone, kept = list(getattr(mask, kind)), len(getattr(self.start, kind))
            place = int(rng.integers(kept, len(gone)))
            gone[place] = int(rng.choice(self.free(mask, kind)))
            mask = self._with(mask, kind, tuple(gone))
        return mask
