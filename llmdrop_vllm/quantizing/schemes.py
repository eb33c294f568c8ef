"""The schemes that `llmdrop quantize` offers, and whether a checkpoint's weights fit them."""

from collections.abc import Mapping
from dataclasses import dataclass

from llmdrop_vllm.architectures.names import layer_in
from llmdrop_vllm.architectures.wrappers import WRAPPERS
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import CheckpointError, InputError

GROUP_SIZES = (128, 64, 32)  # inputs that share a scale, the usual number first
GROUPS_OF = 32  # vLLM's kernels take multiples of it


@dataclass(frozen=True)
class Scheme:
    """`preset` is llm-compressor's name; `grouped` weights have a scale for so many inputs, others for each output.

    `calibrated`: rounding is made good by GPTQ on data, for which 4 bits need it and 8-bit floats do not.
    """

    preset: str
    what: str
    grouped: bool = False
    calibrated: bool = True


SCHEMES: Mapping[str, Scheme] = {
    "w8a8": Scheme("W8A8", "8-bit integers, activations too"),
    "w4a16": Scheme("W4A16", "4-bit weights", grouped=True),
    "fp8": Scheme("FP8_DYNAMIC", "8-bit floats, activations too", calibrated=False),
}


def group_size_of(scheme: Scheme, checkpoint: Checkpoint, asked: int | None) -> int | None:
    """Inputs that share a scale; None for schemes without groups.

    Raises InputError for a size that the inputs of some weight are no multiple of.
    """
    if not scheme.grouped:
        if asked is not None:
            raise InputError(f"--group-size is of w4a16; {scheme.preset} has a scale for each output")
        return None
    weights = {  # of the decoder's layers, one of each width
        tensor.shape[-1]: name
        for name, tensor in checkpoint.under(checkpoint.mask).kept.items()
        if layer_in(name) is not None and len(tensor.shape) > 1 and name.endswith(".weight")
    }
    if asked is not None and (asked < 1 or asked % GROUPS_OF):
        raise InputError(f"--group-size is {asked}; expected a multiple of {GROUPS_OF}, like {GROUP_SIZES[0]}")
    sizes = GROUP_SIZES if asked is None else (asked,)
    for size in sizes:
        if all(columns % size == 0 for columns in weights):
            return size
    columns = next(columns for columns in weights if columns % sizes[-1])
    raise InputError(f"{weights[columns]} has {columns} inputs, which groups of {sizes[-1]} do not divide")


def check_quantizable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for what is quantized already, and for models that consist of more than a decoder."""
    if checkpoint.is_quantized:
        raise CheckpointError(f"{checkpoint.directory} is quantized already; name the model that it was made of")
    if checkpoint.architecture in WRAPPERS:
        raise CheckpointError(
            f"{checkpoint.architecture} consists of more than a decoder, of which this command does not know what may "
            "be quantized"
        )
