"""What must be true of a checkpoint and a mask before surgery begins."""

import re
from collections.abc import Collection
from typing import Any

from llmdrop_vllm.architectures.family import Family
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.sublayer_tensors import in_dropped_sublayer, missing_weights
from llmdrop_vllm.errors import CheckpointError, MaskError
from llmdrop_vllm.masks.mask import DropMask, layer_count


def checked_mask(checkpoint: Checkpoint, mask: DropMask | None, *, may_be_empty: bool) -> DropMask:
    """The mask to apply, by default the config's own.

    Raises MaskError for a mask that cannot be applied to this model and CheckpointError where a weight that it keeps is
    gone already.
    """
    own = checkpoint.mask
    mask = own if mask is None else mask
    if mask.num_hidden_layers != (depth := layer_count(checkpoint.config)):
        raise MaskError(f"the mask is for {mask.num_hidden_layers} layers; {checkpoint.directory} has {depth}")
    mask.check_attention_is_left()
    if not mask and not may_be_empty:
        raise MaskError(
            f"nothing to drop: the mask is empty, and {checkpoint.directory}/config.json says: {own.summary()}"
        )
    if missing := sorted(missing_weights(checkpoint.tensors, checkpoint.family, mask)):
        raise CheckpointError(
            f"{checkpoint.directory} lacks weights of sublayers that the mask keeps: {', '.join(missing)}; "
            f"its config says: {own.summary()}"
        )
    return mask


def is_whole(names: Collection[str], family: Family, depth: int) -> bool:
    """Whether tensors of every sublayer are among these names."""
    layers = tuple(range(depth))
    # Where all sublayers of a kind are gone, no other layer shows what is missing.
    kinds = (DropMask(depth, attention=layers), DropMask(depth, mlp=layers))
    if not all(any(in_dropped_sublayer(name, family, kind) for name in names) for kind in kinds):
        return False
    return not missing_weights(names, family, DropMask(depth))


def checked_config(checkpoint: Checkpoint, mask: DropMask) -> Any:
    """The model's Transformers config with a mask, after comparing names, shapes and dtypes of all tensors with it.

    A quantized model's tensors are not the architecture's and are not compared. None where Transformers does not know
    the model type, though vLLM may. Importing Transformers takes seconds.
    """
    import torch
    from transformers import CONFIG_MAPPING

    from llmdrop_vllm import hf
    from llmdrop_vllm.checkpoints.hf_weights import find_tensors

    if checkpoint.plain_config.get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        config = hf.transformers_config(checkpoint, mask)
        with torch.device("meta"):
            model = hf.model_class(config)(config)
    except (CheckpointError, MaskError):
        raise
    except Exception as error:  # whatever the architecture's own code makes of a config that contradicts itself
        raise CheckpointError(
            f"{checkpoint.directory}/config.json does not describe a {checkpoint.architecture}: {error}"
        ) from error
    if not checkpoint.is_quantized:
        find_tensors(checkpoint, model)
    return config


def output_projections(checkpoint: Checkpoint, mask: DropMask) -> frozenset[str]:
    """The tensors which, being zeros, make the dropped sublayers add nothing. Raises CheckpointError without them."""
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"{checkpoint.directory} is quantized, and zeros have no common form there; only models with plain weights "
            "can be made portable"
        )
    found = set()
    for sublayer, dropped in checkpoint.family.sublayers(mask):
        modules = "|".join((sublayer.module, *sublayer.also))
        # The experts of some mixtures are one tensor, whose name ends where others' have `.weight`.
        ending = rf"(?:{sublayer.output})(?:\.weight|\.bias|_bias)?"
        pattern = re.compile(rf"(?:^|.*\.)(\d+)\.({modules})\.((?:.*\.)?{ending}$)?.*")
        inside = [match for name in checkpoint.tensors if (match := pattern.fullmatch(name))]
        matches = [match for match in inside if match[3]]
        # Of a mixture and its shared expert, for one, each has an output of its own.
        zeroed = {(int(match[1]), match[2]) for match in matches}
        without = {int(match[1]) for match in inside if (int(match[1]), match[2]) not in zeroed}
        if lacking := sorted(set(dropped) & without | set(dropped) - {layer for layer, _ in zeroed}):
            raise CheckpointError(
                f"{checkpoint.directory} has no {sublayer.module}.{sublayer.output}.weight in layers "
                f"{', '.join(map(str, lacking))}; a portable checkpoint needs the weights of what is dropped"
            )
        found |= {match[0] for match in matches if int(match[1]) in dropped}
    return frozenset(found)
