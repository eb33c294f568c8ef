"""What an owner wants of a mask, told by sizes alone: KV cache, requests in a memory, bytes that decoding reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint, MaskedCheckpoint
from llmdrop_vllm.errors import InputError, MaskError
from llmdrop_vllm.evaluation.inspection import BLOCK_TOKENS, IN_FLIGHT_TOKENS, request_context
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
        whole, masked = (self._under(each).layout.token_values for each in (self.checkpoint.mask, mask))
        return float(masked / whole)

    def request_share(self, mask: DropMask) -> float:
        """Of KV cache for a request, once windows have passed what they do, in that of the checkpoint as it is."""
        return self.request_bytes(mask) / self.request_bytes(self.checkpoint.mask)

    def request_bytes(self, mask: DropMask) -> int:
        """Of KV cache that vLLM keeps ready for a request."""
        return self._request_bytes(self._under(mask), IN_FLIGHT_TOKENS)

    def requests(self, mask: DropMask, memory_bytes: int) -> float:
        """How many requests fit beside the weights."""
        masked = self._under(mask)
        free = max(0, memory_bytes - masked.weight_bytes)
        return free // self._request_bytes(masked, IN_FLIGHT_TOKENS)

    def step_bytes(self, mask: DropMask, requests: int) -> float:
        """What decoding reads for a token of each of so many requests: all weights, and their KV cache."""
        masked = self._under(mask)
        return masked.weight_bytes + requests * self._request_bytes(masked, 1)

    def _under(self, mask: DropMask) -> MaskedCheckpoint:
        return self.checkpoint.under(mask)

    def _request_bytes(self, masked: MaskedCheckpoint, in_flight: int) -> int:
        layout = masked.layout
        block_tokens = layout.block_tokens(BLOCK_TOKENS)
        blocks = layout.request_blocks(self.context, block_tokens, in_flight)
        return int(blocks * layout.block_values * block_tokens * dtype_bytes(self.checkpoint.kv_dtype))


def wanted(
    checkpoint: Checkpoint,
    *,
    kv_share: float | None = None,
    requests: int | None = None,
    memory_bytes: int = 0,
    decode_speedup: float | None = None,
    batch: int = 1,
    context: int | None = None,
    windows: bool = False,
) -> Wanted | None:
    """What the one argument that is given asks for; None where none is. `decode_speedup` counts bytes, which bound
    decoding, of a batch of requests of `context` tokens. With `windows` a share of the KV cache is that of a request.

    Raises InputError for more than one, and for more tokens than the model takes.
    """
    asked = [each for each in (kv_share, requests, decode_speedup) if each is not None]
    if len(asked) > 1:
        raise InputError("--kv-budget, --requests and --decode-speedup exclude each other")
    sizes = Sizes(checkpoint, request_context(checkpoint, context))
    if kv_share is not None and windows:
        text = f"the KV cache of a request of {sizes.context:,} tokens is {{:.0%}} of the full one"
        return Wanted(sizes.request_share, kv_share, text, more_is_better=False)
    if kv_share is not None:
        text = "the KV cache is {:.0%} of the full one"
        return Wanted(sizes.kv_share, kv_share, text, more_is_better=False)
    if requests is not None:
        return Wanted(
            lambda mask: sizes.requests(mask, memory_bytes),
            requests,
            f"{{:.0f}} requests of {sizes.context:,} tokens fit in {memory_bytes / 2**30:g} GiB",
        )
    if decode_speedup is not None:
        full = sizes.step_bytes(checkpoint.mask, batch)
        return Wanted(
            lambda mask: full / sizes.step_bytes(mask, batch),
            decode_speedup,
            f"decoding {batch} requests of {sizes.context:,} tokens is {{:.2f}} times as fast, by the bytes it reads",
        )
    return None


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
    return candidates.without(Ranked(kind, count).pick(candidates).units) if count else candidates
