"""Healing: two residual streams side by side, each layer refitted so that the second meets the first, then training.

The teacher's stream T goes through the full model, the student's S through what the mask leaves. Where S leaves a layer
it lacks e = T - S; what the layer's last projection multiplies, z, explains a part of e, which is added to its weights
(`ridge`). S goes on from the mended layer, so that errors are mended where they stand and not only where they arise.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from llmdrop_vllm.artifacts import ModelIdentity, Provenance
from llmdrop_vllm.checkpoints.checkpoint import MaskedCheckpoint
from llmdrop_vllm.checkpoints.hf_weights import find_tensors
from llmdrop_vllm.checkpoints.shards import StoredTensor
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import InputError, MaskError
from llmdrop_vllm.healing.distill import TrainOptions, distill, multiplies_in_bfloat16
from llmdrop_vllm.healing.mended import keep_mended, load_mended
from llmdrop_vllm.healing.records import HealedLayer, Healing, healing_of
from llmdrop_vllm.healing.run import HealOptions, Run
from llmdrop_vllm.healing.targets import teach
from llmdrop_vllm.healing.task import Streams
from llmdrop_vllm.scoring.scoring import precision

DEFAULT = HealOptions()
TEACHER_TOKENS = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Healed:
    """What came out: the changed tensors, in files that are gone when the context ends, and the record."""

    tensors: Mapping[str, StoredTensor]
    record: Healing


@contextmanager
def healed(
    student: MaskedCheckpoint,
    teacher: MaskedCheckpoint,
    data: Calibration,
    options: HealOptions = DEFAULT,
    *,
    train: TrainOptions | None = None,
    log_directory: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    scratch: Path | None = None,
    progress: bool = False,
    announce: Callable[[Run], None] | None = None,
) -> Iterator[Healed]:
    """Heal a student's weights and keep what came out until the context ends; nothing of either checkpoint changes.

    `announce` is called before anything slow, with what is about to be done.

    With `train` the closed form is where a training begins, whose weights are kept if held-out KL fell.
    With `scratch`, a directory for the streams, an interrupted run goes on at the layer that it reached when the same
    is asked again, and so does one whose context ends with an error. Raises CheckpointError for weights that cannot be
    computed with, OutputError for a scratch directory that cannot be used.
    """
    where, what = precision(student.checkpoint, device, dtype)
    _check(student, teacher, None if train is None else where)
    with tempfile.TemporaryDirectory(prefix="llmdrop-") as temporary:
        directory = scratch or Path(temporary) / "scratch"
        streams = Streams(teacher, student, data, where, what, directory, [asdict(options)], options.weighting)
        run = Run(student, teacher, options, streams)
        with run.scratch.in_use():
            if announce is not None:
                announce(run)
            if options.closed_form:
                layers = run.layers(progress=progress)
                found = Healed(run.tensors(), _record(run, layers))
            else:
                if not run.scratch.progress.layers:
                    run.scratch.save({})  # what has done nothing is thrown away by the run that goes on
                before = healing_of(student.checkpoint.directory)  # which a training alone adds to
                found = Healed({}, before or _record(run, ()))
            if train is not None:
                found = _trained(found, run, train, log_directory, progress=progress)
            yield found


def _check(student: MaskedCheckpoint, teacher: MaskedCheckpoint, trains_on: torch.device | None) -> None:
    """Raise MaskError for windows that healing would have to mend, InputError for a GPU that Trainer does not take."""
    if student.mask.windows != replace(teacher.mask, attention=student.mask.attention).windows:
        raise MaskError(
            f"healing mends what is dropped, not what windows lose; the student has {student.mask.summary()}, the "
            f"teacher {teacher.mask.summary()}: give both the same windows, or neither"
        )
    if trains_on is not None and trains_on.index:
        raise InputError(
            f"training is on the first GPU, and device is {trains_on}; CUDA_VISIBLE_DEVICES says which is first"
        )


def _record(run: Run, layers: tuple[HealedLayer, ...]) -> Healing:
    stream = run.streams.student
    tokens, held_out_tokens = map(sum, run.streams.parted(run.streams.batches.counts))
    return Healing(
        teacher=ModelIdentity.of(run.teacher.checkpoint),
        tokens=tokens,
        held_out_tokens=held_out_tokens,
        layers=layers,
        provenance=Provenance.of(stream.checkpoint, data=run.data.identity, dtype=stream.dtype, device=stream.device),
    )


def _trained(closed: Healed, run: Run, train: TrainOptions, log_directory: Path | None, *, progress: bool) -> Healed:
    """After the closed form. One of the two models is in memory at a time."""
    streams, directory = run.streams, run.scratch.directory
    dtype, device = streams.student.dtype, streams.device
    # Of which there are logits, all at once.
    in_memory = replace(streams.batches, tokens_per_chunk=TEACHER_TOKENS[device.type])
    load = partial(load_mended, device=device)
    targets = teach(lambda: load(run.teacher, {}, dtype=dtype), in_memory, directory, progress=progress)
    # What is not trained need not be cast for each pass, nor held twice as large, where products are in bfloat16.
    held = dtype if dtype == torch.bfloat16 and multiplies_in_bfloat16(device) else torch.float32
    model = load(run.student, closed.tensors, dtype=held)
    training, names = distill(model, run, targets, train, log_directory, progress=progress)
    tensors, changed = dict(closed.tensors), {*closed.record.trained}
    if training.kl_after < training.kl_before:
        stored = find_tensors(run.student.checkpoint, model)
        trained = keep_mended(model, stored, names, directory / "trained.safetensors")
        tensors, changed = tensors | trained, changed | trained.keys()
    training = training.model_copy(update={"tensors": tuple(sorted(changed)), "data": run.data.identity})
    return Healed(tensors, closed.record.model_copy(update={"training": training}))
