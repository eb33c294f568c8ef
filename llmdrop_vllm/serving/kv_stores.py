"""Stores of keys and values that outlive an engine or are shared: what they tell models apart by is no mask.

A full model's keys and values, read under a mask, give wrong text without an error, and so the other way round.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm.config import VllmConfig

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.serving.overrides import may_say

OWN_STORE = "llmdrop_own_store"  # in kv_connector_extra_config: nothing but this model under this mask uses it
WITHIN_THE_ENGINE = frozenset({"SimpleCPUOffloadConnector", "DecodeBenchConnector"})
BY_TOKENS_ALONE = frozenset({"ExampleConnector"})


def check_stores(vllm_config: VllmConfig) -> None:
    """Raise MaskError for a model with a mask whose KV connector could give it what another mask has computed."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    at_run_time = may_say(vllm_config.model_config.hf_overrides, DropMask.said_in)
    for name, extra in _stores(transfer.kv_connector, transfer.kv_connector_extra_config):
        by_tokens = name in BY_TOKENS_ALONE
        if not extra.get(OWN_STORE) and (by_tokens or at_run_time):
            apart = "tokens alone" if by_tokens else "the model's name, which a mask given at run time does not change"
            remedy = "" if by_tokens else "serve a checkpoint that has the mask (llmdrop apply), or "
            raise MaskError(
                f"the KV connector {name} tells what it stores apart by {apart}: keys and values of the full model "
                f"would be read under this mask; {remedy}give it a store of its own and say so, by "
                f"kv_connector_extra_config {json.dumps({OWN_STORE: True})}"
            )


def _stores(name: str, extra: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Connectors that keep something outside of the engine, each with its options."""
    for each in extra.get("connectors", ()):  # of a MultiConnector
        yield from _stores(each.get("kv_connector", ""), each.get("kv_connector_extra_config") or {})
    in_memory = name == "OffloadingConnector" and extra.get("spec_name", "CPUOffloadingSpec") == "CPUOffloadingSpec"
    if not (name in WITHIN_THE_ENGINE or name == "MultiConnector" or in_memory):
        yield name, extra
