"""What a search is asked for, checked before anything slow."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import torch

from llmdrop_vllm.artifacts import Provenance, Scores
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import DataError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.scoring.scoring import precision
from llmdrop_vllm.search.space import KINDS, Space
from llmdrop_vllm.search.states import StateSpace
from llmdrop_vllm.search.trials import SearchHeader
from llmdrop_vllm.selection.candidates import Candidates
from llmdrop_vllm.selection.orders import LeastImportant
from llmdrop_vllm.selection.selection import Ranked


@dataclass(frozen=True)
class SearchOptions:
    """`most` masks are judged at most, in at most `seconds`; `beam` masks are kept by the greedy way at each step, and
    the other one begins with `extra` sublayers more than are to go. Raises DataError for what cannot be.
    """

    most: int = 400
    seconds: float = inf
    beam: int = 1
    extra: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"masks to judge": self.most, "masks kept at each step": self.beam, "seconds": self.seconds}
        for name, value in least.items():
            if not value >= 1:
                raise DataError(f"{name}: {value:g} asked; expected 1 or more")


@dataclass(frozen=True)
class SearchPlan:
    """`by_cosine` is the mask that scores choose, `ranking` what they would drop first. Masks are chosen by `answers`,
    and `held_out` decides. With `to_heal`, what was lost is healed on that in closed form after each greedy step.

    `mixes` are other spaces that are as good an answer to what was asked, each with its mask by cosine.
    """

    checkpoint: Checkpoint
    space: Space
    by_cosine: DropMask
    ranking: tuple[tuple[str, int], ...]
    answers: Calibration
    held_out: Calibration
    to_heal: Calibration | None
    options: SearchOptions
    device: torch.device
    dtype: torch.dtype
    mixes: tuple[tuple[Space, DropMask], ...] = ()

    @property
    def dtype_name(self) -> str:
        """As options have it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def header(self) -> SearchHeader:
        """What a file of trials must have been made with for this search to go on in it."""
        return SearchHeader(
            answers=self.answers.identity,
            tokens=self.answers.predicted,
            held_out=self.held_out.identity,
            to_heal=None if self.to_heal is None else self.to_heal.identity,
            start=self.checkpoint.mask,
            provenance=Provenance.of(self.checkpoint, dtype=self.dtype, device=self.device),
        )

    @property
    def states(self) -> StateSpace | None:
        """The space, where windows are looked for too."""
        return self.space if isinstance(self.space, StateSpace) else None

    @property
    def first_by_cosine(self) -> list[DropMask]:
        """With one attention gone, two and so on; then with MLPs; the last is its whole mask."""
        whole, start = self.by_cosine, self.space.start
        if self.states is not None:  # the others take long, and nobody asked for them
            return [whole]
        found = [
            replace(whole, attention=whole.attention[:count], mlp=start.mlp)
            for count in range(len(start.attention) + 1, len(whole.attention) + 1)
        ]
        return [*found, *(replace(whole, mlp=whole.mlp[:n]) for n in range(len(start.mlp) + 1, len(whole.mlp) + 1))]

    @property
    def next_by_cosine(self) -> DropMask:
        """With `extra` sublayers of each kind more than are to go."""
        first = [(kind, layer) for kind in KINDS for layer in getattr(self.by_cosine, kind)]
        return self.space.more([*first, *self.ranking], self.options.extra)


def plan_search(
    scores: Scores,
    checkpoint: Checkpoint,
    spaces: Sequence[Space],
    answers: Calibration,
    held_out: Calibration,
    options: SearchOptions,
    *,
    to_heal: Calibration | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> SearchPlan:
    """With the masks that scores of the same weights give; what is looked for may lie in any of the spaces.

    Raises MaskError where too few sublayers may go, InputError for a device or dtype that is not there.
    """
    candidates = Candidates(scores, spaces[0].start, spaces[0].protect)
    units = LeastImportant().arrange(candidates.units("joint"), scores.num_hidden_layers)
    ranking = tuple(("attention" if unit.attention else "mlp", unit.layer) for unit in units)
    where, what = precision(checkpoint, device, dtype)
    spaces = [replace(each, donors=candidates.donors) for each in spaces]
    (space, by_cosine), *mixes = [with_cosine(each, candidates, checkpoint) for each in spaces]
    return SearchPlan(
        checkpoint, space, by_cosine, ranking, answers, held_out, to_heal, options, where, what, tuple(mixes)
    )


def with_cosine(space: Space, candidates: Candidates, checkpoint: Checkpoint) -> tuple[Space, DropMask]:
    """And cosine's mask in it. Where layers store unlike keys and values none must store more than that one, which is
    ranked with an eye on padding.
    """
    for kind in KINDS:
        if count := getattr(space, kind):
            candidates = Ranked(kind, count).pick(candidates)
    by_cosine, asked = candidates.mask, space.meets
    if len({*candidates.scores.kinds}) == 1 or isinstance(space, StateSpace):  # whose goal sees it
        return space, by_cosine
    most = checkpoint.under(by_cosine).layout.token_values

    def meets(mask: DropMask) -> bool:
        return asked(mask) and checkpoint.under(mask).layout.token_values <= most

    return replace(space, meets=meets), by_cosine
