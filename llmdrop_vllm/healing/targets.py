"""The teacher's next-token distributions on answers: its most likely tokens, and the mass of all others as one more.

The KL of these k + 1 outcomes is a lower bound of the whole one, and with k = 64 nearly all of it; a token takes 6 k
bytes instead of 4 x vocabulary, so the teacher runs once however many passes the student makes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.scoring.batches import Batches

TOP_K = 64
# What fits into a CPU's cache; a GPU wants kernels that are worth their launch.
LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True)
class Targets:
    """Per counted position in the order of the batches: token ids [positions, k] and log-probabilities [positions, k].

    `first` is each sequence's first row, and the one behind the last.
    """

    token_ids: np.ndarray
    log_probabilities: np.ndarray
    first: Sequence[int]

    def of(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one sequence, each [positions, k]."""
        rows = slice(*self.first[sequence : sequence + 2])
        token_ids, log_probabilities = self.token_ids[rows], self.log_probabilities[rows]
        return torch.from_numpy(token_ids.astype(np.int64)), torch.from_numpy(log_probabilities.astype(np.float32))


def teach(load: Callable[[], Any], batches: Batches, directory: Path, *, progress: bool = False) -> Targets:
    """Load the teacher and run it over all sequences; what it says is kept in two files of the directory.

    Where they are there already the teacher is not loaded.

    Raises CheckpointError for logits that are not finite.
    """
    first = [*accumulate(batches.counts, initial=0)]
    shape, ready = (first[-1], TOP_K), directory / "targets-ready"
    mode: Literal["r", "w+"] = "r" if ready.exists() else "w+"
    token_ids = np.memmap(directory / "targets-ids.bin", np.int32, mode, shape=shape)
    log_probabilities = np.memmap(directory / "targets-log.bin", np.float16, mode, shape=shape)
    if mode == "w+":
        model = load()
        for chunk in tqdm(batches.chunks, unit="chunk", desc="teacher", disable=not progress):
            with torch.inference_mode():
                logits = model(batches.token_ids(chunk).to(model.device), use_cache=False).logits
                if not logits.isfinite().all():
                    raise CheckpointError(f"{type(model).__name__} gives logits that are not finite")
            numbers = range(chunk.first_sequence, chunk.first_sequence + chunk.batch)
            for number, span, logit in zip(numbers, batches.spans(chunk), logits, strict=True):
                top = logit[span].float().log_softmax(-1).topk(TOP_K)
                rows = slice(*first[number : number + 2])
                token_ids[rows], log_probabilities[rows] = top.indices.cpu().numpy(), top.values.cpu().numpy()
        for each in (token_ids, log_probabilities):
            each.flush()
        ready.touch()
    return Targets(token_ids, log_probabilities, first)


def divergence(logits: torch.Tensor, token_ids: torch.Tensor, log_probabilities: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) per position, in nats: logits [positions, vocabulary], the others [positions, k]."""
    return _Divergence.apply(logits, token_ids, log_probabilities)


class _Divergence(torch.autograd.Function):
    """With its gradient taken at once and some positions at a time: nothing as large as the logits is made in float32,
    which of a large vocabulary costs more time than the layers.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, *said: torch.Tensor) -> torch.Tensor:
        learns = ctx.needs_input_grad[0]
        gradients = torch.empty_like(logits) if learns else None
        values = []
        at_once = max(1, LOGITS_AT_ONCE[logits.device.type] // logits.shape[-1])
        for start in range(0, len(logits), at_once):
            rows = slice(start, start + at_once)
            with torch.set_grad_enabled(learns):
                part = logits[rows].detach().requires_grad_(learns)
                values.append(_divergence(part, *(each[rows] for each in said)))
                if gradients is not None:
                    (gradients[rows],) = torch.autograd.grad(values[-1].sum(), part)
        ctx.save_for_backward(*([gradients] if learns else []))
        return torch.cat([each.detach() for each in values])

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * above[:, None].to(gradients.dtype), None, None


def _divergence(logits: torch.Tensor, token_ids: torch.Tensor, log_probabilities: torch.Tensor) -> torch.Tensor:
    student = logits.float().log_softmax(-1).gather(-1, token_ids)
    mass = log_probabilities.exp()
    rest, its_rest = ((1 - each.sum(-1)).clamp_min(1e-6) for each in (mass, student.exp()))
    return (mass * (log_probabilities - student)).sum(-1) + rest * (rest.log() - its_rest.log())
