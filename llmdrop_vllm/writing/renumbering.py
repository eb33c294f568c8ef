"""Layers that lost attention and MLP go for good: what is left, numbered anew, is an ordinary model of fewer layers.

Engines tell layers apart by their numbers, each in its own way, and by entries of the config that no list here has in
full. So the new config is judged by what Transformers builds of it: layer by layer what it built before.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from llmdrop_vllm.architectures.names import IN_LAYER, layer_in
from llmdrop_vllm.architectures.wrappers import WRAPPERS
from llmdrop_vllm.artifacts import HEAL_FILE, MASK_FILE, SCORES_FILE, Provenance
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint, MaskedCheckpoint
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.checkpoints.tower import completed
from llmdrop_vllm.errors import CheckpointError, MaskError
from llmdrop_vllm.masks.dialects import without_mask
from llmdrop_vllm.masks.mask import LAYER_COUNT_KEYS, DropMask

# Entries that list layers by their numbers, and those that count the layers before a change.
LISTED = ("mlp_only_layers", "moe_layers", "moe_layers_enum", "rope_scaling_layers", "use_rope_layers")
FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
LAST = ("moe_layer_end_index",)
# Those by which every so many layers differ, in engines if not in Transformers.
EVERY = (
    *("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval", "moe_layer_freq"),
    *("moe_every_n_layers", "expert_layer_period", "attn_layer_period", "layer_group_size"),
)
# Lists with one entry a layer, besides any list that is as long as there are layers but those of other things.
TYPES = ("layer_types", "layers_block_type", "hybrid_override_pattern", "mlp_layer_types", "no_rope_layers")
OF_OTHERS = re.compile("token|architectures|multipliers")
# What quantizers say of layers beside config.json.
QUANTIZERS_FILES = ("hf_quant_config.json", "quantize_config.json")
RENUMBERED_FILE = "llmdrop_renumbered.json"
# What a layer that adds nothing may still have: it prepares inputs of what is gone.
HARMLESS = re.compile(r"norm|\.ln_|inv_freq")
# A module's own number, by which layers differ whatever the config says.
OWN_NUMBER = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index"})
# A layer in a module's name or in a regular expression of such, and what may be one: a range, for example.
IN_NAMES = re.compile(r"(?:layers|\bh|blocks)\\*\.(\d+)(?![\d?*+{(\[|])")
UNCLEAR = re.compile(r"layers[\\.]*+(?!\[0-9\])[(\[\d]")


def renumbered(masked: MaskedCheckpoint) -> tuple[MaskedCheckpoint, dict[str, Any]]:
    """The checkpoint without layers of which nothing is left, under a mask of the rest; and JSON files by name to write
    in place of its own, None for those that only speak of the old numbers.

    Raises MaskError and CheckpointError for what cannot be renumbered.
    """
    source = masked.checkpoint
    without_mixer, without_mlp = source.family.absent(masked.mask)
    gone = without_mixer & without_mlp
    _check_can_go(masked, gone)
    depth = masked.mask.num_hidden_layers
    layers = Renumbering(depth, tuple(layer for layer in range(depth) if layer not in gone))
    config = MappingProxyType(layers.config(source.decoder))
    tensors = {
        name: replace(tensor, name=name)
        for old, tensor in source.tensors.items()
        if (name := layers.moved(old, IN_LAYER.match(old))) is not None
    }
    decoder = Decoder.of(config, source.architecture)
    new = replace(source, config=config, decoder=decoder, tensors=MappingProxyType(tensors))
    _check_layers(source, new, layers.numbers)
    return new.under(layers.mask(masked.mask)), layers.others(source)


@dataclass(frozen=True)
class Renumbering:
    """Which of `depth` layers stay, ascending: the first of `kept` becomes layer 0."""

    depth: int
    kept: tuple[int, ...]

    @cached_property
    def numbers(self) -> Mapping[int, int]:
        """Of the layers that stay, the new ones by the old ones."""
        return {layer: number for number, layer in enumerate(self.kept)}

    def number(self, layer: int) -> int | None:
        """The new number of a layer; None where it is gone."""
        # Layers of draft heads stand behind the decoder's, and move up with them.
        return self.numbers.get(layer) if layer < self.depth else layer - self.depth + len(self.kept)

    def moved(self, text: str, found: re.Match[str] | None) -> str | None:
        """A text with the new number of the layer that is found in it, if any; None where that is gone."""
        if found is None:
            return text
        number = self.number(int(found[1]))
        return None if number is None else f"{text[: found.start(1)]}{number}{text[found.end(1) :]}"

    def others(self, source: Checkpoint) -> dict[str, Any]:
        """Files to write in place of the source's, by name; None for those that only speak of the old numbers."""
        found: dict[str, Any] = dict.fromkeys((SCORES_FILE, MASK_FILE, HEAL_FILE))
        for name in QUANTIZERS_FILES:
            if (path := source.directory / name).is_file():
                found[name] = self.names_in(json.loads(path.read_bytes()))
        return found | {RENUMBERED_FILE: {"layers": [*self.kept], "provenance": Provenance.of(source).model_dump()}}

    def mask(self, mask: DropMask) -> DropMask:
        """What is left of a mask for the layers that stay."""
        new = self.numbers
        attention, mlp = (tuple(new[layer] for layer in gone if layer in new) for gone in (mask.attention, mask.mlp))
        windows = tuple((new[layer], tokens) for layer, tokens in mask.windows if layer in new)
        return DropMask(len(self.kept), attention, mlp, windows)

    def config(self, decoder: Decoder) -> dict[str, Any]:
        """The model's entries for the layers that stay, without any mask."""
        entries = without_mask(decoder.whole_config)
        known = completed(entries)
        told = {key: known[key] for key in TYPES if isinstance(known.get(key), list) and len({*known[key]}) > 1}
        drafts = entries.get("num_nextn_predict_layers") or 0
        return {key: self._entry(key, value, drafts) for key, value in {**told, **entries}.items()}

    def names_in(self, settings: Any) -> Any:
        """JSON that names layers, such as what a quantizer left alone, with new numbers and without what is gone.

        Raises CheckpointError for a name whose number cannot be told.
        """
        if isinstance(settings, Mapping):
            pairs = ((self._text(key), self.names_in(value)) for key, value in settings.items())
            return {key: value for key, value in pairs if key is not None}
        if isinstance(settings, list):
            return [each for each in map(self.names_in, settings) if each is not None]
        return self._text(settings) if isinstance(settings, str) else settings

    def _entry(self, key: str, value: Any, drafts: int) -> Any:
        if key in LAYER_COUNT_KEYS and value == self.depth:
            return len(self.kept)
        if key in LISTED and value:
            return self._listed(value)
        if key in FIRST and isinstance(value, int):
            return sum(layer < value for layer in self.kept)
        if key in LAST and isinstance(value, int) and value >= 0:
            return sum(layer <= value for layer in self.kept) - 1
        if key == "per_layer_config":  # of widths, as those of masks are gone
            return {str(new): value[str(old)] for old, new in self.numbers.items() if str(old) in value}
        if key == "quantization_config":
            return self.names_in(value)
        if key == "scale_depth":  # of MiniCPM, which divides it by the root of the number of layers
            return value * math.sqrt(len(self.kept) / self.depth)
        if key in EVERY and isinstance(value, int) and value > 1:
            self._check_phase(key, value)
        if not _is_by_layer(key, value, self.depth, drafts):
            return value
        taken = [value[layer] for layer in (*self.kept, *range(self.depth, len(value)))]
        return "".join(taken) if isinstance(value, str) else taken

    def _listed(self, value: Any) -> Any:
        if isinstance(value, str):
            return ",".join(map(str, self._listed([int(layer) for layer in value.split(",")])))
        return [new for new in map(self.number, value) if new is not None]

    def _check_phase(self, key: str, period: int) -> None:
        for old, new in self.numbers.items():
            if (old - new) % period:
                raise CheckpointError(
                    f"{key} is {period}: every so many layers differ by their numbers, and layer {old} would become "
                    f"{new}; a mask that takes {period} whole layers at a time can be renumbered"
                )

    def _text(self, text: str) -> str | None:
        """A module's name, or a pattern of such; None where its layer is gone."""
        found = IN_NAMES.search(text)
        if found is None and UNCLEAR.search(text):
            raise CheckpointError(f"the quantization's {text!r} names layers in a way that cannot be renumbered")
        return self.moved(text, found)


def _check_can_go(masked: MaskedCheckpoint, gone: Collection[int]) -> None:
    checkpoint = masked.checkpoint
    if not gone:
        raise MaskError(f"no layer goes as a whole, so none can be renumbered: {masked.mask.summary()}")
    if checkpoint.architecture in WRAPPERS:
        raise MaskError(f"layers of {checkpoint.architecture} cannot be renumbered: its other parts may refer to them")
    for name in masked.kept:
        if layer_in(name) in gone and not HARMLESS.search(name):
            raise MaskError(f"a layer that {name} belongs to does more than its attention and MLP, and cannot go")


def _is_by_layer(key: str, value: Any, depth: int, drafts: int) -> bool:
    if key in TYPES and isinstance(value, list | str):
        return len(value) >= depth
    return isinstance(value, list) and not OF_OTHERS.search(key) and len(value) in (depth, depth + drafts)


def _check_layers(before: Checkpoint, after: Checkpoint, numbers: Mapping[int, int]) -> None:
    """Raise CheckpointError unless Transformers builds each kept layer as it was."""
    from llmdrop_vllm import hf

    old, new = (
        hf.decoder_layers(hf.on_meta(hf.transformers_config(whole)), whole.mask.num_hidden_layers)
        for whole in (each.under(each.decoder.whole) for each in (before, after))
    )
    for layer, number in numbers.items():
        was, would_be = _traits(old[layer]), _traits(new[number])
        if differing := sorted(name for name in {*was, *would_be} if was.get(name) != would_be.get(name)):
            name = differing[0]
            raise CheckpointError(
                f"layer {layer} as layer {number} would not be the same: {name} is {was.get(name)!r}, and would be "
                f"{would_be.get(name)!r}"
            )


def _traits(layer: Any) -> dict[str, Any]:
    """What tells a layer from others: shapes of its parameters, and values that its modules keep."""
    found: dict[str, Any] = {name: tuple(each.shape) for name, each in layer.state_dict().items()}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in OWN_NUMBER and isinstance(value, int | float | str | None):
                found[f"{path}.{name}".lstrip(".")] = value
    return found
