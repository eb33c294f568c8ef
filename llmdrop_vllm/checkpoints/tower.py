"""The decoder in a model's config: a wrapper describes it in an entry of its own, any other model on top."""

from collections.abc import Mapping
from typing import Any

from llmdrop_vllm.architectures.families import family_of
from llmdrop_vllm.architectures.family import Family
from llmdrop_vllm.architectures.wrappers import WRAPPERS, at, place_of
from llmdrop_vllm.errors import CheckpointError, MaskError
from llmdrop_vllm.masks.dialects import without_mask
from llmdrop_vllm.masks.mask import DropMask, config_dict, has_layer_count, layer_count


def tower_of(config: object, architecture: str) -> tuple[str, Mapping[str, Any]]:
    """(architecture of the decoder, its entries), from a config.json dict or a config object of this architecture.

    A wrapper's are told by its own config class, where it is known: many a config.json leaves most of them out. The
    architecture is empty where a wrapper's config does not name its decoder's.
    """
    if architecture not in WRAPPERS:
        return architecture, config_dict(config)
    entries = _own_entries(config)
    if isinstance(config, Mapping):
        known = known_config(config)
        told = {} if known is None else config_dict(known.get_text_config())
        # vLLM may have a class of its own for a type of model, and this one not read the same entries.
        heeded = told and (not has_layer_count(entries) or layer_count(entries) == layer_count(told))
        entries = {**entries, **told} if heeded else completed(entries)
    return WRAPPERS[architecture] or _named(entries), entries


def row_of(config: object, architecture: str) -> Family | None:
    """The row of the family table for the decoder that a config describes; None where there is none."""
    return family_of(*tower_of(config, architecture))


def said_in(config: object) -> tuple[str, ...]:
    """As `DropMask.said_in`, on top of the config and beside its tower's entries."""
    found = (each for entries in (config, _own_entries(config)) for each in DropMask.said_in(entries))
    return tuple(dict.fromkeys(found))


def drops(config: object) -> bool:
    """Whether a config asks to drop anything, on top or beside its tower's entries, without judging what it says."""
    return any(DropMask.dialects_that_drop(entries) for entries in (config, _own_entries(config)))


def only_mask(config: Mapping[str, Any], tower: Mapping[str, Any]) -> DropMask:
    """The mask beside the tower's entries, or the one on top of the config. Raises MaskError for two that differ."""
    on_top = {key: config[key] for key in config.keys() - without_mask(config).keys()}
    beside = DropMask.from_config(tower)
    if not on_top or tower is config:
        return beside
    mask = DropMask.from_config({**without_mask(tower), **on_top})
    if DropMask.said_in(tower) and mask.effect != beside.effect:
        raise MaskError(
            f"the config's drop masks disagree: on top it says {mask.summary()}; beside its text model's layers "
            f"{beside.summary()}; keep one of them"
        )
    return mask


def known_config(config: Mapping[str, Any]) -> Any:
    """The Transformers config of these entries; None where Transformers is not there, or does not know the type."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return None
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return None
    kind = CONFIG_MAPPING[model_type]
    try:
        return kind.from_dict(kind._decode_special_floats(dict(config)))
    except Exception as error:  # whatever the architecture's own code makes of a config that contradicts itself
        raise CheckpointError(f"the config does not describe a model of type {model_type}: {error}") from error


def completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries with those that config.json leaves to the architecture.

    Published configs of Gemma 2, for one, name a window, and not the layers that have none.
    """
    known = known_config(config)
    return config if known is None else {**config, **known.to_dict()}


def _own_entries(config: object) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return at(config, place_of(config))
    get_text_config = getattr(config, "get_text_config", None)
    return config_dict(config if get_text_config is None else get_text_config())


def _named(entries: Mapping[str, Any]) -> str:
    """The architecture that a tower's entries name, as vLLM finds it: by its name, else by the type of the model."""
    if names := entries.get("architectures"):
        return str(names[0])
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as by_type
    except ImportError:
        return ""
    name = by_type.get(entries.get("model_type"), "")
    return name if isinstance(name, str) else str(name[0])
