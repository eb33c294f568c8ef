"""What the served model goes without and what that saves, from the engine's config and the scores beside the model."""

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from vllm.config import ModelConfig, VllmConfig

from llmdrop_server import COMPARISON_ENVIRONMENT, SCORES_ENVIRONMENT
from llmdrop_server.schemas import Drop, Importance, Scores, Size
from llmdrop_vllm import artifacts
from llmdrop_vllm.architectures.families import EXPLICIT_PREFIX
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.checkpoints.tower import row_of
from llmdrop_vllm.data.comparison import Comparison
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.healing.records import healing_of
from llmdrop_vllm.hf import dropped_config, on_meta
from llmdrop_vllm.kv_cache.kinds import dtype_bytes
from llmdrop_vllm.kv_cache.layout import KVLayout
from llmdrop_vllm.masks.mask import DropMask

T = TypeVar("T")
R = TypeVar("R", artifacts.Scores, Comparison)


def report(vllm_config: VllmConfig) -> Drop:
    """For an engine that has started: vLLM has counted its KV cache by then."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    known = row_of(model.hf_config, model.architecture.removeprefix(EXPLICIT_PREFIX)) is not None
    decoder = Decoder.of(model.hf_config if known else model.hf_text_config, model.architecture)
    mask = decoder.mask
    model_dtype = str(model.dtype).removeprefix("torch.")
    kv_dtype = model_dtype if cache.cache_dtype == "auto" else cache.cache_dtype
    kv_dtype = "fp8" if kv_dtype.startswith("fp8") else kv_dtype  # vLLM has several names for it
    value_bytes = _or_none(dtype_bytes, kv_dtype)
    # Windows are named in one word there, which none of the models with windows of their own needs.
    skipped = [int(each) for each in cache.kv_cache_dtype_skip_layers if each.isdecimal()]
    wide = dict.fromkeys(skipped, max(1, dtype_bytes(model_dtype) // (value_bytes or 1)))
    layouts = {each: _or_none(decoder.layout, each, wide) for each in (decoder.whole, mask)}
    tokens, sequences = cache.kv_cache_size_tokens or 0, cache.kv_cache_max_concurrency or 0.0

    def size(each: DropMask) -> Size:
        layout, served = layouts[each], layouts[mask]
        fitting = tokens
        if layout is not None and served is not None and layout != served:
            # The same memory holds fewer tokens of the full model, in whole blocks.
            taken, other = (_taken(vllm_config, each, mask) for each in (served, layout))
            blocks = tokens * taken // other // cache.block_size
            fitting = int(blocks) * cache.block_size
        return Size(
            parameters=_or_none(lambda: int(on_meta(dropped_config(decoder, each)).num_parameters())),
            attention_layers=len(each.kept_attention) if layout is None else layout.layers,
            kv_bytes_per_token=None if layout is None or value_bytes is None else layout.token_bytes(value_bytes),
            kv_tokens=fitting,
            sequences=round(sequences * fitting / tokens, 2) if tokens else 0.0,
        )

    return Drop(
        model=names if isinstance(names := model.served_model_name, str) else names[0],
        architecture=decoder.architecture,
        family=decoder.family.name if decoder.family else None,
        summary=mask.summary(),
        mask=mask,
        kv_dtype=kv_dtype,
        kv_layout=layout.describe() if (layout := layouts[mask]) else "KV cache not counted: its sizes are not known",
        max_model_len=model.max_model_len,
        full=size(decoder.whole),
        served=size(mask),
        scores=_scores(model, mask),
        healing=healing.summary() if (healing := healing_of(Path(model.model))) else None,
        comparison=_beside(Comparison, COMPARISON_ENVIRONMENT, model, artifacts.COMPARISON_FILE, mask),
    )


def _taken(vllm_config: VllmConfig, layout: KVLayout, mask: DropMask) -> Fraction:
    """What a layout takes of the KV cache: for a token, or where there are windows for the longest request."""
    if not mask.windows:
        return Fraction(layout.token_values)
    context, block = vllm_config.model_config.max_model_len, vllm_config.cache_config.block_size
    return Fraction(layout.request_blocks(context, block, vllm_config.max_in_flight_tokens) * layout.block_values)


def _or_none(count: Callable[..., T], *args: Any) -> T | None:
    """None for a model whose config does not say, or that Transformers has no class for: it is served all the same."""
    try:
        return count(*args)
    except InputError:
        return None


def _scores(model: ModelConfig, mask: DropMask) -> Scores | None:
    """Those that the server was started with, or those that `llmdrop drop` left in the checkpoint."""
    found = _beside(artifacts.Scores, SCORES_ENVIRONMENT, model, artifacts.SCORES_FILE, mask)
    if found is None:
        return None
    similarity, data = found.similarity, found.provenance.data
    importance = {kind: tuple(None if each is None else 1 - each for each in values) for kind, values in similarity}
    return Scores(importance=Importance.model_validate(importance), calibration=data.source if data else None)


def _beside(kind: type[R], environment: str, model: ModelConfig, name: str, mask: DropMask) -> R | None:
    """The file that the server was started with, or the one in the checkpoint. Raises InputError for one of a model of
    another depth.
    """
    path = Path(os.environ.get(environment) or Path(model.model) / name)
    if not path.is_file():
        return None
    found = artifacts.read_record(kind, path)
    if found.num_hidden_layers != mask.num_hidden_layers:
        raise InputError(f"{path} is of {found.num_hidden_layers} layers; the model has {mask.num_hidden_layers}")
    return found
