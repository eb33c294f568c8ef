"""A Transformers model's parameters and the tensors of its checkpoint, whose names and shapes may differ.

Transformers 5 merges, for one, a mixture's experts into one parameter; its own conversions are used both ways.
"""

import json
import re
from collections.abc import Collection, Mapping
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from llmdrop_vllm.architectures.names import within_decoder
from llmdrop_vllm.architectures.wrappers import WRAPPERS
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.shards import INDEX_FILE, VARIANT, StoredTensor, stored_tensors
from llmdrop_vllm.errors import CheckpointError

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# And what quantizers store numbers in.
READABLE = TORCH_DTYPES | {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn}


def read_tensor(stored: StoredTensor, buffer: bytearray | None = None) -> torch.Tensor:
    """A stored tensor of one of the types above, in memory of its own or in this buffer of its size."""
    stored.read_into(buffer := bytearray(stored.num_bytes) if buffer is None else buffer)
    return torch.frombuffer(buffer, dtype=READABLE[stored.dtype]).view(stored.shape)


def checkpoint_tensors(model: PreTrainedModel, names: Collection[str] | None = None) -> Mapping[str, torch.Tensor]:
    """The model's parameters, all or those named, under the names and in the shapes that its checkpoints have."""
    # The state of a whole model is long in the making, and this is asked for each of its layers.
    state = model.state_dict() if names is None else {name: attrgetter(name)(model).detach() for name in names}
    return revert_weight_conversion(model, state)


def is_converted(model: PreTrainedModel, tensors: Mapping[str, StoredTensor] = MappingProxyType({})) -> bool:
    """Whether any of the model's parameters is named or stored otherwise in its checkpoints, of which these are one's
    tensors by name.
    """
    state = model.state_dict()
    reverted = revert_weight_conversion(model, state)
    return any(reverted.get(name) is not each for name, each in state.items()) or any(
        tensors[name].shape != tuple(each.shape) for name, each in reverted.items() if name in tensors
    )


def declare_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a model on the meta device say the dtypes that Transformers would give its weights: some stay float32.

    Tables, which are computed and not stored, keep theirs.
    """
    in_float32 = [name for name, kept in model._get_dtype_plan(dtype).items() if kept == torch.float32]
    pattern = re.compile("|".join(in_float32) or "(?!)")
    for name, parameter in model.state_dict(keep_vars=True).items():
        parameter.data = parameter.data.to(torch.float32 if pattern.search(name) else dtype)


def load_converted(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Give some of the model's parameters their values, from tensors as checkpoints have them.

    They get the dtype that the model says they have.
    """
    options = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(model), device_map={"": device})
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # there would be one for every layer
    try:
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), options)
    finally:
        if shown:
            logging.enable_progress_bar()
    # What Transformers notes here would be taken for all conversions that the model has.
    del model._weight_conversions
    if wrong := {**info.conversion_errors, **dict.fromkeys(info.unexpected_keys, "not a parameter of the model")}:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
        raise CheckpointError(f"{type(model).__name__} cannot take these weights from the checkpoint: {reasons}")


def in_own_names(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Tensors under the names and in the shapes of the model's parameters, where they are as its checkpoints have them.

    Raises CheckpointError for some that the model does not have.
    """
    if tensors.keys() <= model.state_dict().keys() or not is_converted(model):
        return tensors
    with torch.device("meta"):
        twin = type(model)(model.config)
    load_converted(twin, tensors, torch.device("cpu"))
    return {name: tensor for name, tensor in twin.state_dict().items() if not tensor.is_meta}


def leave_index(directory: Path) -> None:
    """Beside stripped weights, put the index by which Trainer finds what it saved, and goes on from or ends with.

    Trainer reads where the tensors are. Whatever builds a model by it reads its metadata too, which is none: a plain
    from_pretrained ends with an error there, instead of inventing the dropped weights.
    """
    files = sorted(directory.glob(f"model.{VARIANT}*.safetensors"))
    weight_map = {tensor.name: path.name for path in files for tensor in stored_tensors(path)}
    index = {"metadata": "load with llmdrop_vllm.hf.from_pretrained", "weight_map": weight_map}
    partial = directory / f".{INDEX_FILE}.partial"
    partial.write_text(json.dumps(index, indent=2))
    partial.replace(directory / INDEX_FILE)


def find_tensors(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Where each tensor of the model's checkpoints is stored, by name; `model` may be on the meta device.

    Of a wrapper they are those of its decoder and its output head. Raises CheckpointError for a parameter that is
    missing and for one whose shape or dtype the model cannot take. Tied weights may be missing.
    """
    if checkpoint.architecture in WRAPPERS:
        return _find_tower(checkpoint, model)
    prefix = f"{model.base_model_prefix}."
    bare = not any(name.startswith(prefix) for name in checkpoint.tensors)  # saved from the model without its head
    tied = getattr(model, "_tied_weights_keys", None) if model.config.tie_word_embeddings else None
    found = {}
    for name, parameter in checkpoint_tensors(model).items():
        stored = checkpoint.tensors.get(name.removeprefix(prefix) if bare else name)
        if stored is not None:
            _check_tensor(stored, tuple(parameter.shape))
            found[name] = stored
        elif name not in (tied or ()) and not (bare and not name.startswith(prefix)):
            raise CheckpointError(f"{checkpoint.directory} lacks {name}, which {checkpoint.architecture} needs")
    return found


def _find_tower(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, StoredTensor]:
    parts = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
    ours = {id(each) for part in parts for each in part.state_dict(keep_vars=True).values()}
    names = [name for name, each in model.state_dict(keep_vars=True).items() if id(each) in ours]
    stored_by = {within_decoder(name): stored for name, stored in checkpoint.tensors.items()}
    is_tied = any(getattr(each, "tie_word_embeddings", False) for each in (model.config, parts[0].config))
    found = {}
    for name, parameter in checkpoint_tensors(model, names).items():
        stored = stored_by.get(within_decoder(name))
        if stored is not None:
            shape = tuple(parameter.shape)
            # A mixture's experts are stored one way or the other: Transformers tells by the sizes.
            _check_tensor(stored, (*shape[:-2], *shape[:-3:-1]) if stored.shape != shape and len(shape) == 3 else shape)
            found[name] = stored
        elif not (is_tied and within_decoder(name) == "lm_head.weight"):
            raise CheckpointError(f"{checkpoint.directory} lacks {name}, which {checkpoint.architecture} needs")
    return found


def _check_tensor(stored: StoredTensor, expected: tuple[int, ...]) -> None:
    where = f"{stored.name} in {stored.path}"
    if stored.shape != expected:
        raise CheckpointError(f"{where} has shape {list(stored.shape)}; the config says {list(expected)}")
    if stored.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{where} has dtype {stored.dtype}; expected one of {', '.join(TORCH_DTYPES)}")
