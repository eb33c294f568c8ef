"""What the served model goes without and what that saves, from the engine's config and the scores beside the model."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdrop_server import SCORES_ENVIRONMENT
from llmdrop_server.schemas import Drop, Importance, Mask, Scores, Size
from llmdrop_vllm import artifacts
from llmdrop_vllm.architectures.families import EXPLICIT_PREFIX, family_of
from llmdrop_vllm.checkpoints.inspection import count_parameters
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.hf import dropped_config
from llmdrop_vllm.masks.mask import DropMask, config_dict
from llmdrop_vllm.memory.accounting import kept_layout, kv_bytes_per_layer_token

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def report(vllm_config: "VllmConfig") -> Drop:
    """For an engine that has started: vLLM has counted its KV cache by then."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    config = config_dict(model.hf_config)
    architecture = model.architecture.removeprefix(EXPLICIT_PREFIX)
    family = family_of(architecture, config)
    mask = DropMask.from_config(config) if family else DropMask(model.hf_text_config.num_hidden_layers)
    kv_dtype = _kv_dtype(cache.cache_dtype, str(model.dtype).removeprefix("torch."))
    layer_bytes = _or_none(kv_bytes_per_layer_token, config, kv_dtype)
    tokens, sequences = cache.kv_cache_size_tokens or 0, cache.kv_cache_max_concurrency or 0.0
    served_layers = kept_layout(config, mask).stored_layers

    def size(each: DropMask) -> Size:
        layers = kept_layout(config, each).stored_layers
        # The same memory holds fewer tokens of the full model, in whole blocks.
        blocks = tokens * served_layers // layers // cache.block_size
        fitting = tokens if layers == served_layers else blocks * cache.block_size
        return Size(
            parameters=_or_none(_count, config, architecture, each),
            attention_layers=len(each.kept_attention),
            kv_bytes_per_token=layer_bytes and layers * layer_bytes,
            kv_tokens=fitting,
            sequences=round(sequences * fitting / tokens, 2) if tokens else 0.0,
        )

    return Drop(
        model=_served_name(model.served_model_name),
        architecture=architecture,
        family=family.name if family else None,
        summary=mask.summary(),
        mask=Mask(num_hidden_layers=mask.num_hidden_layers, attention=mask.attention, mlp=mask.mlp),
        kv_dtype=kv_dtype,
        kv_layout=kept_layout(config, mask).describe(),
        max_model_len=model.max_model_len,
        full=size(DropMask(mask.num_hidden_layers)),
        served=size(mask),
        scores=_scores(Path(model.model), mask.num_hidden_layers),
    )


def _served_name(names: str | list[str]) -> str:
    return names if isinstance(names, str) else names[0]


def _kv_dtype(cache_dtype: str, model_dtype: str) -> str:
    """vLLM's names for the KV cache's dtype, in those of `accounting`."""
    if cache_dtype == "auto":
        return model_dtype
    return "fp8" if cache_dtype.startswith("fp8") else cache_dtype


def _count(config: Mapping[str, Any], architecture: str, mask: DropMask) -> int:
    return count_parameters(dropped_config(config, architecture, mask))


def _or_none(count: Callable[..., int], *args: Any) -> int | None:
    """None for a model whose config does not say, or that Transformers has no class for: it is served all the same."""
    try:
        return count(*args)
    except InputError:
        return None


def _scores(model: Path, num_layers: int) -> Scores | None:
    """Those that the server was started with, or those that `llmdrop drop` left in the checkpoint."""
    path = Path(os.environ.get(SCORES_ENVIRONMENT) or model / artifacts.SCORES_FILE)
    if not path.is_file():
        return None
    found = artifacts.read_record(artifacts.Scores, path)
    if found.num_hidden_layers != num_layers:
        raise InputError(f"{path} has scores of {found.num_hidden_layers} layers; the model has {num_layers}")
    similarity, data = found.similarity, found.provenance.data
    importance = Importance(
        attention=tuple(None if each is None else 1 - each for each in similarity.attention),
        mlp=tuple(None if each is None else 1 - each for each in similarity.mlp),
        block=tuple(1 - each for each in similarity.block),
    )
    return Scores(importance=importance, calibration=data.source if data else None)
