"""Whether one model is what another was made of by dropping, told before anything slow begins."""

import json
from pathlib import Path
from typing import Any

from llmdrop_vllm.artifacts import HEAL_FILE
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.sublayer_tensors import in_dropped_sublayer
from llmdrop_vllm.errors import CheckpointError, MaskError
from llmdrop_vllm.healing.records import healing_of
from llmdrop_vllm.scoring.layers import check_stream


def check_plain(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where weights are quantized, for a sum of products cannot be added to them, and as
    `check_stream`.
    """
    check_stream(checkpoint)
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"{checkpoint.directory} is quantized; heal in plain weights, and quantize what comes out"
        )


def check_parent(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raise CheckpointError where the teacher is not the student's full model, MaskError where nothing was dropped.

    Weights may differ where the student's own record says that they were healed; of each tensor, the first 4 KiB are
    compared.
    """
    check_plain(student)
    check_plain(teacher)
    its, theirs = (f"({each.architecture}, {each.mask.num_hidden_layers} layers)" for each in (student, teacher))
    if its != theirs:
        raise CheckpointError(f"{teacher.directory} {theirs} is not the full model of {student.directory} {its}")
    ours, full = student.mask, teacher.mask
    if more := {*full.attention} - {*ours.attention} or {*full.mlp} - {*ours.mlp}:
        raise CheckpointError(
            f"{teacher.directory} lacks sublayers of layers {sorted(more)}, which {student.directory} has: not "
            "its full model"
        )
    if ours.dropped == full.dropped:
        raise MaskError(
            f"{student.directory} lost nothing that {teacher.directory} has ({ours.summary()}); name a dropped "
            "model to heal, and the full one as its teacher"
        )
    _check_tokenizers(student, teacher)
    _check_weights(student, teacher)


def _check_weights(student: Checkpoint, teacher: Checkpoint) -> None:
    record = healing_of(student.directory)
    changed = set() if record is None else {*record.trained, *(name for each in record.layers for name in each.tensors)}
    for name, tensor in student.tensors.items():
        if in_dropped_sublayer(name, student.family, student.mask):
            continue  # a portable checkpoint has them, with zeros
        other = teacher.tensors.get(name)
        if other is None or other.shape != tensor.shape:
            found = "no such tensor" if other is None else f"it with shape {list(other.shape)}"
            problem = f"has shape {list(tensor.shape)}, and the teacher has {found}"
        elif name not in changed and (other.dtype != tensor.dtype or other.head() != tensor.head()):
            problem = f"has other values, and no {HEAL_FILE} says that it was healed"
        else:
            continue
        raise CheckpointError(f"{teacher.directory} is not the full model of {student.directory}: {name} {problem}")


def _check_tokenizers(student: Checkpoint, teacher: Checkpoint) -> None:
    ours, full = (_vocabulary(each.directory / "tokenizer.json") for each in (student, teacher))
    if ours is not None and full is not None and ours != full:
        raise CheckpointError(f"{student.directory} and {teacher.directory} have tokenizers of other vocabularies")


def _vocabulary(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # some other kind of tokenizer: the embedding's shape is compared
