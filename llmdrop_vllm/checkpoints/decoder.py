"""What a config says of a model's layers, worked out once: how they are laid out, what is gone, what each stores."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self

from llmdrop_vllm.architectures.families import EXPLICIT_PREFIX, family_of
from llmdrop_vllm.architectures.family import Family
from llmdrop_vllm.architectures.wrappers import WRAPPERS, at, place_of, put
from llmdrop_vllm.checkpoints.tower import completed, drops, only_mask, row_of, said_in, tower_of
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.kv_cache.kinds import LayerKind, layer_kinds, readers
from llmdrop_vllm.kv_cache.layout import KVLayout, kv_layout
from llmdrop_vllm.masks.dialects import DIALECTS, without_mask
from llmdrop_vllm.masks.mask import DropMask, config_dict, layer_count, ranges
from llmdrop_vllm.masks.stretches import STRETCH

WITH_ALIBI = frozenset({"bloom", "mpt"})  # and others whose config says so
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length")  # Llama's, GPT-2's, ChatGLM's


@dataclass(frozen=True)
class Decoder:
    """The layers that a config describes. `mask` is what it drops; `family` is None where the table has no row.

    `config` are the decoder's own entries, `whole_config` the model's, of which those of a wrapper's tower are a part.
    """

    architecture: str
    config: Mapping[str, Any]
    family: Family | None
    mask: DropMask
    whole_config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, config: object, architecture: str) -> Self:
        """From a config.json dict or a config object; the architecture's name may bear our prefix.

        Raises MaskError for a mask that cannot be read, and for two that differ, beside a wrapper's tower and on top.
        Without a row a config's mask is nobody's: nothing is dropped.
        """
        plain = architecture.removeprefix(EXPLICIT_PREFIX)
        whole = config_dict(config)
        named, entries = tower_of(config, plain)
        family = family_of(named, entries)
        mask = only_mask(whole, entries) if family else DropMask(layer_count(entries))
        return cls(plain, entries, family, mask, whole)

    @classmethod
    def of_masked(cls, config: object, architecture: str) -> Self | None:
        """As `of`; None where the config says no mask, or one that drops nothing, or the table has no row.

        A wrapper may build its text model with its own config, which tells nothing of layers.
        """
        if not drops(config) or row_of(config, architecture.removeprefix(EXPLICIT_PREFIX)) is None:
            return None
        found = cls.of(config, architecture)
        return found if found.mask else None

    @property
    def whole(self) -> DropMask:
        """The mask that drops nothing."""
        return DropMask(self.mask.num_hidden_layers)

    @property
    def dialects(self) -> tuple[str, ...]:
        """Those in which the model's config says a mask, on top or beside the decoder's layer count."""
        return tuple(name for name in DIALECTS if name in said_in(self.whole_config))

    @property
    def place(self) -> tuple[str, ...]:
        """Keys of the entry of `whole_config` that the decoder's layer count stands in, and a mask beside it."""
        return place_of(self.whole_config) if self.architecture in WRAPPERS else ()

    def config_with(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """The model's config with these entries for its mask, whatever it says itself of one."""
        config = without_mask(self.whole_config)
        return put(config, self.place, without_mask(at(config, self.place)) | dict(entries))

    def override(self, mask: DropMask, others: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """What `--hf-overrides` takes to put a mask in place of whatever the config says, beside other overrides.

        On top, where every engine's config class leaves it, and in place of one beside a wrapper's tower.
        """
        said = mask.to_config("runtime")
        if self.place and DropMask.said_in(at(self.whole_config, self.place)):
            others = put(others, self.place, {**(at(others, self.place) or {}), **said})
        return {**others, **said}

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
        return layer_kinds(completed(self.config))

    def layout(self, mask: DropMask | None = None, wide: Mapping[int, int] | None = None) -> KVLayout:
        """How vLLM stores the KV cache of the attention that a mask keeps, by default the config's own.

        `wide`: layers whose numbers take so many times the bytes of the others'; they are counted as so many more.
        """
        kept = self.mask if mask is None else mask  # a mask that drops nothing is false
        kinds = list(self._windowed(kept))
        for layer, times in (wide or {}).items():
            kinds[layer] = replace(kinds[layer], values=kinds[layer].values * times)
        return kv_layout([kinds[layer] for layer in kept.kept_attention])

    def check(self, mask: DropMask) -> None:
        """Raise MaskError for a mask of another number of layers, or one that drops what a layer does not have, or has
        windows that attention does not take or notice.
        """
        if mask.num_hidden_layers != (depth := self.mask.num_hidden_layers):
            raise MaskError(f"the mask is for {mask.num_hidden_layers} layers; the model has {depth}")
        if self.family is not None:
            no_mixer, no_mlp = self.family.absent(self.whole)
            for what, absent in (("mixer", no_mixer & {*mask.attention}), ("MLP", no_mlp & {*mask.mlp})):
                if absent:
                    raise MaskError(f"the mask drops the {what} of layers {sorted(absent)}, which have none")
            for donor, its in self.readers(mask).items():
                if donor in mask.attention:
                    raise MaskError(
                        f"the mask drops the attention of layer {donor}, whose keys and values layers {ranges(its)} "
                        "read; keep it, or drop theirs too"
                    )
        if mask.windows:
            self._windowed(mask)

    @property
    def keys_are_values(self) -> set[int]:
        """Layers whose attention has one projection for both; of Gemma 4."""
        kinds = self._own_kinds if self.config.get("attention_k_eq_v") else ()
        return {layer for layer, kind in enumerate(kinds) if kind.name == "full"}

    def readers(self, mask: DropMask) -> dict[int, list[int]]:
        """By layer whose keys and values others read, those that do under a mask."""
        if self.family is None or not self.family.unlike_attention:
            return {}
        return readers(self._own_kinds, mask.kept_attention)

    def check_attention_is_left(self, mask: DropMask) -> None:
        """Raise MaskError where a mask leaves no attention, or recurrent mixers only."""
        if not mask.kept_attention:
            raise MaskError(
                f"every one of the {mask.num_hidden_layers} attention sublayers is dropped; vLLM schedules requests by "
                "their KV cache, so at least one must remain"
            )
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
                "windows are not served beside recurrent mixers: vLLM makes blocks as large as their states, and "
                f"windows need blocks that {STRETCH} tokens are a multiple of"
            )
        if mask.windows and (self.config.get("model_type") in WITH_ALIBI or self.config.get("alibi")):
            raise MaskError("the model's ALiBi weighs keys by where they stand, which windows do not keep")
        read_by = self.readers(mask) if mask.windows else {}
        for layer, tokens in mask.windows:
            kind = found[layer]
            if its := read_by.get(layer):
                raise MaskError(f"layer {layer} takes no window: layers {ranges(its)} read its keys and values")
            if kind.name not in ("full", "sliding"):
                raise MaskError(f"layer {layer} has {kind} attention, which takes no window; full or sliding ones do")
            found[layer] = replace(kind, name="window" if kind.span is None else kind.name, span=tokens)
            window, seen = f"a window of {tokens} tokens in layer {layer}", found[layer].seen_in_full
            for said, needed in {"it sees": kind.span, "the model's context is": context}.items():
                if needed is not None and seen is not None and needed <= seen:
                    raise MaskError(f"{window} changes nothing: {said} {needed} tokens")
        return tuple(found)
