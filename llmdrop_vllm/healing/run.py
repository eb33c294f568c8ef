"""Both streams on their way through the layers, step by step; each step leaves its output on disk and can be the last
that a killed run has done.
"""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import nn
from tqdm import tqdm

from llmdrop_vllm import hf
from llmdrop_vllm.architectures.family import Sublayer
from llmdrop_vllm.checkpoints.checkpoint import MaskedCheckpoint
from llmdrop_vllm.checkpoints.hf_weights import TORCH_DTYPES
from llmdrop_vllm.checkpoints.shards import StoredTensor, stored_tensors
from llmdrop_vllm.healing.mended import keep_mended
from llmdrop_vllm.healing.outputs import output_parameters, projection
from llmdrop_vllm.healing.records import HealedLayer
from llmdrop_vllm.healing.refit import Refit, refit
from llmdrop_vllm.healing.task import Streams, Task, Unit, units
from llmdrop_vllm.masks.mask import DropMask


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
    """A student's healing, in the directory of the streams."""

    def __init__(
        self, student: MaskedCheckpoint, teacher: MaskedCheckpoint, options: HealOptions, streams: Streams
    ) -> None:
        self.student, self.teacher, self.options, self.streams = student, teacher, options, streams
        self.family, self.mask = student.checkpoint.family, student.mask
        self.data, self.chunks, self.scratch = streams.data, streams.chunks, streams.scratch
        self.units = units(self.family, teacher.mask, student.mask)
        self.steps = self._steps() if options.closed_form else []

    @property
    def lost(self) -> int:
        """How many sublayers the student lost."""
        return sum(len(unit.lost) for unit in self.units)

    @property
    def first_lost(self) -> int:
        """The first layer that lost something."""
        return min((*self.mask.attention, *self.mask.mlp))

    def layers(self, *, progress: bool) -> tuple[HealedLayer, ...]:
        """One result per unit from the first that lost something on; steps that are done are not done again."""
        self._go_on_with({name for each in self.scratch.progress.layers for name in each.get("tensors", ())})
        depth = len(self.streams.student.layers)
        steps = [(f"layer {step.layer} of {depth}", step.passes, step.do) for step in self.steps]
        found = self.streams.go_on(steps, progress=progress)
        return tuple(HealedLayer.model_validate(each, strict=False) for each in found if each)

    def tensors(self) -> dict[str, StoredTensor]:
        """What has been changed, by the checkpoint's names."""
        files = sorted(self.scratch.directory.glob("healed-*.safetensors"))
        return {tensor.name: tensor for path in files for tensor in stored_tensors(path)}

    def _steps(self) -> list[Step]:
        """The run in order. Up to the first unit that lost something both streams are one."""
        first = next((place for place, unit in enumerate(self.units) if unit.lost), len(self.units))
        halved = set.union(*self.family.absent(self.mask))  # without attention or without an MLP
        found: list[Step] = []
        depth = 0
        for place, unit in enumerate(self.units):
            if place == first:
                found.append(Step(depth, 0, partial(self._part, place, depth)))
            # While the teacher's stream stands before the layer.
            if place > first and self.options.later == "attention" and unit.layer not in halved:
                mend = partial(self._mend_attention, place, replace(unit, lost=(), mends="attention"))
                found.append(Step(unit.layer, 1, mend, self.family.mixer(unit.layer)))
            found += [Step(index, 1, partial(self._teach, index)) for index in range(depth, unit.target + 1)]
            depth = unit.target + 1
            if place >= first:
                mended = self._mended(unit) if unit.lost else None
                found.append(Step(unit.layer, 2 if mended else 1, partial(self._mend, place, unit), mended))
        return found

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
            self.streams.teach(layer, index, bar)
        return {}

    def _mend(self, place: int, unit: Unit, bar: "tqdm[Any]") -> dict[str, Any]:
        """Refit a layer of the student's and take its stream through it."""
        with self.streams.student.layer(unit.layer) as layer:
            task = Task(self.streams, layer, place, unit)
            found = self._refitted(task, self._parameters(unit), bar) if unit.lost else Refit(0.0, 0)
            passed = 0.0
            for chunk in self.chunks:
                output = task.output(chunk)
                self.streams.mended.write(place + 1, chunk, output)
                if not unit.lost and (rows := task.rows(chunk, judging=True)).any():
                    passed += task.lack(chunk, output)[0][rows].square().sum().item()
                bar.update()
        return _result(unit, found, (found.error + passed) / task.scale())

    def _mend_attention(self, place: int, unit: Unit, bar: "tqdm[Any]") -> dict[str, Any]:
        """Refit the attention of a layer that lost nothing, so that the streams meet before its MLP."""
        teacher, student = self.streams.teacher, self.streams.student
        gone = DropMask(self.mask.num_hidden_layers, mlp=(unit.layer,))
        with (
            hf.dropped(teacher.model, self.family, gone),
            hf.dropped(student.model, self.family, gone),
            teacher.layer(unit.layer) as full,
            student.layer(unit.layer) as layer,
        ):
            parameters = self._parameters(unit)
            if projection(layer, parameters) is None:  # a descent for every layer would take too long
                bar.update(len(self.chunks))
                return {}
            task = Task(self.streams, layer, place, unit, full)
            found = self._refitted(task, parameters, bar)
            return _result(unit, found, found.error / task.scale())

    def _parameters(self, unit: Unit) -> dict[str, nn.Parameter]:
        """What may be changed of a unit's layer, by the names there."""
        return output_parameters(self.streams.student, unit.layer, self._mended(unit))

    def _refitted(self, task: Task, parameters: dict[str, nn.Parameter], bar: "tqdm[Any]") -> Refit:
        """What was changed is kept as the checkpoint has it, and gone on with as rounding left it."""
        found = refit(task, parameters, bar)
        if found.left == 1:  # nothing helped
            return found
        stream, unit = self.streams.student, task.unit
        path = self.scratch.directory / f"healed-{unit.layer:05}-{unit.mends}.safetensors"
        named = {f"{stream.layers_prefix}{unit.layer}.{name}": parameter for name, parameter in parameters.items()}
        for name, parameter in named.items():
            stored = stream.tensors[next(iter(stream.stored_names([name])))]
            parameter.copy_(parameter.to(TORCH_DTYPES[stored.dtype]))
        changed = tuple(sorted(keep_mended(stream.model, stream.tensors, named, path)))
        self._go_on_with(changed)
        return replace(found, tensors=changed)


def _result(unit: Unit, found: Refit, before: float) -> dict[str, Any]:
    """What a `HealedLayer` is made of."""
    refitted = {"tensors": found.tensors, "columns": found.columns, "ridge": found.ridge, "steps": found.steps}
    return asdict(unit) | refitted | {"error_before": before, "error_after": before * found.left}
