"""The file of a mask: which sublayers go, how that was chosen, and by what evidence."""

from dataclasses import asdict
from typing import Literal, Self

from pydantic import model_validator

from llmdrop_vllm.artifacts import Provenance, Record
from llmdrop_vllm.masks.mask import DropMask


class Compared(Record):
    """A mask that a search compared: KL to the full model, in nats per token, on the answers that masks were chosen by
    and on held-out ones. Intervals are 95%, by bootstrap over prompts; `difference` is to the first mask compared.
    `windows` are the layers that were given one.
    """

    name: str
    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    windows: tuple[int, ...] = ()
    kl: float
    held_out_kl: float
    held_out_interval: tuple[float, float]
    difference: tuple[float, float]


class Finalist(Record):
    """A mask that tasks were tried under, and by task its score, between 0 and 1."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    scores: dict[str, float]

    @property
    def dropped(self) -> tuple[frozenset[int], frozenset[int]]:
        """As a mask tells it."""
        return frozenset(self.attention), frozenset(self.mlp)

    @property
    def mean(self) -> float:
        """Of the tasks."""
        return sum(self.scores.values()) / len(self.scores)


class Evidence(Record):
    """Why a search took its mask: of all that it `judged` a few were `compared`, and this loses least on held-out
    answers.

    Its interval is a little too good: the best of several was taken, and an evolution looks at these answers to end.
    With `heal_aware`, KL is of weights that were healed under the mask. Where tasks decided, it was between these
    `finalists`, the best by KL on the answers that masks were chosen by; the first of them is the full model.
    """

    judged: int
    tokens: int
    held_out_prompts: int
    held_out_tokens: int
    heal_aware: bool
    compared: tuple[Compared, ...]
    finalists: tuple[Finalist, ...] = ()


class MaskFile(Record):
    """What `llmdrop select` and `llmdrop search` write: a mask, how it was chosen and where that comes from."""

    num_hidden_layers: int
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    windows: tuple[tuple[int, int], ...] = ()
    kind: Literal["llmdrop-mask"] = "llmdrop-mask"
    method: str
    provenance: Provenance | None = None
    evidence: Evidence | None = None

    @classmethod
    def of(
        cls, mask: DropMask, method: str, provenance: Provenance | None = None, evidence: Evidence | None = None
    ) -> Self:
        """The file's content for a mask."""
        return cls(**asdict(mask), method=method, provenance=provenance, evidence=evidence)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.mask  # noqa: B018 - reading it checks it
        return self

    @property
    def mask(self) -> DropMask:
        """The value. Raises MaskError for indices that the depth does not allow."""
        return DropMask(self.num_hidden_layers, self.attention, self.mlp, self.windows)
