"""What a mask saves in a checkpoint: parameters, bytes of weights, KV cache and the requests that fit."""

import torch
from transformers import PretrainedConfig

from llmdrop_vllm.artifacts import MaskRecord, Record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.sublayer_tensors import in_dropped_sublayer
from llmdrop_vllm.hf import model_class, transformers_config
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.memory.accounting import DTYPE_BYTES, kept_layout, kv_bytes_per_layer_token

BLOCK_TOKENS = 16  # vLLM hands out KV cache in blocks of so many tokens


class Footprint(Record):
    """A model's size. `kv_bytes_per_token` is as vLLM stores it, padding included; tokens are what fits beside the
    weights in `Inspection.memory_bytes`, in whole blocks.
    """

    parameters: int
    weight_bytes: int
    attention_layers: int
    kv_bytes_per_token: int
    kv_tokens: int


class Inspection(Record):
    """A checkpoint with and without its mask. `stripped`: the dropped weights are gone from the files."""

    model: str
    architecture: str
    dialects: tuple[str, ...]
    mask: MaskRecord
    summary: str
    stripped: bool
    disk_bytes: int
    memory_bytes: int
    kv_dtype: str
    kv_layout: str
    full: Footprint
    dropped: Footprint

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For a table: what, full, dropped, dropped as a share of full."""
        names = {
            "parameters": "parameters",
            "weight_bytes": "weights, bytes",
            "attention_layers": "attention layers",
            "kv_bytes_per_token": f"KV cache, bytes per token ({self.kv_dtype})",
            "kv_tokens": f"tokens in {self.memory_bytes / 2**30:g} GiB beside the weights",
        }
        table = []
        for name, title in names.items():
            full, dropped = getattr(self.full, name), getattr(self.dropped, name)
            table.append((title, f"{full:,}", f"{dropped:,}", f"{dropped / full:.0%}" if full else "-"))
        return table


def inspect_checkpoint(checkpoint: Checkpoint, *, memory_bytes: int, kv_dtype: str | None = None) -> Inspection:
    """Account for a checkpoint and its mask; keys and values have the weights' dtype unless one is given."""
    mask = checkpoint.mask
    disk_bytes = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    whole = DropMask(mask.num_hidden_layers)
    config = transformers_config(checkpoint, whole).to_dict()
    kv_dtype = kv_dtype or weights_dtype(checkpoint)
    kept = sum(
        t.num_bytes for t in checkpoint.tensors.values() if not in_dropped_sublayer(t.name, checkpoint.family, mask)
    )
    parameters = {each: count_parameters(transformers_config(checkpoint, each)) for each in (whole, mask)}

    def footprint(each: DropMask) -> Footprint:
        # What is gone from the files is weighed as what is left: exact where all weights have one dtype.
        whole_bytes = round(kept * parameters[whole] / parameters[mask]) if checkpoint.is_stripped else disk_bytes
        weight_bytes = kept if each is mask else whole_bytes
        per_token = kept_layout(config, each).stored_layers * kv_bytes_per_layer_token(config, kv_dtype)
        free_bytes = max(0, memory_bytes - weight_bytes)
        return Footprint(
            parameters=parameters[each],
            weight_bytes=weight_bytes,
            attention_layers=len(each.kept_attention),
            kv_bytes_per_token=per_token,
            kv_tokens=free_bytes // (per_token * BLOCK_TOKENS) * BLOCK_TOKENS,
        )

    return Inspection(
        model=str(checkpoint.directory),
        architecture=checkpoint.architecture,
        dialects=DropMask.dialects(checkpoint.config),
        mask=MaskRecord.of(mask),
        summary=mask.summary(),
        stripped=checkpoint.is_stripped,
        disk_bytes=disk_bytes,
        memory_bytes=memory_bytes,
        kv_dtype=kv_dtype,
        kv_layout=kept_layout(config, mask).describe(),
        full=footprint(whole),
        dropped=footprint(mask),
    )


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the model that a config from `hf` describes, counted without memory for any."""
    with torch.device("meta"):
        return int(model_class(config)(config).num_parameters())


def weights_dtype(checkpoint: Checkpoint) -> str:
    """As the config names it; bfloat16 where it names none that a KV cache can have."""
    name = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16")
    return name if name in DTYPE_BYTES else "bfloat16"
