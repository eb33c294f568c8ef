"""Which decoder layers a pipeline stage has, in vLLM's own variable: planned when a config is read, decided once."""

import math
import os

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.mask import ranges
from llmdrop_vllm.serving.pipeline import LayerCost, partition, stage_attention

# vLLM's way to set the stages, and our note of what we put there: a partition of ours must not outlive its engine.
PARTITION, OUR_PARTITION = "VLLM_PP_LAYER_PARTITION", "LLMDROP_PP_LAYER_PARTITION"


def users_stages() -> str | None:
    """The partition that the user has set, if any, as `10,22`."""
    found = os.environ.get(PARTITION)
    return None if found == os.environ.get(OUR_PARTITION) else found


def set_stages(stages: str) -> None:
    """For this process and those that it starts, until the next engine's config is read."""
    os.environ[PARTITION] = os.environ[OUR_PARTITION] = stages


def planned(decoder: Decoder, vllm_config: VllmConfig, memory_bytes: float) -> str:
    """The partition for a mask, as `10,22`; raises MaskError where there is none."""
    num_stages = vllm_config.parallel_config.pipeline_parallel_size
    sizes = partition(decoder.mask, num_stages, _layer_cost(decoder, vllm_config), memory_bytes)
    return ",".join(map(str, sizes))


def plan_stages(decoder: Decoder | None, vllm_config: VllmConfig) -> None:
    """Set the pipeline stages for a mask by this node's memory, or check those that the user has set.

    Ranks on several nodes decide again when they have met: `agreement.py`.
    """
    users = users_stages()
    if os.environ.pop(OUR_PARTITION, None) is not None and users is None:
        os.environ.pop(PARTITION, None)
    if decoder is None or not decoder.mask or vllm_config.parallel_config.pipeline_parallel_size == 1:
        return
    for donor, its in decoder.readers(decoder.mask).items():
        raise MaskError(
            f"layers {ranges(its)} read the keys and values of layer {donor}, and vLLM hands none from one pipeline "
            "stage to another; use --pipeline-parallel-size 1"
        )
    plan = planned(decoder, vllm_config, stage_memory_bytes(vllm_config))
    if users is None:
        set_stages(plan)
        return
    attention = stage_attention(decoder.mask, [int(size) for size in users.split(",")], decoder.kinds)
    if 0 in attention:
        raise MaskError(
            f"{PARTITION}={users} leaves stage {attention.index(0)} without attention, which vLLM cannot run; "
            f"unset it or use {plan}"
        )


def stage_memory_bytes(vllm_config: VllmConfig) -> float:
    """What a stage has for weights and KV cache together; infinite where the KV cache's size was set by itself."""
    if current_platform.is_cpu() or vllm_config.cache_config.kv_cache_memory_bytes is not None:
        return math.inf
    return current_platform.get_device_total_memory() * vllm_config.cache_config.gpu_memory_utilization


def _layer_cost(decoder: Decoder, vllm_config: VllmConfig) -> LayerCost:
    """From the config's widths; a quantized weight is taken as one byte."""
    model = vllm_config.model_config
    config = model.hf_text_config
    itemsize = model.dtype.itemsize if model.quantization is None else 1
    heads = 2 * config.num_attention_heads + 2 * model.get_total_num_kv_heads()
    scale = itemsize * config.hidden_size / vllm_config.parallel_config.tensor_parallel_size
    widths = (getattr(config, key, None) for key in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"))
    intermediate_size = next(filter(None, widths), 4 * config.hidden_size)
    return LayerCost(scale * heads * model.get_head_size(), scale * 3 * intermediate_size, decoder.kinds)
