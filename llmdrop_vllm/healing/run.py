"""Both streams on their way through the layers, step by step; each step leaves its output on disk and can be the last
that a killed run has done.
"""

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from llmdrop_vllm import hf
from llmdrop_vllm.architectures.family import Family, Sublayer
from llmdrop_vllm.artifacts import sha256
from llmdrop_vllm.checkpoints.checkpoint import MaskedCheckpoint
from llmdrop_vllm.checkpoints.hf_weights import TORCH_DTYPES, checkpoint_tensors
from llmdrop_vllm.checkpoints.shards import StoredTensor, stored_tensors
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.healing.cost import Cost, layer_cost
from llmdrop_vllm.healing.mended import keep_mended
from llmdrop_vllm.healing.outputs import output_parameters, projection
from llmdrop_vllm.healing.records import HealedLayer
from llmdrop_vllm.healing.refit import Refit, refit
from llmdrop_vllm.healing.split import held_out_sequences
from llmdrop_vllm.healing.task import Streams, Task
from llmdrop_vllm.healing.units import Unit, units
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.scoring.batches import Batches
from llmdrop_vllm.scoring.layers import LayerStream
from llmdrop_vllm.scoring.scoring import TOKENS_PER_CHUNK
from llmdrop_vllm.scoring.scratch import HiddenStates, Scratch

ATTENTION = "sdpa"
SCRATCH_FILES = (
    "teacher-?.bin",
    "student-?.bin",
    "healed-*.safetensors",
    "trained.safetensors",
    ".*.safetensors.*.partial",
    "targets-*",
    "training-*",
)


@dataclass(frozen=True)
class HealOptions:
    """`later`: what is refitted beside the layers that lost something, the last projections of the attention that is
    kept behind the first of them, which can fetch from other tokens what an MLP cannot, or nothing.

    `weighting` of a token's squared error: by the teacher's |T|^2, so that the first tokens, whose stream is a hundred
    times as large, count like others, or all alike.

    Without the `closed_form` weights are only trained, such as those that it has mended before.
    """

    later: Literal["attention", "nothing"] = "attention"
    weighting: Literal["relative", "equal"] = "relative"
    closed_form: bool = True


@dataclass(frozen=True)
class Step:
    """A part of a run that takes `passes` of all tokens through a layer and refits the end of one of its sublayers, or
    of none; `do` gives a unit's result, or nothing.
    """

    layer: int
    passes: int
    do: Callable[["tqdm[Any]"], dict[str, Any]]
    refits: Sublayer | None = None


class Run:
    """A student's healing in a directory, where `asked` identifies it."""

    def __init__(
        self,
        student: MaskedCheckpoint,
        teacher: MaskedCheckpoint,
        data: Calibration,
        options: HealOptions,
        device: torch.device,
        dtype: torch.dtype,
        directory: Path,
        asked: str,
    ) -> None:
        self.student, self.teacher, self.data, self.options = student, teacher, data, options
        self.family, self.mask = student.checkpoint.family, student.mask
        of_teacher, of_student = (
            LayerStream(each, device=device, dtype=dtype, attention=ATTENTION) for each in (teacher, student)
        )
        self.streams = Streams(
            of_teacher,
            of_student,
            HiddenStates(directory, of_student.hidden_size, dtype, "teacher"),
            HiddenStates(directory, of_student.hidden_size, dtype, "student"),
            Batches(data, TOKENS_PER_CHUNK[device.type]),
            held_out_sequences(data),
            options.weighting,
        )
        self.chunks = self.streams.batches.chunks
        self.units = units(*(_with_absent(each.mask, self.family) for each in (teacher, student)))
        self.steps = self._steps(self.units) if options.closed_form else []
        self.disk_bytes = 4 * self.streams.batches.tokens * self.streams.truth.token_bytes
        self.scratch = Scratch(directory, sha256([asked, *of_student.cannot_go_on]), self.disk_bytes, SCRATCH_FILES)

    @property
    def lost(self) -> int:
        """How many sublayers the student lost."""
        return sum(len(unit.lost) for unit in self.units)

    @property
    def cost(self) -> Cost:
        """Of the closed form, where there is one."""
        stream, batches = self.streams.student, self.streams.batches
        parts = [layer_cost(stream, step.layer, step.passes, batches, step.refits) for step in self.steps]
        return reduce(operator.add, parts, Cost(0.0, 0.0, 0, 0, 0, stream.hidden_size, 0))

    def layers(self, *, progress: bool) -> tuple[HealedLayer, ...]:
        """One result per unit from the first that lost something on; steps that are done are not done again."""
        self._go_on_with({name for each in self.scratch.progress.layers for name in each.get("tensors", ())})
        depth = len(self.streams.student.layers)
        steps = [(f"layer {step.layer} of {depth}", step.passes, step.do) for step in self.steps]
        with torch.no_grad():
            found = self.scratch.go_on(steps, len(self.chunks), self._embed, progress=progress)
        return tuple(HealedLayer.model_validate(each, strict=False) for each in found if each)

    def _embed(self, begins: bool) -> None:
        self.streams.teacher.embed(self.streams.batches, self.streams.truth if begins else None)
        self.streams.student.embed(self.streams.batches, None)

    def tensors(self) -> dict[str, StoredTensor]:
        """What has been changed, by the checkpoint's names."""
        files = sorted(self.scratch.directory.glob("healed-*.safetensors"))
        return {tensor.name: tensor for path in files for tensor in stored_tensors(path)}

    def _steps(self, order: tuple[Unit, ...]) -> list[Step]:
        """The run in order. Up to the first unit that lost something both streams are one."""
        first = next((place for place, unit in enumerate(order) if unit.lost), len(order))
        found: list[Step] = []
        depth = 0
        for place, unit in enumerate(order):
            if place == first:
                found.append(Step(depth, 0, partial(self._part, place, depth)))
            # While the teacher's stream stands before the layer.
            if place > first and self.options.later == "attention" and unit.layer not in self._halved:
                found.append(
                    Step(unit.layer, 1, partial(self._mend_attention, place, unit), self.family.mixer(unit.layer))
                )
            found += [Step(index, 1, partial(self._teach, index)) for index in range(depth, unit.target + 1)]
            depth = unit.target + 1
            if place >= first:
                mended = self._mended(unit) if unit.lost else None
                found.append(Step(unit.layer, 2 if mended else 1, partial(self._mend, place, unit), mended))
        return found

    @property
    def _halved(self) -> set[int]:
        """Layers without attention or without an MLP."""
        return set.union(*self.family.absent(self.mask))

    def _mended(self, unit: Unit) -> Sublayer:
        """Whose last projection takes over what the unit lost."""
        mended = (self.family.mlp_of if unit.mends == "mlp" else self.family.mixer)(unit.layer)
        assert mended is not None, f"layer {unit.layer} has no {unit.mends} to mend"
        return mended

    def _go_on_with(self, changed: Collection[str]) -> None:
        """Let the student have these tensors of those that were changed, by the checkpoint's names."""
        mended, own = self.tensors(), self.streams.student.tensors
        own.update({name: mended[each.name] for name, each in own.items() if each.name in changed})

    def _part(self, place: int, depth: int, _: "tqdm[Any]") -> dict[str, Any]:
        """The student's stream begins as the teacher's."""
        self.streams.student.take_up(self.streams.teacher)
        for chunk in self.chunks:
            self.streams.mended.write(place, chunk, self.streams.truth.read(depth, chunk))
        return {}

    def _teach(self, index: int, bar: "tqdm[Any]") -> dict[str, Any]:
        """Take the teacher's stream through a layer."""
        with self.streams.teacher.layer(index) as layer:
            self.streams.teach(layer, index, bar.update)
        return {}

    def _mend(self, place: int, unit: Unit, bar: "tqdm[Any]") -> dict[str, Any]:
        """Refit a layer of the student's and take its stream through it."""
        with self.streams.student.layer(unit.layer) as layer:
            parameters = output_parameters(self.streams.student, unit.layer, self._mended(unit))
            task = Task(self.streams, layer, place, unit)
            found = refit(task, parameters, bar.update) if unit.lost else Refit(0.0, 0)
            changed = self._store(unit, unit.mends, parameters) if found.left < 1 else ()
            passed = 0.0
            for chunk in self.chunks:
                output = task.output(chunk)
                self.streams.mended.write(place + 1, chunk, output)
                if not unit.lost and (rows := task.rows(chunk, judging=True)).any():
                    passed += task.lack(chunk, output)[0][rows].square().sum().item()
                bar.update()
        return _result(unit, unit.mends, found, changed, (found.error + passed) / task.scale())

    def _mend_attention(self, place: int, unit: Unit, bar: "tqdm[Any]") -> dict[str, Any]:
        """Refit the attention of a layer that lost nothing, so that the streams meet before its MLP."""
        teacher, student, index = self.streams.teacher, self.streams.student, unit.layer
        gone = DropMask(self.mask.num_hidden_layers, mlp=(index,))
        with (
            hf.dropped(teacher.model, self.family, gone),
            hf.dropped(student.model, self.family, gone),
            teacher.layer(index) as full,
            student.layer(index) as layer,
        ):
            parameters = output_parameters(student, index, self._mended(replace(unit, mends="attention")))
            if projection(layer, parameters) is None:  # a descent for every layer would take too long
                bar.update(len(self.chunks))
                return {}
            task = Task(self.streams, layer, place, unit, full)
            found = refit(task, parameters, bar.update)
            changed = self._store(unit, "attention", parameters) if found.left < 1 else ()
            scale = task.scale()
        return _result(replace(unit, lost=()), "attention", found, changed, found.error / scale)

    def _store(self, unit: Unit, part: str, parameters: dict[str, nn.Parameter]) -> tuple[str, ...]:
        """Keep a layer's changed parameters as the checkpoint has them, and go on with what rounding left of them."""
        stream = self.streams.student
        path = self.scratch.directory / f"healed-{unit.layer:05}-{part}.safetensors"
        named = {f"{stream.layers_prefix}{unit.layer}.{name}": parameter for name, parameter in parameters.items()}
        for name, parameter in named.items():
            stored = stream.tensors[next(iter(checkpoint_tensors(stream.model, [name])))]
            parameter.copy_(parameter.to(TORCH_DTYPES[stored.dtype]))
        changed = tuple(sorted(keep_mended(stream.model, stream.tensors, named, path)))
        self._go_on_with(changed)
        return changed


def _with_absent(mask: DropMask, family: Family) -> DropMask:
    """As if what layers never had were gone as well."""
    attention, mlp = family.absent(mask)
    return DropMask(mask.num_hidden_layers, tuple(sorted(attention)), tuple(sorted(mlp)))


def _result(unit: Unit, mends: str, found: Refit, changed: tuple[str, ...], before: float) -> dict[str, Any]:
    return HealedLayer(
        layer=unit.layer,
        target=unit.target,
        lost=unit.lost,
        mends=mends,
        tensors=changed,
        columns=found.columns,
        ridge=found.ridge,
        steps=found.steps,
        error_before=before,
        error_after=before * found.left,
    ).model_dump(mode="json")
