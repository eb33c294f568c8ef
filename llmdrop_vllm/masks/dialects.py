"""The dialects in which a config says what is dropped: what each means, read strictly and written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from llmdrop_vllm.errors import MaskError

NEMOTRON_NO_OP = (("attention", "attention"), ("ffn", "mlp"))  # key in a block config, sublayer it stands for
# Where the rank order is kept in dialects that have no place for it.
RANK_ORDER = "llmdrop_rank_order"
# Beside any dialect: the last so many tokens that a layer attends to, by layer. None of the dialects can say that.
WINDOWS = "llmdrop_windows"

Entries = Mapping[str, Any]
Indices = tuple[tuple[int, ...], tuple[int, ...]]  # attention layers, MLP layers
Windows = tuple[tuple[int, int], ...]  # layer and tokens, ascending


def is_int(value: object) -> TypeGuard[int]:
    """An integer that is not a boolean."""
    # bool is a subclass of int: without this, [False, True] would read as layers 0 and 1.
    return isinstance(value, int) and not isinstance(value, bool)


def check_indices(key: str, indices: Iterable[object], num_layers: int) -> None:
    """Raise MaskError unless these are layers of the model, each named once."""
    seen = set()
    for index in indices:
        if not is_int(index):
            raise MaskError(f"{key} holds {index!r}; expected layer indices or one boolean per layer")
        if not 0 <= index < num_layers:
            raise MaskError(f"{key} names layer {index}; the model's {num_layers} layers are 0 to {num_layers - 1}")
        if index in seen:
            raise MaskError(f"{key} names layer {index} twice; expected each layer once")
        seen.add(index)


def _read_llm_drop(config: Entries, num_layers: int) -> Indices:
    attention, mlp = (
        _read_index_or_boolean_list(key, config.get(key, []), num_layers) for key in ("drop_attn_list", "drop_mlp_list")
    )
    return attention, mlp


def _read_index_or_boolean_list(key: str, value: object, num_layers: int) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise MaskError(f"{key} is {value!r}; expected a list of layer indices or of one boolean per layer")
    booleans = [entry for entry in value if isinstance(entry, bool)]
    if not booleans:
        check_indices(key, value, num_layers)
        return tuple(value)
    if len(booleans) != len(value):
        odd = next(entry for entry in value if not isinstance(entry, bool))
        raise MaskError(f"{key} mixes booleans with {odd!r}; expected only indices or only booleans")
    if len(booleans) != num_layers:
        raise MaskError(f"{key} holds {len(booleans)} booleans; expected one for each of the {num_layers} layers")
    return tuple(layer for layer, gone in enumerate(booleans) if gone)


def _read_transformers(config: Entries, num_layers: int) -> Indices:
    layers = config["per_layer_config"]
    if not isinstance(layers, Mapping):
        raise MaskError(f"per_layer_config is {layers!r}; expected an object keyed by layer index")
    skipped: dict[str, list[int]] = {"attention": [], "mlp": []}
    for key, overrides in layers.items():
        where = f"per_layer_config[{key!r}]"
        if not (is_int(key) or (isinstance(key, str) and key.isdecimal())):
            raise MaskError(f"per_layer_config has the key {key!r}; expected layer indices")
        if not isinstance(overrides, Mapping):
            raise MaskError(f"{where} is {overrides!r}; expected an object")
        if extra := sorted(set(overrides) - {"skip"}):
            raise MaskError(f"{where} overrides {', '.join(extra)}; only 'skip' is supported")
        names = [] if overrides.get("skip") is None else overrides["skip"]
        if not isinstance(names, list | tuple | set):
            raise MaskError(f"{where}.skip is {names!r}; expected a list of 'attention' and 'mlp'")
        for name in names:
            if name not in skipped:
                raise MaskError(f"{where}.skip holds {name!r}; expected 'attention' or 'mlp'")
            skipped[name].append(int(key))
    for name, indices in skipped.items():
        check_indices(f"per_layer_config (skip {name})", indices, num_layers)
    return tuple(sorted(skipped["attention"])), tuple(sorted(skipped["mlp"]))


def _read_nemotron(config: Entries, num_layers: int) -> Indices:
    blocks = config["block_configs"]
    if not isinstance(blocks, Sequence) or isinstance(blocks, str):
        raise MaskError(f"block_configs is {blocks!r}; expected a list of one object per layer")
    if len(blocks) != num_layers:
        raise MaskError(f"block_configs describes {len(blocks)} layers; the model has {num_layers}")
    gone: dict[str, list[int]] = {"attention": [], "mlp": []}
    for layer, block in enumerate(blocks):
        for key, sublayer in NEMOTRON_NO_OP:
            where = f"block_configs[{layer}].{key}"
            settings = block_entry(block, key)
            if settings is None:
                raise MaskError(f"{where} is missing; expected an object with 'no_op'")
            if block_entry(settings, "replace_with_linear"):
                raise MaskError(f"{where}.replace_with_linear is set; only kept and no_op sublayers are supported")
            no_op = block_entry(settings, "no_op")
            if not isinstance(no_op, bool | None):
                raise MaskError(f"{where}.no_op is {no_op!r}; expected true or false")
            if no_op:
                gone[sublayer].append(layer)
    return tuple(gone["attention"]), tuple(gone["mlp"])


def _is_of_widths(config: Entries) -> bool:
    """Whether per_layer_config tells head sizes and the like, and skips nothing: then it says no mask."""
    layers = config.get("per_layer_config")
    overrides = layers.values() if isinstance(layers, Mapping) else ()
    told = [each for each in overrides if isinstance(each, Mapping)]
    return any({*each} - {"skip"} for each in told) and not any(each.get("skip") for each in told)


def _is_of_block_types(config: Entries) -> bool:
    """Whether block_configs tells what Nemotron-H's layers are and how wide, not what they go without."""
    blocks = config.get("block_configs")
    return (
        isinstance(blocks, Sequence)
        and bool(blocks)
        and all(block_entry(block, "block_type") is not None for block in blocks)
        and not any(block_entry(block, key) for block in blocks for key, _ in NEMOTRON_NO_OP)
    )


def block_entry(block: object, key: str) -> Any:
    """A field of a Nemotron-NAS block config, which is a dict on disk and an object in that family's config class."""
    return block.get(key) if isinstance(block, Mapping) else getattr(block, key, None)


def _asks_llm_drop(config: Entries) -> bool:
    values = (config.get(key) for key in ("drop_attn_list", "drop_mlp_list"))
    return any(any(entry is not False for entry in value) if isinstance(value, list) else value for value in values)


def _asks_transformers(config: Entries) -> bool:
    layers = config.get("per_layer_config")
    overrides = layers.values() if isinstance(layers, Mapping) else ()
    return any(isinstance(entry, Mapping) and bool(entry.get("skip")) for entry in overrides)


def _asks_nemotron(config: Entries) -> bool:
    blocks = config.get("block_configs")
    settings = (block_entry(block, key) for block in blocks or () for key, _ in NEMOTRON_NO_OP)
    return any(block_entry(each, "no_op") is True for each in settings)


def rank_order(config: Entries, indices: Indices, num_layers: int) -> Indices:
    """The same layers in the order that the config keeps beside its mask, if any. Raises MaskError for other layers."""
    if RANK_ORDER not in config:
        return indices
    order = config[RANK_ORDER]
    if not isinstance(order, Mapping) or set(order) != {"attention", "mlp"}:
        raise MaskError(f"{RANK_ORDER} is {order!r}; expected an object with 'attention' and 'mlp'")
    attention, mlp = (
        _read_index_or_boolean_list(f"{RANK_ORDER}.{key}", order[key], num_layers) for key in ("attention", "mlp")
    )
    if (set(attention), set(mlp)) != (set(indices[0]), set(indices[1])):
        raise MaskError(
            f"{RANK_ORDER} names other layers than the mask: attention {sorted(attention)} and MLP {sorted(mlp)}, "
            f"the mask drops {sorted(indices[0])} and {sorted(indices[1])}; remove {RANK_ORDER}"
        )
    return attention, mlp


def windows_of(layers: Iterable[int], tokens: int | None) -> Windows:
    """One window for each of the layers. Raises MaskError unless both are given, or neither."""
    layers = tuple(layers)
    if bool(layers) != (tokens is not None):
        raise MaskError("--window-attention says in which layers, --window how many tokens; give both")
    check_indices("--window-attention", layers, max(layers, default=0) + 1)
    return () if tokens is None else tuple((layer, tokens) for layer in sorted(layers))


def read_windows(config: Entries) -> Windows:
    """What the config says of windows. Raises MaskError for anything but an object of numbers by layer."""
    found = config.get(WINDOWS, {})
    if not isinstance(found, Mapping):
        raise MaskError(f'{WINDOWS} is {found!r}; expected an object like {{"3": 1024}}, of tokens by layer')
    for key in found:
        if not (is_int(key) or (isinstance(key, str) and key.isdecimal())):
            raise MaskError(f"{WINDOWS} has the key {key!r}; expected layer indices")
    return tuple(sorted((int(key), tokens) for key, tokens in found.items()))


def check_windows(windows: Windows, num_layers: int) -> None:
    """Raise MaskError unless each is of a layer of the model, named once, and of a token or more."""
    check_indices("windows", (layer for layer, _ in windows), num_layers)
    for layer, tokens in windows:
        if not is_int(tokens) or tokens < 1:
            hint = "; a window of nothing is dropped attention" if tokens == 0 and is_int(tokens) else ""
            raise MaskError(f"the window of layer {layer} is {tokens!r} tokens; expected 1 or more{hint}")


def _with_rank_order(entries: dict[str, Any], attention: tuple[int, ...], mlp: tuple[int, ...]) -> dict[str, Any]:
    if all(list(indices) == sorted(indices) for indices in (attention, mlp)):
        return entries
    return entries | {RANK_ORDER: {"attention": list(attention), "mlp": list(mlp)}}


def _write_llm_drop(num_layers: int, attention: tuple[int, ...], mlp: tuple[int, ...]) -> dict[str, Any]:
    return {"drop_attn_list": list(attention), "drop_mlp_list": list(mlp)}


def _write_llm_drop_booleans(num_layers: int, attention: tuple[int, ...], mlp: tuple[int, ...]) -> dict[str, Any]:
    layers = range(num_layers)
    entries = {
        "drop_attn_list": [layer in attention for layer in layers],
        "drop_mlp_list": [layer in mlp for layer in layers],
    }
    return _with_rank_order(entries, attention, mlp)


def _write_transformers(num_layers: int, attention: tuple[int, ...], mlp: tuple[int, ...]) -> dict[str, Any]:
    layers = {}
    for layer in sorted({*attention, *mlp}):
        skip = [name for name, dropped in (("attention", attention), ("mlp", mlp)) if layer in dropped]
        layers[str(layer)] = {"skip": skip}
    return _with_rank_order({"per_layer_config": layers}, attention, mlp)


def _write_nemotron(num_layers: int, attention: tuple[int, ...], mlp: tuple[int, ...]) -> dict[str, Any]:
    dropped = {"attention": attention, "ffn": mlp}
    blocks = [{key: {"no_op": layer in gone} for key, gone in dropped.items()} for layer in range(num_layers)]
    return _with_rank_order({"block_configs": blocks}, attention, mlp)


@dataclass(frozen=True)
class Dialect:
    """One way to say a mask: the config keys it uses, how to read them, and whether they ask to drop anything at all.

    `asks` is for configs that are not ours to judge: other architectures use the same keys for other things; `foreign`
    tells such a use.
    """

    keys: tuple[str, ...]
    read: Callable[[Entries, int], Indices]
    asks: Callable[[Entries], bool]
    foreign: Callable[[Entries], bool] = lambda _config: False

    def speaks(self, config: Entries) -> bool:
        """Whether the config has an entry of this dialect."""
        return any(key in config for key in self.keys) and not self.foreign(config)


# The first that is present decides the rank order, so the only dialect that has one comes first. "runtime" is read as
# LLM-Drop: vLLM merges --hf-overrides into the config before anyone sees it.
DIALECTS = {
    "llm-drop": Dialect(("drop_attn_list", "drop_mlp_list"), _read_llm_drop, _asks_llm_drop),
    "transformers": Dialect(("per_layer_config",), _read_transformers, _asks_transformers, _is_of_widths),
    "nemotron-nas": Dialect(("block_configs",), _read_nemotron, _asks_nemotron, _is_of_block_types),
}
WRITERS: dict[str, Callable[[int, tuple[int, ...], tuple[int, ...]], dict[str, Any]]] = {
    "llm-drop": _write_llm_drop,
    "llm-drop-booleans": _write_llm_drop_booleans,
    "transformers": _write_transformers,
    "nemotron-nas": _write_nemotron,
    "runtime": _write_llm_drop,
}
ON_DISK = tuple(name for name in WRITERS if name != "runtime")


def without_mask(config: Entries) -> dict[str, Any]:
    """The config's entries without any that say a mask, in whatever dialect."""
    keys = {key for dialect in DIALECTS.values() for key in dialect.keys} | {RANK_ORDER, WINDOWS}
    keys -= {key for dialect in DIALECTS.values() if dialect.foreign(config) for key in dialect.keys}
    return {key: value for key, value in config.items() if key not in keys}
