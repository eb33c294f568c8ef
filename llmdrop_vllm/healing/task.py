"""What healing does in which order, and one layer of it: by what student and teacher differ at the same depth."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from llmdrop_vllm.architectures.family import Family
from llmdrop_vllm.artifacts import sha256
from llmdrop_vllm.checkpoints.checkpoint import MaskedCheckpoint
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import CheckpointError, DataError
from llmdrop_vllm.healing.outputs import Recorded
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.scoring.batches import Batches
from llmdrop_vllm.scoring.layers import LayerStream
from llmdrop_vllm.scoring.scoring import TOKENS_PER_CHUNK
from llmdrop_vllm.scoring.scratch import Chunk, HiddenStates, Scratch, Step

# A projection's constant in the residual stream is told by its effect; this near to 1 it is 1.
CONSTANT_TO = 0.05
# One in so many prompts judges.
HELD_OUT_EVERY = 8
SCRATCH_FILES = (
    *("teacher-?.bin", "student-?.bin", "healed-*.safetensors", "trained.safetensors"),
    *(".*.safetensors.*.partial", "targets-*", "training-*"),
)


@dataclass(frozen=True)
class Unit:
    """A layer of which something is kept, and the layers behind it, up to `target`, of which nothing is.

    `lost` are sublayers gone since the layer before, such as "attention 7"; `mends` is whose projection is refitted.
    """

    layer: int
    target: int
    lost: tuple[str, ...]
    mends: str


def units(family: Family, teacher: DropMask, student: DropMask) -> tuple[Unit, ...]:
    """In order. What is gone before the first layer that is kept is that one's to make up for."""
    attention, mlp = family.absent(student)
    had = zip(("attention", "mlp"), (attention, mlp), family.absent(teacher), strict=True)
    lost = {kind: gone - before for kind, gone, before in had}
    kept = [layer for layer in range(student.num_hidden_layers) if layer not in attention & mlp]
    found: list[Unit] = []
    for layer, behind in pairwise([*kept, student.num_hidden_layers]):
        layers = range(layer if found else 0, behind)
        names = tuple(f"{kind} {each}" for each in layers for kind, gone in lost.items() if each in gone)
        found.append(Unit(layer, behind - 1, names, "attention" if layer in mlp else "mlp"))
    return tuple(found)


def held_out_sequences(data: Calibration) -> tuple[bool, ...]:
    """Per sequence, whether it judges. Answers to one prompt are on one side; windows of text are spread evenly.

    Raises DataError for fewer than two prompts.
    """
    starts = data.starts or (None,) * len(data.sequences)
    prompts: dict[object, int] = {}
    found = []
    for place, (start, sequence) in enumerate(zip(starts, data.sequences, strict=True)):
        key = place if start is None else tuple(sequence[: start + 1].tolist())
        found.append(prompts.setdefault(key, len(prompts)))
    if len(prompts) < 2:
        raise DataError(
            f"{data.identity.source} has {len(prompts)} prompt or text; healing needs one to learn, one to judge"
        )
    every = min(HELD_OUT_EVERY, len(prompts))
    return tuple(number % every == every // 2 for number in found)


class Streams:
    """The two residual streams, each with the layers that it goes through; a model beside itself has one.

    `truth` holds the teacher's by depth, `mended` the student's by place in the order of the units, in files of a
    directory that is gone on with where the same is `asked`. `held_out` says of each sequence whether it judges.
    Raises DataError for too little data.
    """

    def __init__(
        self,
        teacher: MaskedCheckpoint,
        student: MaskedCheckpoint,
        data: Calibration,
        device: torch.device,
        dtype: torch.dtype,
        directory: Path,
        asked: Sequence[Any],
        weighting: Literal["relative", "equal"] = "relative",
    ) -> None:
        self.data, self.device, self.weighting = data, device, weighting
        stream_of = partial(LayerStream, device=device, dtype=dtype, attention="sdpa")
        self.teacher = stream_of(teacher)
        self.student = self.teacher if student is teacher else stream_of(student)
        sizes = directory, self.teacher.hidden_size, dtype
        self.truth, self.mended = HiddenStates(*sizes, "teacher"), HiddenStates(*sizes, "student")
        self.batches, self.held_out = Batches(data, TOKENS_PER_CHUNK[device.type]), held_out_sequences(data)
        self.chunks = self.batches.chunks
        self.disk_bytes = (2 if student is teacher else 4) * self.batches.tokens * self.truth.token_bytes
        run = sha256([*asked, data.identity.sha256, *self.teacher.identity, *self.student.identity])
        self.scratch = Scratch(directory, run, self.disk_bytes, SCRATCH_FILES)

    def go_on(self, steps: Sequence[Step], *, progress: bool) -> tuple[dict[str, Any], ...]:
        """What all steps of a run give; those that are done are not done again."""
        with torch.no_grad():
            return self.scratch.go_on(steps, len(self.chunks), self._embed, progress=progress)

    def _embed(self, begins: bool) -> None:
        """Write the teacher's first input, where a run begins, and learn what layers get beside it."""
        self.teacher.embed(self.batches, self.truth if begins else None)
        if self.student is not self.teacher:
            self.student.embed(self.batches, None)

    def parted(self, values: Iterable[Any]) -> tuple[list[Any], list[Any]]:
        """Of what there is for each sequence, that of those that are learnt from, and that of those that judge."""
        found: tuple[list[Any], list[Any]] = [], []
        for value, judges in zip(values, self.held_out, strict=True):
            found[judges].append(value)
        return found

    def after(self, stream: LayerStream, layer: nn.Module, index: int, chunk: Chunk, at: int) -> torch.Tensor:
        """A chunk's output of a layer of a stream that stands `at` a depth or place, [batch, tokens, hidden]."""
        states = self.truth if stream is self.teacher else self.mended
        dtype = next((each.dtype for each in layer.parameters()), stream.dtype)
        hidden = states.read(at, chunk).to(self.device, dtype)
        return stream.through(layer, index, chunk, hidden)

    def teach(self, layer: nn.Module, index: int, bar: "tqdm[Any]") -> None:
        """Take the teacher's stream through one of its layers."""
        for chunk in self.chunks:
            self.truth.write(index + 1, chunk, self.after(self.teacher, layer, index, chunk, index))
            bar.update()


@dataclass(frozen=True)
class Task:
    """One layer of the student and what it is compared with: the teacher's stream after the unit's target, or where
    the teacher's layer is given, as `full`, what comes out of that.
    """

    streams: Streams
    layer: nn.Module
    place: int
    unit: Unit
    full: nn.Module | None = None

    def truth(self, chunk: Chunk) -> torch.Tensor:
        """What the teacher has there, [batch, tokens, hidden] in float32."""
        streams, depth = self.streams, self.unit.layer
        if self.full is not None:
            return streams.after(streams.teacher, self.full, depth, chunk, depth).float()
        return streams.truth.read(self.unit.target + 1, chunk).to(streams.device).float()

    def output(self, chunk: Chunk) -> torch.Tensor:
        """[batch, tokens, hidden]."""
        return self.streams.after(self.streams.student, self.layer, self.unit.layer, chunk, self.place)

    def lack(self, chunk: Chunk, output: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted error [batch, tokens, hidden] and the weights [batch, tokens, 1], float32; of the layer's output
        on the chunk, where that is known.

        Raises CheckpointError where a stream is not finite.
        """
        truth = self.truth(chunk)
        found = truth - (self.output(chunk) if output is None else output).float()
        if not found.isfinite().all():
            student = self.streams.student
            raise CheckpointError(
                f"layer {self.unit.layer} of {student.checkpoint.directory} gives hidden states that are not finite in "
                f"{student.dtype}; its weights are damaged or need a wider dtype"
            )
        weights = torch.ones_like(truth[..., :1])
        if self.streams.weighting == "relative":
            weights = truth.norm(dim=-1, keepdim=True).clamp_min(1e-12).reciprocal()
        return found * weights, weights

    def rows(self, chunk: Chunk, judging: bool) -> torch.Tensor:
        """Which tokens to learn from, or to judge by, [batch, tokens]."""
        first = chunk.first_sequence
        those = torch.tensor(self.streams.held_out[first : first + chunk.batch])
        return (self.streams.batches.counted(chunk) & (those == judging)[:, None]).to(self.streams.device)

    def constant(self, recorded: Recorded) -> float:
        """What the projection's output is multiplied by where it is added to the stream. Granite's is not 1."""
        chunk = self.streams.chunks[-1]
        rows = self.streams.batches.counted(chunk).to(self.streams.device)
        out = self.output(chunk)[rows].float()
        y = recorded.outputs.reshape(*chunk.shape, -1)[rows].float()
        recorded.silenced = True
        effect = out - self.output(chunk)[rows].float()
        recorded.silenced = False
        found = (torch.dot(effect.flatten(), y.flatten()) / y.square().sum().clamp_min(1e-30)).item()
        return 1.0 if abs(found - 1) < CONSTANT_TO else found

    def scale(self) -> float:
        """What a squared error of the held-out tokens is a share of: the teacher's stream, weighted alike."""
        total = 0.0
        for chunk in self.streams.chunks:
            rows = self.rows(chunk, judging=True)
            if self.streams.weighting == "relative":
                total += int(rows.sum())
            elif rows.any():
                total += self.truth(chunk)[rows].square().sum(dtype=torch.float64).item()
        return max(total, 1e-30)

    def loss(self, learnt: bool) -> float:
        """Weighted squared error, and its gradients where they are on."""
        total = 0.0
        for chunk in self.streams.chunks:
            rows = self.rows(chunk, not learnt)
            if rows.any():
                value = self.lack(chunk)[0][rows].square().sum()
                if torch.is_grad_enabled():
                    value.backward()
                total += value.item()
        return total
