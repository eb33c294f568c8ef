"""Importance as healing sees it: how much of a sublayer's work is left undone once its neighbour was refitted."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from llmdrop_vllm import hf
from llmdrop_vllm.artifacts import Scores, sha256
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint, MaskedCheckpoint
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.healing.outputs import output_parameters
from llmdrop_vllm.healing.parents import check_plain
from llmdrop_vllm.healing.refit import Refit, refit
from llmdrop_vllm.healing.run import SCRATCH_FILES
from llmdrop_vllm.healing.split import held_out_sequences
from llmdrop_vllm.healing.task import Streams, Task
from llmdrop_vllm.healing.units import Unit
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.scoring.scoring import precision
from llmdrop_vllm.scoring.scratch import Scratch
from llmdrop_vllm.versions import __version__

KINDS = ("attention", "mlp")
PASSES = 1 + 2  # of a layer, and of what is left of it without either sublayer


def check_can_heal(checkpoint: Checkpoint, data: Calibration) -> None:
    """Raise CheckpointError where weights are quantized, and as `held_out_sequences` for too little data."""
    check_plain(checkpoint)
    held_out_sequences(data)


def after_healing(
    scores: Scores,
    checkpoint: Checkpoint,
    data: Calibration,
    *,
    device: str | None = None,
    dtype: str | None = None,
    scratch: Path | None = None,
    progress: bool = False,
) -> Scores:
    """A checkpoint's scores with another importance of attention and MLPs, each measured with nothing else gone: the
    squared error of the layer's output that is left on held-out sequences when the sublayer is gone and the other one
    refitted, as a share of the output. That of blocks stays 1 - cosine similarity.

    With `scratch`, an interrupted run goes on at the layer that it reached. Raises as `check_can_heal`.
    """
    check_can_heal(checkpoint, data)
    with tempfile.TemporaryDirectory(prefix="llmdrop-") as temporary:
        masked, directory = checkpoint.under(scores.dropped), scratch or Path(temporary) / "scratch"
        run = _Run(masked, data, *precision(checkpoint, device, dtype), directory)
        with run.scratch.in_use():
            shares = run.layers(progress=progress)
            run.scratch.remove()
    left = {kind: tuple(None if each[kind] is None else 1 - min(each[kind], 2.0) for each in shares) for kind in KINDS}
    similarity = scores.similarity.model_copy(update=left)
    return scores.model_copy(update={"similarity": similarity, "importance": "left after healing"})


class _Run:
    def __init__(
        self, masked: MaskedCheckpoint, data: Calibration, device: torch.device, dtype: torch.dtype, directory: Path
    ) -> None:
        self.mask, self.family = masked.mask, masked.checkpoint.family
        self.streams = Streams.of(masked, masked, data, device, dtype, directory)
        self.stream = self.streams.student
        asked = [__version__, masked.checkpoint.fingerprint, data.identity.sha256, str(device), str(dtype)]
        asked += self.stream.cannot_go_on
        gone = [*map(sorted, self.mask.dropped), *self.mask.windows]
        needed_bytes = 2 * self.streams.batches.tokens * self.streams.truth.token_bytes
        self.scratch = Scratch(directory, sha256(["after healing", *asked, gone]), needed_bytes, SCRATCH_FILES)

    def layers(self, *, progress: bool) -> tuple[dict[str, Any], ...]:
        """Per layer, what is left without its attention and without its MLP."""
        depth = self.mask.num_hidden_layers
        titles = (f"layer {index} of {depth}, after healing" for index in range(depth))
        steps = [(title, PASSES, partial(self._layer, index)) for index, title in enumerate(titles)]
        with torch.no_grad():
            return self.scratch.go_on(steps, len(self.streams.chunks), self.streams.embed, progress=progress)

    def _layer(self, index: int, bar: "tqdm[Any]") -> dict[str, Any]:
        with self.stream.layer(index) as layer:
            self.streams.teach(layer, index, bar)
            return {kind: self._without(kind, index, layer, bar) for kind in KINDS}

    def _without(self, kind: str, index: int, layer: nn.Module, bar: "tqdm[Any]") -> float | None:
        """None where it is gone already."""
        if index in getattr(self.mask, kind):
            bar.update(len(self.streams.chunks))
            return None
        depth, other = self.mask.num_hidden_layers, "mlp" if kind == "attention" else "attention"
        gone = DropMask(depth, attention=(index,)) if kind == "attention" else DropMask(depth, mlp=(index,))
        with hf.dropped(self.stream.model, self.family, gone):
            task = Task(self.streams, layer, index, Unit(index, index, (f"{kind} {index}",), other))
            if index in getattr(self.mask, other):  # nothing is left to refit
                found = Refit(task.loss(learnt=False), 0)
                bar.update(len(self.streams.chunks))
            else:
                parameters = output_parameters(self.stream, index, getattr(self.family, other))
                before = {name: each.detach().clone() for name, each in parameters.items()}
                found = refit(task, parameters, bar)
                for name, each in parameters.items():
                    each.copy_(before[name])
            return found.error * found.left / task.scale()
