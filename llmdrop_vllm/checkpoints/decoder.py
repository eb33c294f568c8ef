"""What a config says of a model's layers, worked out once: how they are laid out, what is gone, what each stores."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from llmdrop_vllm.architectures.families import EXPLICIT_PREFIX, family_of
from llmdrop_vllm.architectures.family import Family
from llmdrop_vllm.errors import CheckpointError, MaskError
from llmdrop_vllm.kv_cache.kinds import LayerKind, layer_kinds
from llmdrop_vllm.kv_cache.layout import KVLayout, kv_layout
from llmdrop_vllm.masks.mask import DropMask, config_dict, layer_count

WITH_ALIBI = frozenset({"bloom", "mpt"})  # and others whose config says so
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length")  # Llama's, GPT-2's, ChatGLM's


@dataclass(frozen=True)
class Decoder:
    """The layers that a config describes. `mask` is what it drops; `family` is None where the table has no row."""

    architecture: str
    config: Mapping[str, Any]
    family: Family | None
    mask: DropMask

    @classmethod
    def of(cls, config: object, architecture: str) -> Self:
        """From a config.json dict or a config object; the architecture's name may bear our prefix.

        Raises MaskError for a mask that cannot be read. Without a row a config's mask is nobody's: nothing is dropped.
        """
        entries = config_dict(config)
        family = family_of(architecture, entries)
        mask = DropMask.from_config(entries) if family else DropMask(layer_count(entries))
        return cls(architecture.removeprefix(EXPLICIT_PREFIX), entries, family, mask)

    @classmethod
    def of_masked(cls, config: object, architecture: str) -> Self | None:
        """As `of`; None where the config says no mask, or one that drops nothing, or the table has no row.

        A wrapper may build its text model with a config of its own, which tells nothing of layers.
        """
        if not DropMask.said_in(config) or family_of(architecture, config) is None:
            return None
        found = cls.of(config, architecture)
        return found if found.mask else None

    @property
    def whole(self) -> DropMask:
        """The mask that drops nothing."""
        return DropMask(self.mask.num_hidden_layers)

    @property
    def context(self) -> int | None:
        """Tokens that the model takes at most; None where the config does not say."""
        return next((int(self.config[key]) for key in CONTEXT_KEYS if self.config.get(key)), None)

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Per layer, what its attention stores while it is there. Raises CheckpointError where the config lacks it."""
        return self._windowed(self.mask)

    @cached_property
    def _own_kinds(self) -> tuple[LayerKind, ...]:
        """Without the mask's windows."""
        return layer_kinds(_completed(self.config))

    def layout(self, mask: DropMask | None = None) -> KVLayout:
        """How vLLM stores the KV cache of the attention that a mask keeps, by default the config's own."""
        kept = self.mask if mask is None else mask  # a mask that drops nothing is false
        kinds = self._windowed(kept)
        return kv_layout([kinds[layer] for layer in kept.kept_attention])

    def check(self, mask: DropMask) -> None:
        """Raise MaskError for a mask that drops what a layer does not have, or has windows that attention does not take
        or notice.
        """
        if self.family is not None:
            no_mixer, no_mlp = self.family.absent(self.whole)
            for what, absent in (("mixer", no_mixer & {*mask.attention}), ("MLP", no_mlp & {*mask.mlp})):
                if absent:
                    raise MaskError(f"the mask drops the {what} of layers {sorted(absent)}, which have none")
        if mask.windows:
            self._windowed(mask)

    def check_attention_is_left(self, mask: DropMask) -> None:
        """Raise MaskError where a mask leaves no attention, or recurrent mixers only."""
        mask.check_attention_is_left()
        is_hybrid = self.family is not None and self.family.layers
        if is_hybrid and not any(self._own_kinds[layer].values for layer in mask.kept_attention):
            raise MaskError(
                "the mask leaves no attention beside recurrent mixers; vLLM makes room for their states by the KV "
                "cache of attention, so at least one must remain"
            )

    def _windowed(self, mask: DropMask) -> tuple[LayerKind, ...]:
        """What layers store under a mask. Raises MaskError as `check` does."""
        found = list(self._own_kinds)
        # Scaled positions reach further than the config's own number.
        scaled = any((self.config.get(key) or {}).get("factor") for key in ("rope_scaling", "rope_parameters"))
        context = None if scaled else self.context
        if mask.windows and any(kind.state for kind in found):
            raise MaskError(
                "windows are not served beside recurrent mixers, whose states set the size of vLLM's blocks"
            )
        for layer, tokens in mask.windows:
            kind = found[layer]
            if kind.name not in ("full", "sliding"):
                raise MaskError(f"layer {layer} has {kind} attention, which takes no window; full or sliding ones do")
            if self.config.get("model_type") in WITH_ALIBI or self.config.get("alibi"):
                raise MaskError("the model's ALiBi weighs keys by where they stand, which windows do not keep")
            found[layer] = replace(kind, name="window" if kind.span is None else kind.name, span=tokens)
            seen = found[layer].seen_in_full
            for said, needed in {"it sees": kind.span, "the model's context is": context}.items():
                if needed is not None and seen is not None and needed <= seen:
                    raise MaskError(
                        f"a window of {tokens} tokens in layer {layer} changes nothing: {said} {needed} tokens"
                    )
        return tuple(found)


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries with those that config.json leaves to the architecture, as far as Transformers is there and knows it.

    Published configs of Gemma 2, for one, name a window, and not the layers that have none.
    """
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return config
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return config
    try:
        known: dict[str, Any] = CONFIG_MAPPING[model_type].from_dict(decoded(config)).to_dict()
    except Exception as error:  # whatever the architecture's own code makes of a config that contradicts itself
        raise CheckpointError(f"the config does not describe a model of type {model_type}: {error}") from error
    return {**config, **known}


def decoded(entries: Any) -> Any:
    """A config.json's entries as they were written: for infinity, which JSON lacks, Transformers puts an object."""
    if isinstance(entries, Mapping):
        if entries.keys() == {"__float__"}:
            return float(entries["__float__"])
        return {key: decoded(value) for key, value in entries.items()}
    return [decoded(value) for value in entries] if isinstance(entries, list) else entries
