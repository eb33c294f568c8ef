"""Masks that were judged, each once, and kept in a file, so that a search that is asked again takes the way it took."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from llmdrop_vllm.artifacts import DataIdentity, Record
from llmdrop_vllm.data.growing import Growing, Header, read_grown
from llmdrop_vllm.mask_file import Compared, Evidence, MaskFile
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.judge import Judge, Judging
from llmdrop_vllm.search.states import new_windows

RESAMPLES = 2000


class SearchHeader(Header):
    """What masks are judged by, whatever is searched for and with what seed. `tokens` are those of each answer."""

    kind: str = "llmdrop-search"
    answers: DataIdentity
    tokens: tuple[int, ...]
    held_out: DataIdentity
    to_heal: DataIdentity | None
    start: DropMask

    def differs_in(self, other: Self) -> str:
        """The same tokens are the same answers, wherever their file is."""
        its = ((name, getattr(self, name), getattr(other, name)) for name in ("answers", "held_out", "to_heal"))
        named = {name: ours.model_copy(update={"source": each.source}) for name, ours, each in its if ours and each}
        return Header.differs_in(self.model_copy(update=named), other)


class Trial(Record):
    """A mask that was judged: by sequence, the mean KL of its tokens that count to the full model's, in nats. `mended`:
    the mask whose loss had been healed before.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    windows: tuple[tuple[int, int], ...] = ()
    mended: DropMask | None = None
    held_out: bool = False
    kl: dict[int, float]

    @property
    def key(self) -> tuple[object, ...]:
        """Masks that drop the same in another order are one."""
        gone = frozenset(self.attention), frozenset(self.mlp)
        return self.held_out, self.mended and self.mended.dropped, *gone, self.windows


@dataclass(frozen=True)
class Loss:
    """A mask's KL by sequence and the tokens of each, [sequences]; the less its mean is, the less it is."""

    mask: DropMask
    kl: np.ndarray
    tokens: np.ndarray

    def __lt__(self, other: "Loss") -> bool:
        return self.mean < other.mean

    @property
    def mean(self) -> float:
        """Per token."""
        return float(self.kl @ self.tokens / self.tokens.sum())

    def interval(self, other: "Loss | None" = None) -> tuple[float, float]:
        """95% of the mean, or of its difference to another's on the same sequences, by bootstrap over these."""
        kl = self.kl if other is None else self.kl - other.kl
        rng = np.random.default_rng(0)
        drawn = rng.integers(len(kl), size=(RESAMPLES, len(kl)))
        means = (kl * self.tokens)[drawn].sum(1) / self.tokens[drawn].sum(1)
        low, high = np.quantile(means, (0.025, 0.975))
        return float(low), float(high)


@dataclass(frozen=True)
class Searched:
    """What a file of trials says of the masks that were judged on all answers: mask and KL, in nats per token."""

    header: SearchHeader
    masks: tuple[tuple[DropMask, float], ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises DataError naming the line that cannot be used."""
        header, trials = read_grown(path, SearchHeader, Trial, "llmdrop search")
        known: dict[tuple[object, ...], dict[int, float]] = {}
        masks = {}
        for each in trials:
            if not (each.held_out or each.mended):
                known.setdefault(each.key, {}).update(each.kl)
                masks[each.key] = replace(header.start, attention=each.attention, mlp=each.mlp, windows=each.windows)
        tokens = np.array(header.tokens)
        whole = ((masks[key], kl) for key, kl in known.items() if len(kl) == len(tokens))
        losses = (Loss(mask, np.array([kl[n] for n in range(len(tokens))]), tokens) for mask, kl in whole)
        return cls(header, tuple((each.mask, each.mean) for each in losses))


class EnoughError(Exception):
    """As many masks were judged, or as much time has passed, as a search was given."""


@dataclass
class Trials:
    """What two judges say, one of them on held-out answers; nothing that the file has is computed again.

    Raises EnoughError for another mask when `most` were judged, or one that is not in the file after `seconds`.
    """

    judge: Judge
    held_out: Judge
    file: Growing[Any, Trial]
    most: float = math.inf
    seconds: float = math.inf
    on_trial: Callable[[], object] = lambda: None
    mended: DropMask | None = None
    asked: set[tuple[object, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.seconds
        self.known: dict[tuple[object, ...], dict[int, float]] = {}
        for each in self.file.found:
            self.known.setdefault(each.key, {}).update(each.kl)

    def on_answers(self, mask: DropMask, every: int = 1, *, anyway: bool = False) -> Loss:
        """By the answers to learn from, or by one chunk of them in so many; `anyway`: though there were enough."""
        return self._loss(mask, every, held_out=False, anyway=anyway)

    def on_held_out(self, mask: DropMask) -> Loss:
        """By the answers that nothing is learnt from."""
        return self._loss(mask, 1, held_out=True, anyway=True)

    def _loss(self, mask: DropMask, every: int, *, held_out: bool, anyway: bool) -> Loss:
        judge = self.held_out if held_out else self.judge
        trial = Trial(
            attention=mask.attention, mlp=mask.mlp, windows=mask.windows, mended=self.mended, held_out=held_out, kl={}
        )
        chunks, kl = judge.batches.chunks, self.known.setdefault(trial.key, {})
        numbers = range(0, len(chunks), every)
        missing = [number for number in numbers if chunks[number].first_sequence not in kl]
        if not anyway and trial.key not in self.asked:
            if len(self.asked) == self.most or (missing and time.monotonic() > self.end):
                raise EnoughError
            self.asked.add(trial.key)
            self.on_trial()
        if missing:
            found = judge.divergences(mask, missing)
            kl.update(found)
            self.file.append([trial.model_copy(update={"kl": found})])
        sequences = [chunks[number].first_sequence + row for number in numbers for row in range(chunks[number].batch)]
        return Loss(mask, np.array([kl[each] for each in sequences]), judge.tokens[sequences])


def verdict(
    losses: Mapping[str, tuple[Loss, Loss]], judging: Judging, method: str, judged: int, *, heal_aware: bool = False
) -> MaskFile:
    """Of masks by name, each with its loss on the answers that it was chosen by and on those that were held out, the
    best by the latter. They are compared to the first.
    """
    answers, first = next(iter(losses.values()))
    compared = tuple(
        Compared(
            name=name,
            attention=its.mask.attention,
            mlp=its.mask.mlp,
            windows=new_windows(its.mask, judging.checkpoint.mask),
            kl=its.mean,
            held_out_kl=held_out.mean,
            held_out_interval=held_out.interval(),
            difference=held_out.interval(first),
        )
        for name, (its, held_out) in losses.items()
    )
    best = min(compared, key=lambda each: each.held_out_kl)
    evidence = Evidence(
        judged=judged,
        tokens=int(answers.tokens.sum()),
        held_out_prompts=len(first.tokens),
        held_out_tokens=int(first.tokens.sum()),
        heal_aware=heal_aware,
        compared=compared,
    )
    return MaskFile.of(losses[best.name][0].mask, f"{method}: {best.name}", judging.provenance, evidence)
