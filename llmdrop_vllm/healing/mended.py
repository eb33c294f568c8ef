"""A checkpoint with some of its tensors replaced, as a model and back: what healing and training hand on."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from llmdrop_vllm import hf
from llmdrop_vllm.artifacts import write_atomically
from llmdrop_vllm.checkpoints import hf_weights
from llmdrop_vllm.checkpoints.checkpoint import MaskedCheckpoint
from llmdrop_vllm.checkpoints.shards import StoredTensor, stored_tensors


def load_mended(
    masked: MaskedCheckpoint, tensors: Mapping[str, StoredTensor], *, dtype: torch.dtype, device: torch.device
) -> Any:
    """The masked model with these tensors in place of its own, on a device."""
    model = hf.load(masked, dtype=dtype).to(device).eval()
    names = {stored.name: name for name, stored in hf_weights.find_tensors(masked.checkpoint, model).items()}
    state = {names[name]: hf_weights.read_tensor(stored).to(device) for name, stored in tensors.items()}
    if hf_weights.is_converted(model):
        hf_weights.load_converted(model, state, device)
    else:
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=False)
    return model


def keep_mended(
    model: Any, stored: Mapping[str, StoredTensor], names: Collection[str], path: Path
) -> dict[str, StoredTensor]:
    """Write some of a model's parameters to a file, under the names and in the dtypes of what the checkpoint stores."""
    found = {
        stored[name].name: tensor.to(hf_weights.TORCH_DTYPES[stored[name].dtype]).cpu().contiguous()
        for name, tensor in hf_weights.checkpoint_tensors(model, names).items()
    }
    write_atomically(path, save(found))  # a run that goes on may read it
    return {tensor.name: tensor for tensor in stored_tensors(path)}
