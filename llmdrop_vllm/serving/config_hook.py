"""What happens when vLLM reads a config, before any worker starts: a mask is checked and planned for."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmdrop_vllm.checkpoint import CheckpointError, missing_tensors, tensor_names
from llmdrop_vllm.families import BY_ARCHITECTURE, EXPLICIT_PREFIX, family_of
from llmdrop_vllm.mask import DropMask, MaskError, block_entry
from llmdrop_vllm.serving.pipeline import LayerCost, partition, stage_attention

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# vLLM's way to set the stages, and our note of what we put there: a partition of ours must not outlive its engine.
PARTITION, OUR_PARTITION = "VLLM_PP_LAYER_PARTITION", "LLMDROP_PP_LAYER_PARTITION"
# Architectures that read `block_configs` by themselves; a no-op there is served dropped by stock vLLM.
READS_BLOCK_CONFIGS = frozenset({"DeciLMForCausalLM"})


class _VerifyAndUpdateConfig(Protocol):
    def verify_and_update_config(self, vllm_config: "VllmConfig") -> None: ...
    def verify_and_update_model_config(self, model_config: "ModelConfig") -> None: ...


class ConfigHook:
    """Stands before the hook that vLLM has for an architecture, if any, in its MODELS_CONFIG_MAP."""

    def __init__(self, architecture: str, inner: "_VerifyAndUpdateConfig | None") -> None:
        self.architecture = architecture
        self.inner = inner

    def verify_and_update_model_config(self, model_config: "ModelConfig") -> None:
        """For every model of an engine, draft models included."""
        with _clear_errors():
            checked_mask(self.architecture, model_config)
        if self.inner is not None:
            self.inner.verify_and_update_model_config(model_config)

    def verify_and_update_config(self, vllm_config: "VllmConfig") -> None:
        """For the engine as a whole."""
        with _clear_errors():
            mask = checked_mask(self.architecture, vllm_config.model_config)
            _check_checkpoint(self.architecture, mask, vllm_config)
            _set_partition(mask, vllm_config)
        if self.inner is not None:
            self.inner.verify_and_update_config(vllm_config)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Under vLLM's command line an error of the user's ends the process with one line; elsewhere it is raised."""
    try:
        yield
    except (MaskError, CheckpointError) as error:
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if Path(sys.argv[0]).name == "vllm" or (spec is not None and spec.name.startswith("vllm.")):
            raise SystemExit(f"llmdrop: error: {error}") from None
        raise


def checked_mask(architecture: str, model_config: "ModelConfig") -> DropMask | None:
    """The mask that the model will be served with; None for a config without one that is none of our business.

    Raises MaskError for a mask that cannot be served.
    """
    config = model_config.hf_config
    family = family_of(architecture)
    if family is None:
        _refuse_unsupported(architecture, config)
        if model_config.hf_text_config is not config:
            _refuse_unsupported(architecture, model_config.hf_text_config)
        return None
    dialects = DropMask.dialects(config)
    if not dialects:
        if architecture.startswith(EXPLICIT_PREFIX):
            raise MaskError(f"{architecture} promises a drop mask, and the config has none in any dialect")
        return None
    mask = DropMask.from_config(config)
    if "nemotron-nas" in dialects:
        _check_uniform(config)
    if not mask.kept_attention:
        raise MaskError(
            f"every one of the {mask.num_hidden_layers} attention sublayers is dropped; vLLM schedules requests by "
            "their KV cache, so at least one must remain"
        )
    return mask


def _refuse_unsupported(architecture: str, config: object) -> None:
    dialects = DropMask.dialects(config)
    try:
        dropped = bool(dialects) and bool(DropMask.from_config(config))
    except MaskError:
        if dialects == ("nemotron-nas",):  # another schema under the same key, vLLM's own to read
            return
        raise
    if dropped and not (architecture in READS_BLOCK_CONFIGS and dialects == ("nemotron-nas",)):
        raise MaskError(
            f"the config has a drop mask ({', '.join(dialects)}), but {architecture} has no row in the family table "
            f"and would be served undropped; supported: {', '.join(sorted(BY_ARCHITECTURE))}"
        )


def _check_uniform(config: object) -> None:
    """Refuse block configs whose kept sublayers differ from the config's own widths: this architecture has but one."""
    kv_heads = getattr(config, "num_key_value_heads", None)
    expected = {
        ("attention", "n_heads_in_group"): kv_heads and getattr(config, "num_attention_heads", 0) // kv_heads,
        ("ffn", "intermediate_size"): getattr(config, "intermediate_size", None),
    }
    for layer, block in enumerate(config.block_configs):  # type: ignore[attr-defined]
        for (part, key), value in expected.items():
            settings = block_entry(block, part)
            found = block_entry(settings, key)
            if found is not None and found != value and not block_entry(settings, "no_op"):
                raise MaskError(
                    f"block_configs[{layer}].{part}.{key} is {found!r}, the config's is {value!r}; "
                    "sublayers of different widths need the architecture DeciLMForCausalLM"
                )


def _check_checkpoint(architecture: str, mask: DropMask | None, vllm_config: "VllmConfig") -> None:
    """Look at the shards' headers: a damaged shard or a missing weight costs seconds here and minutes in a worker."""
    directory = Path(vllm_config.model_config.model)
    family = family_of(architecture)
    by_headers = vllm_config.load_config.load_format in ("auto", "hf", "safetensors")
    if not mask or family is None or not by_headers or not directory.is_dir():
        return
    missing = missing_tensors(set(tensor_names(directory)), family, mask)
    if missing:
        raise CheckpointError(f"{directory} lacks weights of sublayers that the mask keeps: {', '.join(missing)}")


def _set_partition(mask: DropMask | None, vllm_config: "VllmConfig") -> None:
    """Set the pipeline stages for a mask, or check those that the user has set."""
    ours = os.environ.pop(OUR_PARTITION, None)
    if ours is not None and os.environ.get(PARTITION) == ours:
        del os.environ[PARTITION]
    num_stages = vllm_config.parallel_config.pipeline_parallel_size
    if not mask or num_stages == 1:
        return
    plan = partition(mask, num_stages, _layer_cost(vllm_config), _stage_memory_bytes(vllm_config))
    if users := os.environ.get(PARTITION):
        sizes = [int(size) for size in users.split(",")]
        attention = stage_attention(mask, sizes)
        if 0 in attention:
            raise MaskError(
                f"{PARTITION}={users} leaves stage {attention.index(0)} without attention, which vLLM cannot run; "
                f"unset it or use {','.join(map(str, plan))}"
            )
        return
    os.environ[PARTITION] = os.environ[OUR_PARTITION] = ",".join(map(str, plan))


def _layer_cost(vllm_config: "VllmConfig") -> LayerCost:
    """From the config's widths; a quantized weight is taken as one byte."""
    model = vllm_config.model_config
    config = model.hf_text_config
    itemsize = model.dtype.itemsize if model.quantization is None else 1
    heads = 2 * config.num_attention_heads + 2 * model.get_total_num_kv_heads()
    scale = itemsize * config.hidden_size / vllm_config.parallel_config.tensor_parallel_size
    return LayerCost(scale * heads * model.get_head_size(), scale * 3 * config.intermediate_size)


def _stage_memory_bytes(vllm_config: "VllmConfig") -> float:
    """What a stage has for weights and KV cache together; infinite where the KV cache's size was set by itself."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() or vllm_config.cache_config.kv_cache_memory_bytes is not None:
        return math.inf
    return current_platform.get_device_total_memory() * vllm_config.cache_config.gpu_memory_utilization
