"""Masks judged by the answers: KL of the next tokens to the full model's, with what masks have in common computed once.

The model is in memory without anything gone; a mask is put on for one pass. Layers before the first one in which two
masks differ give both the same: their output is kept for one mask, the base, and the others begin with it.
"""

import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmdrop_vllm import hf
from llmdrop_vllm.artifacts import Provenance
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.healing.targets import Targets, divergence, teach
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.scoring.batches import Batches
from llmdrop_vllm.scoring.layers import running_instead
from llmdrop_vllm.scoring.scratch import Chunk

TOKENS_PER_CHUNK = 1024
DECIMALS = 6  # of what is kept


class Weights:
    """The model that judges put masks on, loaded when it is first needed; it may be changed to one that was healed."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    def change(self, load: Callable[[], Any]) -> None:
        """To another one. Judges begin anew with `rebase`."""
        self._load = load
        vars(self).pop("model", None)

    @cached_property
    def model(self) -> Any:
        """In memory."""
        with torch.inference_mode(False):  # healing may need gradients
            return self._load()


class Judge:
    """A full model's answers, and any mask's divergence from them. What the checkpoint's mask drops even the full model
    goes without; in `directory`, what that says has a place of its own; `tokens` are those of each answer, [sequences].
    """

    def __init__(self, weights: Weights, checkpoint: Checkpoint, answers: Calibration, directory: Path) -> None:
        self.weights, self.checkpoint, self.directory = weights, checkpoint, tempfile.mkdtemp(dir=directory)
        # A layer that reads the keys of one before it needs that one computed, so no states are shared there.
        self.shares_states = all(kind.donor is None for kind in checkpoint.decoder.kinds)
        self.batches = Batches(answers, TOKENS_PER_CHUNK)
        self.tokens = np.array(answers.predicted)
        self.rebase(checkpoint.mask)

    @cached_property
    def targets(self) -> Targets:
        """What the full model says; the weights must still be its own when this is first asked for.

        Raises CheckpointError for logits that are not finite.
        """
        return teach(lambda: self.weights.model, self.batches, Path(self.directory))

    def rebase(self, mask: DropMask) -> None:
        """Let the masks that are judged from here on begin with this one's states, as far as they are alike."""
        self.base, self.states = mask, dict[int, list[torch.Tensor]]()

    def divergences(self, mask: DropMask, chunks: Collection[int] | None = None) -> dict[int, float]:
        """By sequence, the mean KL of its answer's tokens under a mask, in nats; of all chunks or of these.

        Raises CheckpointError for logits that are not finite.
        """
        found: dict[int, float] = {}
        with torch.inference_mode():
            for number, chunk in enumerate(self.batches.chunks):
                if chunks is None or number in chunks:
                    found |= self._divergences(mask, number, chunk)
        return found

    @property
    def _layers(self) -> torch.nn.ModuleList:
        return hf.decoder_layers(self.weights.model, self.base.num_hidden_layers)

    def _divergences(self, mask: DropMask, number: int, chunk: Chunk) -> dict[int, float]:
        spans = self.batches.spans(chunk)
        start = min(span.start for span in spans)  # what stands before is a prompt in every row
        logits = self._logits(mask, number, chunk, chunk.tokens - start)
        found = {}
        for row, span in enumerate(spans):
            sequence = chunk.first_sequence + row
            # What follows the last token is nobody's answer.
            said = (each[:-1].to(logits.device) for each in self.targets.of(sequence))
            kl = divergence(logits[row, span.start - start : span.stop - start - 1], *said).mean().item()
            if not np.isfinite(kl):
                raise CheckpointError(f"{mask.summary()}: logits are not finite")
            found[sequence] = round(kl, DECIMALS)
        return found

    def _logits(self, mask: DropMask, number: int, chunk: Chunk, last: int) -> torch.Tensor:
        """Of the last so many positions, [batch, last, vocabulary]."""
        model = self.weights.model
        token_ids = self.batches.token_ids(chunk).to(model.device)
        first = _first_difference(self.base, mask) if self.shares_states else 0
        if first and number not in self.states:
            self._keep(number, token_ids)
        begun = self._beginning(first, self.states[number][first]) if first else nullcontext()
        with hf.dropped(model, self.checkpoint.family, mask), begun:
            logits: torch.Tensor = self._run(token_ids, last)
        return logits[:, -last:]

    def _run(self, token_ids: torch.Tensor, last: int) -> Any:
        """Logits of the last so many positions at least: a head costs as much as some layers."""
        model = self.weights.model
        fewer = {"logits_to_keep": last} if "logits_to_keep" in signature(model.forward).parameters else {}
        return model(token_ids, use_cache=False, **fewer).logits

    def _keep(self, number: int, token_ids: torch.Tensor) -> None:
        """What goes into every layer under the base."""
        states: list[torch.Tensor] = []

        def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])

        with ExitStack() as hooks:
            for layer in self._layers:
                hooks.enter_context(layer.register_forward_pre_hook(record, with_kwargs=True))
            hooks.enter_context(hf.dropped(self.weights.model, self.checkpoint.family, self.base))
            self._run(token_ids, 1)
        self.states[number] = states

    def _beginning(self, first: int, state: torch.Tensor) -> AbstractContextManager[None]:
        """Within this context, layers before the `first` are not computed, and that one is given the state."""

        def passing(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            return (state, None) if self.checkpoint.family.transformers_layer_tuple else state

        return running_instead(dict.fromkeys(self._layers[:first], passing))


@dataclass(frozen=True)
class Judging:
    """What masks of a checkpoint are chosen by, and the answers that are held out; computed on a device, in a dtype."""

    checkpoint: Checkpoint
    answers: Calibration
    held_out: Calibration
    device: torch.device
    dtype: torch.dtype

    @property
    def provenance(self) -> Provenance:
        """Of a mask that is chosen by this."""
        return Provenance.of(self.checkpoint, data=self.answers.identity, dtype=self.dtype, device=self.device)

    @contextmanager
    def judges(self) -> Iterator[tuple[Judge, Judge]]:
        """By either kind of answers; what the full model said is gone when the context ends."""
        masked = self.checkpoint.under(self.checkpoint.mask)
        weights = Weights(lambda: hf.load(masked, dtype=self.dtype).to(self.device).eval())
        with tempfile.TemporaryDirectory(prefix="llmdrop-") as temporary:
            its = [Judge(weights, self.checkpoint, each, Path(temporary)) for each in (self.answers, self.held_out)]
            yield its[0], its[1]


def _first_difference(one: DropMask, other: DropMask) -> int:
    """The first layer that two masks leave different things of; 0 where they are the same, for nothing is saved."""
    pairs = zip(one.dropped, other.dropped, strict=True)
    windowed = {layer for layer, _ in {*one.windows} ^ {*other.windows}}
    return min(windowed.union(*(ours ^ theirs for ours, theirs in pairs)), default=0)
