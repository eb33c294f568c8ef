"""What happens when vLLM reads a config, before any worker starts: a mask is checked and planned for."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.registry import ModelRegistry

from llmdrop_vllm.architectures.families import EXPLICIT_PREFIX, family_of, no_row
from llmdrop_vllm.architectures.wrappers import PLACES, at
from llmdrop_vllm.checkpoints.checkpoint import check_complete
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.checkpoints.directory import read_config
from llmdrop_vllm.checkpoints.nemotron import ARCHITECTURE as NEMOTRON_NAS
from llmdrop_vllm.checkpoints.tower import said_in, tower_of
from llmdrop_vllm.errors import InputError, MaskError, in_one_line
from llmdrop_vllm.masks.dialects import block_entry
from llmdrop_vllm.masks.mask import DropMask, config_dict
from llmdrop_vllm.serving.drafts import check_what_it_reads, is_draft_head
from llmdrop_vllm.serving.kv_stores import check_stores
from llmdrop_vllm.serving.stages import plan_stages

MODELS_MODULE = "llmdrop_vllm.serving.models"
BACKEND_MODULE = "vllm.model_executor.models.transformers"
SAFETENSORS_FORMATS = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"})


class ConfigHook:
    """Stands before the hook that vLLM has for an architecture, if any, in its MODELS_CONFIG_MAP."""

    def __init__(self, architecture: str, inner: Any) -> None:
        self.architecture, self.inner = architecture, inner

    def verify_and_update_model_config(self, model_config: ModelConfig) -> None:
        """For every model of an engine. What a draft is vLLM works out later, from how it is to draft."""
        if model_config.runner != "draft":
            with _clear_errors():
                checked_decoder(self.architecture, model_config)
        if self.inner is not None:
            self.inner.verify_and_update_model_config(model_config)

    def verify_and_update_config(self, vllm_config: VllmConfig) -> None:
        """For the engine as a whole."""
        with _clear_errors():
            decoder = checked_decoder(self.architecture, vllm_config.model_config)
            if decoder is not None and decoder.mask:
                check_stores(vllm_config)
            plan_stages(decoder, vllm_config)
            _prepare_model(vllm_config.model_config, vllm_config)
            draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
            if draft is not None and is_draft_head(draft.architecture):
                if decoder is not None:
                    check_what_it_reads(draft, decoder)
            elif draft is not None and draft is not vllm_config.model_config:
                checked_decoder(draft.architecture, draft)
                _prepare_model(draft, vllm_config)
        if self.inner is not None:
            self.inner.verify_and_update_config(vllm_config)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Under vLLM's command line an error of the user's ends the process with one line; elsewhere it is raised."""
    try:
        yield
    except InputError as error:
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if Path(sys.argv[0]).name == "vllm" or (spec is not None and spec.name.startswith("vllm.")):
            raise SystemExit(f"llmdrop: error: {in_one_line(error)}") from None
        raise


def checked_decoder(architecture: str, model_config: ModelConfig) -> Decoder | None:
    """What the model will be served as; None for a config without a mask, which is none of our business.

    Raises MaskError for a mask that cannot be served.
    """
    config = model_config.hf_config
    plain = architecture.removeprefix(EXPLICIT_PREFIX)
    tower, entries = tower_of(config, plain)
    if family_of(tower, entries) is None:
        for each in (config, model_config.hf_text_config):
            if dialects := DropMask.dialects_that_drop(each):
                raise MaskError(
                    f"the config has a drop mask ({', '.join(dialects)}), and the model would be served undropped: "
                    f"{no_row(tower or plain)}"
                )
        if plain == architecture:
            return None
    _check_config_file(model_config, plain)
    _check_place(config)
    if not (said := said_in(config)):
        if plain != architecture:
            raise MaskError(f"{architecture} promises a drop mask, and the config has none in any dialect")
        return None
    decoder = Decoder.of(config, architecture)
    if decoder.mask:
        _check_registered(architecture, plain, tower)
    if "nemotron-nas" in said and architecture != NEMOTRON_NAS:
        _check_uniform(model_config.hf_text_config)
    decoder.check_attention_is_left(decoder.mask)
    decoder.check(decoder.mask)
    return decoder


def _check_config_file(model_config: ModelConfig, architecture: str) -> None:
    """Refuse a mask in config.json that did not reach vLLM's config: null, or another file was read instead."""
    path = Path(model_config.model) / "config.json"
    if model_config.hf_config_path is not None or not path.is_file():
        return
    entries = read_config(path.parent)
    unseen = set(said_in(entries)).difference(said_in(model_config.hf_config))
    if unseen and Decoder.of(entries, architecture).mask:
        raise MaskError(
            f"{path} has a drop mask ({', '.join(sorted(unseen))}) that vLLM does not see, for it took the config from "
            "another file; use --config-format hf --load-format hf"
        )


def _check_place(config: PretrainedConfig) -> None:
    """Refuse a mask that was put beside a wrapper's tower under a name that the config's class does not read."""
    entries, seen = config_dict(config), said_in(config)
    for place in PLACES:
        found = at(entries, place)
        if isinstance(found, Mapping) and set(DropMask.said_in(found)).difference(seen):
            kind = type(config).__name__
            raise MaskError(f"{'.'.join(place)} has a drop mask that {kind} does not read; put it on top of the config")


def _check_registered(architecture: str, plain: str, tower: str) -> None:
    """Refuse to go on where another plugin or an option has taken the architecture: its class knows no masks.

    And where Transformers builds a wrapper's tower: in vLLM's backend for it, layers are replaced after they were made,
    by the class that is served.
    """
    entry = ModelRegistry.models[architecture]
    if getattr(entry, "module_name", None) != MODELS_MODULE:
        raise MaskError(
            f"the config has a drop mask, but {architecture} is registered as {entry}, which would ignore it"
        )

    built_by = getattr(ModelRegistry.models.get(tower), "class_name", "")
    if tower != plain and f"@{BACKEND_MODULE}." in built_by:
        raise MaskError(
            f"the config has a drop mask, but {plain} has vLLM's Transformers backend build its {tower}, from "
            "which nothing can be dropped there"
        )


def _check_uniform(config: Any) -> None:
    """Refuse block configs whose kept sublayers differ from the config's own widths: this architecture has but one."""
    kv_heads = getattr(config, "num_key_value_heads", None)
    expected = {
        ("attention", "n_heads_in_group"): kv_heads and getattr(config, "num_attention_heads", 0) // kv_heads,
        ("ffn", "intermediate_size"): getattr(config, "intermediate_size", None),
    }
    for layer, block in enumerate(config.block_configs):
        for (part, key), value in expected.items():
            settings = block_entry(block, part)
            found = block_entry(settings, key)
            if found is not None and found != value and not block_entry(settings, "no_op"):
                raise MaskError(
                    f"block_configs[{layer}].{part}.{key} is {found!r}, the config's is {value!r}; "
                    "sublayers of different widths need the architecture DeciLMForCausalLM"
                )


def _prepare_model(model_config: ModelConfig, vllm_config: VllmConfig) -> None:
    """For each model with a mask: look at its shards' headers, and keep its compiled code apart from the full model's.

    A damaged shard or a missing weight costs seconds here and minutes in a worker. Without our mark, code that vLLM
    compiled before this package was installed has the same cache key, and would be loaded.
    """
    decoder = Decoder.of_masked(model_config.hf_config, model_config.architecture)
    if decoder is None or decoder.family is None:
        return
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config.setdefault("llmdrop", []).append(decoder.mask.summary())
    directory = Path(model_config.model)
    if directory.is_dir() and vllm_config.load_config.load_format in SAFETENSORS_FORMATS:
        check_complete(directory, decoder.family, decoder.mask)
