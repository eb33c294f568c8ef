"""What an owner wants of a mask, told by sizes alone: KV cache, requests in a memory, bytes that decoding reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.evaluation.inspection import IN_FLIGHT_TOKENS
from llmdrop_vllm.kv_cache.kinds import dtype_bytes
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.selection.candidates import Candidates, Kind
from llmdrop_vllm.selection.selection import Ranked


@dataclass(frozen=True)
class Wanted:
    """Met by masks whose `value` is `limit` at most, or at least where more is better; `text` says it of a value."""

    value: Callable[[DropMask], float]
    limit: float
    text: str
    more_is_better: bool = True

    def __call__(self, mask: DropMask) -> bool:
        """Whether a mask meets it."""
        found = self.value(mask)
        return found >= self.limit if self.more_is_better else found <= self.limit

    def unmet(self, masks: Sequence[DropMask]) -> MaskError:
        """The error that none of these masks meets it."""
        best = (max if self.more_is_better else min)(masks, key=self.value)
        return MaskError(f"at best {self.text.format(self.value(best))}, with {best.summary()}; ask for less")


@dataclass(frozen=True)
class Sizes:
    """A checkpoint's bytes under masks; requests have `context` tokens, keys and values vLLM's dtype."""

    checkpoint: Checkpoint
    context: int

    def kv_share(self, mask: DropMask) -> float:
        """Of KV cache for a token, padding included, in that of the checkpoint as it is."""
        whole, masked = (self.checkpoint.under(each).layout.token_values for each in (self.checkpoint.mask, mask))
        return float(masked / whole)

    def request_share(self, mask: DropMask) -> float:
        """Of KV cache for a request, once windows have passed what they do, in that of the checkpoint as it is."""
        return self.request_bytes(mask) / self.request_bytes(self.checkpoint.mask)

    def request_bytes(self, mask: DropMask, in_flight: int = IN_FLIGHT_TOKENS) -> int:
        """Of KV cache that vLLM keeps ready for a request, so many tokens of which are computed together."""
        value_bytes = dtype_bytes(self.checkpoint.kv_dtype)
        return self.checkpoint.under(mask).layout.request_bytes(self.context, in_flight, value_bytes)

    def requests(self, mask: DropMask, memory_bytes: int) -> float:
        """How many requests fit beside the weights."""
        free = max(0, memory_bytes - self.checkpoint.under(mask).weight_bytes)
        return free // self.request_bytes(mask)

    def step_bytes(self, mask: DropMask, requests: int) -> float:
        """What decoding reads for a token of each of so many requests: all weights, and their KV cache."""
        return self.checkpoint.under(mask).weight_bytes + requests * self.request_bytes(mask, in_flight=1)


def mixes(candidates: Candidates, goal: Wanted, stages: int = 1, mlps: int | None = None) -> list[DropMask]:
    """By importance, the masks that meet a goal with as few attentions as it takes: one without any MLP gone, then one
    for each number of MLPs that spares an attention; or that of so many `mlps`. At least `stages` attentions stay.

    Raises MaskError where no mask meets it.
    """
    found: list[DropMask] = []
    tried: list[DropMask] = []
    grows = len({*candidates.scores.kinds}) == 1  # what a drop saves; with padding one more can take more
    numbers = range(candidates.available(candidates.units("mlp")) + 1) if mlps is None else (mlps,)
    for number in numbers:
        begun = _picked(candidates, "mlp", number)
        most = min(begun.available(begun.units("attention")), max(0, len(begun.mask.kept_attention) - stages))
        if found:
            most = min(most, len(found[-1].attention) - len(candidates.mask.attention) - 1)
        if most < 0:
            break
        last = _picked(begun, "attention", most).mask
        if grows and not goal(last):
            tried.append(last)
            continue
        masks = [_picked(begun, "attention", count).mask for count in range(most + 1)]
        found += [*islice(filter(goal, masks), 1)]
        tried += masks
    if not found:
        raise goal.unmet(tried)
    return found


def _picked(candidates: Candidates, kind: Kind, count: int) -> Candidates:
    return Ranked(kind, count).pick(candidates) if count else candidates
