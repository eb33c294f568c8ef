"""What must be true of a checkpoint and a mask before surgery begins."""

import re
from typing import Any

from llmdrop_vllm.architectures.names import BEFORE_LAYER
from llmdrop_vllm.checkpoints.checkpoint import MaskedCheckpoint
from llmdrop_vllm.errors import CheckpointError, InputError, MaskError
from llmdrop_vllm.masks.dialects import DIALECTS, ON_DISK


def check_surgery(
    masked: MaskedCheckpoint, dialect: str, portable: bool, config_only: bool, keep_dropped: bool, renumber: bool
) -> None:
    """Raise InputError for options that contradict each other or the model, MaskError for a mask that cannot be applied
    to it or said in the dialect, CheckpointError where a weight that it keeps is gone already.
    """
    checkpoint = masked.checkpoint
    if dialect not in ON_DISK:
        raise MaskError(f"{dialect!r} is not a dialect for checkpoints; expected one of {', '.join(ON_DISK)}")
    if portable + config_only + keep_dropped > 1:
        raise InputError("portable, config_only and keep_dropped exclude each other")
    if config_only and renumber:
        raise InputError("renumbered layers have tensors of other names; config_only links to those that there are")
    if portable and dialect == "nemotron-nas":
        raise InputError("portable is for engines that know no masks; those that read nemotron-nas need no zeros")
    if dialect in DIALECTS and DIALECTS[dialect].foreign(checkpoint.config):
        keys = ", ".join(DIALECTS[dialect].keys)
        raise MaskError(f"the config's {keys} tells how wide layers are; say the mask in the dialect llm-drop")
    if masked.mask.windows and (portable or dialect == "nemotron-nas"):
        raise InputError("the mask has windows, which engines for portable and nemotron-nas checkpoints ignore")
    if config_only and dialect == "nemotron-nas" and not masked.loses_nothing:
        raise InputError(
            "loaders of nemotron-nas checkpoints refuse weights of dropped sublayers; config_only has them"
        )
    checkpoint.decoder.check_attention_is_left(masked.mask)
    if not masked.mask and not keep_dropped:
        where, own = f"{checkpoint.directory}/config.json", checkpoint.mask.summary()
        raise MaskError(f"nothing to drop: the mask is empty, and {where} says: {own}")
    masked.check_complete()


def checked_config(masked: MaskedCheckpoint) -> Any:
    """The model's Transformers config with a mask, after comparing names, shapes and dtypes of all tensors with it.

    A quantized model's tensors are not the architecture's and are not compared. None where Transformers does not know
    the model type, though vLLM may. Importing Transformers takes seconds.
    """
    from transformers import CONFIG_MAPPING

    from llmdrop_vllm import hf
    from llmdrop_vllm.checkpoints.hf_weights import find_tensors

    checkpoint = masked.checkpoint
    if checkpoint.decoder.whole_config.get("model_type") not in CONFIG_MAPPING:
        return None
    model = hf.on_meta(hf.transformers_config(masked))
    if not checkpoint.is_quantized:
        find_tensors(checkpoint, model)
    return model.config


def output_projections(masked: MaskedCheckpoint) -> frozenset[str]:
    """The tensors which, being zeros, make the dropped sublayers add nothing. Raises CheckpointError without them."""
    checkpoint = masked.checkpoint
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"{checkpoint.directory} is quantized, and zeros have no common form there; only models with plain weights "
            "can be made portable"
        )
    found = set()
    for sublayer, dropped in checkpoint.family.sublayers(masked.mask):
        modules = "|".join((sublayer.module, *sublayer.also))
        pattern = re.compile(rf"{BEFORE_LAYER}(\d+)\.({modules})\.((?:.*\.)?{sublayer.output_ending}$)?.*")
        inside = [match for name in checkpoint.tensors if (match := pattern.fullmatch(name))]
        matches = [match for match in inside if match[3]]
        # Of a mixture and its shared expert, for one, each has an output of its own.
        zeroed = {(int(match[1]), match[2]) for match in matches}
        without = {int(match[1]) for match in inside if (int(match[1]), match[2]) not in zeroed}
        if lacking := sorted(set(dropped) & without | set(dropped) - {layer for layer, _ in zeroed}):
            raise CheckpointError(
                f"{checkpoint.directory} has no {sublayer.module}.{sublayer.output}.weight in layers "
                f"{', '.join(map(str, lacking))}; a portable checkpoint needs the weights of what is dropped, under "
                f"the names that the row {checkpoint.family.name} of the family table gives"
            )
        found |= {match[0] for match in matches if int(match[1]) in dropped}
    return frozenset(found)
