"""Importance as healing sees it: how much of a sublayer's work is left undone once its neighbour was refitted."""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from llmdrop_vllm import hf
from llmdrop_vllm.architectures.family import Family
from llmdrop_vllm.artifacts import Scores
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.healing.outputs import output_parameters
from llmdrop_vllm.healing.parents import check_plain
from llmdrop_vllm.healing.refit import Refit, refit
from llmdrop_vllm.healing.task import Streams, Task, Unit, held_out_sequences
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.scoring.scoring import precision

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
    masked, (where, what) = checkpoint.under(scores.dropped), precision(checkpoint, device, dtype)
    with tempfile.TemporaryDirectory(prefix="llmdrop-") as temporary:
        directory = scratch or Path(temporary) / "scratch"
        streams = Streams(masked, masked, data, where, what, directory, ["after healing"])
        with streams.scratch.in_use():
            shares = _Run(masked.mask, checkpoint.family, streams).layers(progress=progress)
    left = {kind: tuple(None if each[kind] is None else 1 - min(each[kind], 2.0) for each in shares) for kind in KINDS}
    similarity = scores.similarity.model_copy(update=left)
    return scores.model_copy(update={"similarity": similarity, "importance": "left after healing"})


@dataclass(frozen=True)
class _Run:
    mask: DropMask
    family: Family
    streams: Streams

    def layers(self, *, progress: bool) -> tuple[dict[str, Any], ...]:
        """Per layer, what is left without its attention and without its MLP."""
        depth = self.mask.num_hidden_layers
        steps = [(f"layer {at} of {depth}, after healing", PASSES, partial(self._layer, at)) for at in range(depth)]
        return self.streams.go_on(steps, progress=progress)

    def _layer(self, index: int, bar: "tqdm[Any]") -> dict[str, Any]:
        with self.streams.student.layer(index) as layer:
            self.streams.teach(layer, index, bar)
            return {kind: self._without(kind, index, layer, bar) for kind in KINDS}

    def _without(self, kind: str, index: int, layer: nn.Module, bar: "tqdm[Any]") -> float | None:
        """None where it is gone already."""
        if index in getattr(self.mask, kind):
            bar.update(len(self.streams.chunks))
            return None
        depth, other = self.mask.num_hidden_layers, "mlp" if kind == "attention" else "attention"
        gone = DropMask(depth, attention=(index,)) if kind == "attention" else DropMask(depth, mlp=(index,))
        with hf.dropped(self.streams.student.model, self.family, gone):
            task = Task(self.streams, layer, index, Unit(index, index, (f"{kind} {index}",), other))
            if index in getattr(self.mask, other):  # nothing is left to refit
                found = Refit(task.loss(learnt=False), 0)
                bar.update(len(self.streams.chunks))
            else:
                parameters = output_parameters(self.streams.student, index, getattr(self.family, other))
                before = {name: each.detach().clone() for name, each in parameters.items()}
                found = refit(task, parameters, bar)
                for name, each in parameters.items():
                    each.copy_(before[name])
            return found.error * found.left / task.scale()
