"""Drafts of a model with a mask: what stands in its own checkpoint, as MTP layers do, and heads made for it."""

from copy import deepcopy
from typing import Any

from transformers import PretrainedConfig
from vllm.config import ModelConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.model_executor.models.registry import _SPECULATIVE_DECODING_MODELS

from llmdrop_vllm.architectures.families import EXPLICIT_PREFIX
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.errors import MaskError

# Their attention reads the keys and values of the last layer of its kind in the model that they draft for.
READS_THE_TARGET = frozenset({"Gemma4MTPModel"})
STOCK_DRAFT_CONFIG = SpeculativeConfig.hf_config_override


def is_draft_head(architecture: str) -> bool:
    """Whether vLLM has the architecture for drafts alone. A mask in the config of one is that of the model that it
    drafts for, of whose layers it has none.
    """
    return architecture in _SPECULATIVE_DECODING_MODELS


def check_what_it_reads(draft: ModelConfig, decoder: Decoder) -> None:
    """Raise MaskError for a draft that would read keys and values that the mask of the model drops, or cuts short."""
    if draft.architecture not in READS_THE_TARGET:
        return
    last = {kind: layer for layer, kind in enumerate(decoder.config["layer_types"])}
    read = {last[kind] for kind in draft.hf_text_config.layer_types if kind in last}
    if gone := sorted(read & ({*decoder.mask.attention} | dict(decoder.mask.windows).keys())):
        raise MaskError(
            f"the draft {draft.model} reads the keys and values of layers {sorted(read)}; the mask drops attention or "
            f"has windows in {gone}; keep it there, or draft otherwise"
        )


def draft_config(
    config: PretrainedConfig, transformers_mtp_overrides: dict[str, Any] | None = None
) -> PretrainedConfig:
    """What vLLM's own makes of a draft's config: MTP layers are drafts of their own, which it finds by the name of the
    architecture. Under our name it must find them too; without them, such a checkpoint drafts as a whole.

    transformers_mtp_overrides: by which vLLM 0.33 names the MTP layers of a model in the Transformers backend.
    """
    if transformers_mtp_overrides is not None:
        return STOCK_DRAFT_CONFIG(config, transformers_mtp_overrides)
    (name, *_) = config.architectures or [""]
    if not name.startswith(EXPLICIT_PREFIX):
        return STOCK_DRAFT_CONFIG(config)
    plain = deepcopy(config)
    plain.architectures = [name.removeprefix(EXPLICIT_PREFIX)]
    plain = STOCK_DRAFT_CONFIG(plain)
    return plain if getattr(plain, "n_predict", None) else config
