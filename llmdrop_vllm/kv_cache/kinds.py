"""What each layer's attention stores of the tokens it has seen, read from a config alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.kv_cache.states import state_blocks, state_values
from llmdrop_vllm.masks.dialects import block_entry
from llmdrop_vllm.masks.layer_types import HYBRID, NO_MIXER, RECURRENT, layer_types
from llmdrop_vllm.masks.mask import layer_count
from llmdrop_vllm.masks.stretches import STRETCH, span

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
SHARED = "shared"

# Models with latent attention for which vLLM stores whole heads all the same.
WHOLE_HEADS = frozenset({"minicpm3"})
# Models whose values are of another size than their keys; elsewhere the entry is about latent attention.
OWN_VALUE_SIZE = frozenset({"mimo_v2", "mimo_v2_flash"})
# What attention is that sees less than all, and the entry that says how much.
SPANS = {"sliding_attention": ("sliding", "sliding_window"), "chunked_attention": ("chunked", "attention_chunk_size")}
# Entries that hold for all layers of one kind, and the entries that they stand in for there.
ENTRIES_OF_KIND = {
    "sliding_attention": {f"swa_{entry}": entry for entry in ("num_key_value_heads", "head_dim", "v_head_dim")},
    "full_attention": {"num_global_key_value_heads": "num_key_value_heads", "global_head_dim": "head_dim"},
}


@dataclass(frozen=True)
class LayerKind:
    """What a layer keeps of each token, and of how many.

    `name` is `full`, `compressed` (one latent vector stands for all keys and values), `sliding` (only the last `span`
    tokens are needed), `window` (the first stretch and a window of `span` tokens: `stretches`), `chunked` (tokens see
    those of their chunk of `span`), `shared` (it reads what the layer `donor` keeps) or `none`. `values` are the
    numbers that a token takes, in the KV cache's dtype, `state` those of a recurrent mixer's state, of which a request
    keeps `state_blocks`.
    """

    name: str
    values: int = 1
    span: int | None = None
    state: int = 0
    state_blocks: int = 2
    donor: int | None = None

    def __str__(self) -> str:
        number = self.span if self.donor is None else self.donor
        name = self.name if number is None else f"{self.name} {number}"
        parts = (name if "attention" in self.mixers else "", f"state {self.state}" if self.state else "")
        return " + ".join(filter(None, parts)) or self.name

    @classmethod
    def parse(cls, text: str, values: int = 1) -> Self:
        """From what `str` of a kind gives: `sliding 4096`."""
        *attention, last = text.split(" + ")
        if last.startswith("state "):
            state = int(last.removeprefix("state "))
            return replace(cls.parse(attention[0], values), state=state) if attention else cls(NO_MIXER, 0, state=state)
        name, _, number = text.partition(" ")
        if name == SHARED:
            return cls(SHARED, 0, donor=int(number))
        return cls(name, values, int(number) if number.isdecimal() else None)

    @property
    def mixers(self) -> tuple[str, ...]:
        """What mixes tokens in the layer: `attention`, `recurrent`, or both."""
        has_attention = bool(self.values) or self.donor is not None
        return ("attention",) * has_attention + ("recurrent",) * bool(self.state)

    @property
    def parts(self) -> tuple[Self, ...]:
        """What is stored apart: keys and values, and the state."""
        attention = (replace(self, state=0),) if self.values else ()
        return (*attention, replace(self, name=NO_MIXER, values=0, span=None)) if self.state else attention

    def tokens_held(self, context: int, in_flight: int = 0) -> int:
        """Tokens of a request of `context` whose keys and values must be there at once, at most.

        `in_flight` of them may be computed together, and what they push out of a window goes only after that.
        """
        if self.seen_in_full is None:
            return context
        return min(context, self.seen_in_full - self.begins_anywhere + in_flight)

    @property
    def begins_anywhere(self) -> bool:
        """Whether what is held may begin within a block, as vLLM counts it."""
        return self.name in ("sliding", "window")

    @property
    def seen_in_full(self) -> int | None:
        """Tokens of the longest context of which nothing is out of sight; None where nothing ever is."""
        return STRETCH + span(self.span) if self.name == "window" and self.span else self.span


def readers(kinds: Sequence[LayerKind], kept_attention: Iterable[int]) -> dict[int, list[int]]:
    """By layer whose keys and values others read, those of the kept attentions that do: without it they cannot be."""
    found: dict[int, list[int]] = {}
    for layer in kept_attention:
        if (donor := kinds[layer].donor) is not None:
            found.setdefault(donor, []).append(layer)
    return found


def layer_kinds(config: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    """Per decoder layer, what its attention or recurrent mixer stores if it has any.

    Some architectures mix kinds though their config.json does not say it: Transformers' config objects do. Raises
    CheckpointError for a config that does not say the sizes, or says them for fewer layers than it has.
    """
    depth = layer_count(config)
    types = layer_types(config, depth) or [_usual_type(config)] * depth
    # Of Gemma 3n and 4: so many layers read what the last one of their type before them keeps.
    own = depth - (config.get("num_kv_shared_layers") or 0)
    kinds = [_kind(_settings(config, layer, types[layer]), types[layer]) for layer in range(own)]
    donors = {types[layer]: layer for layer in range(own)}
    if lacking := {*types[own:depth]} - donors.keys():
        raise CheckpointError(f"layers from {own} on read others' keys and values, and none before has {min(lacking)}")
    return (*kinds, *(LayerKind(SHARED, 0, donor=donors[types[layer]]) for layer in range(own, depth)))


def dtype_bytes(dtype: str) -> int:
    """Bytes of one value of a KV cache in this dtype."""
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"KV cache dtype is {dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def _usual_type(config: Mapping[str, Any]) -> str:
    has_window = config.get("sliding_window") and config.get("use_sliding_window", True)
    return "sliding_attention" if has_window else "full_attention"


def _settings(config: Mapping[str, Any], layer: int, kind: str) -> Mapping[str, Any]:
    """The config's entries as they hold for one layer."""
    own = {entry: config[key] for key, entry in ENTRIES_OF_KIND.get(kind, {}).items() if config.get(key)}
    if (other := config.get("attention_other_setting") or {}).get("attention_type") == kind:  # Step 3.5
        own |= {"num_key_value_heads": other["num_attention_groups"], "head_dim": other.get("head_dim")}
    if blocks := config.get("block_configs"):  # Nemotron-NAS
        # What is gone is taken for what is left.
        attention = (block_entry(block, "attention") for block in (blocks[layer], *blocks))
        if shared_by := next(filter(None, (block_entry(each, "n_heads_in_group") for each in attention)), None):
            own["num_key_value_heads"] = config["num_attention_heads"] // shared_by
    layers = config.get("per_layer_config") or {}  # Transformers' heterogeneous configs
    return {**config, **own, **(layers.get(str(layer)) or layers.get(layer) or {})}


def _kind(config: Mapping[str, Any], layer_type: str) -> LayerKind:
    kind = LayerKind(NO_MIXER, 0) if layer_type in (RECURRENT, NO_MIXER) else _attention_kind(config, layer_type)
    if layer_type in (RECURRENT, HYBRID):
        kind = replace(kind, state=state_values(config), state_blocks=state_blocks(config))
    return kind


def _attention_kind(config: Mapping[str, Any], layer_type: str) -> LayerKind:
    if config.get("kv_lora_rank") and config.get("model_type") not in WHOLE_HEADS:
        return LayerKind("compressed", config["kv_lora_rank"] + config.get("qk_rope_head_dim", 0))
    name, entry = SPANS.get(layer_type, ("full", ""))
    return LayerKind(name, _values_of_heads(config), config.get(entry))


def _values_of_heads(config: Mapping[str, Any]) -> int:
    """Keys and values of the heads that have some of their own: heads x (size of a key + size of a value)."""
    heads = _first(config, "num_attention_heads", "n_head")
    hidden = _first(config, "hidden_size", "n_embd", "n_embed") or 0
    kv_heads = _kv_heads(config) or heads
    head_dim = config.get("head_dim") or (heads and hidden // heads)
    if config.get("kv_lora_rank"):
        kv_heads, head_dim = heads, config.get("qk_nope_head_dim", 0) + config.get("qk_rope_head_dim", 0)
    if not kv_heads or not head_dim:
        raise CheckpointError("the config lacks num_attention_heads or hidden_size, so the KV cache cannot be counted")
    value_dim = config.get("v_head_dim") if config.get("model_type") in OWN_VALUE_SIZE else None
    return int(kv_heads * (head_dim + (value_dim or head_dim)))


def _kv_heads(config: Mapping[str, Any]) -> Any:
    """Heads that have keys and values of their own, where the config names them: Falcon in two ways, by its layout."""
    if config.get("new_decoder_architecture"):
        return config.get("num_kv_heads")
    if config.get("multi_query"):
        return 1
    if config.get("multi_query_attention"):
        return config.get("multi_query_group_num")
    return _first(config, "num_key_value_heads", "num_attention_groups")


def _first(config: Mapping[str, Any], *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key)), None)
