"""The dialects in which a config says what is dropped: what each means, read strictly and written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from llmdrop_vllm.errors import MaskError

# The keys of each kind of sublayer: in LLM-Drop's config, in a block config of Nemotron-NAS.
LLM_DROP = {"attention": "drop_attn_list", "mlp": "drop_mlp_list"}
NEMOTRON_NO_OP = {"attention": "attention", "mlp": "ffn"}
# Where the rank order is kept in dialects that have no place for it.
RANK_ORDER = "llmdrop_rank_order"
# Beside any dialect: the last so many tokens that a layer attends to, by layer. None of the dialects can say that.
WINDOWS = "llmdrop_windows"

Entries = Mapping[str, Any]
Gone = Mapping[str, Sequence[int]]  # layers by kind of sublayer, `attention` and `mlp`
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


def _layer(where: str, key: Any) -> int:
    """The layer that a key stands for, which JSON has as a string. Raises MaskError for any other."""
    if not (is_int(key) or (isinstance(key, str) and key.isdecimal())):
        raise MaskError(f"{where} has the key {key!r}; expected layer indices")
    return int(key)


def _read_llm_drop(config: Entries, num_layers: int) -> Gone:
    return {kind: _read_index_or_boolean_list(key, config.get(key, []), num_layers) for kind, key in LLM_DROP.items()}


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


def _read_transformers(config: Entries, num_layers: int) -> Gone:
    layers = config["per_layer_config"]
    if not isinstance(layers, Mapping):
        raise MaskError(f"per_layer_config is {layers!r}; expected an object keyed by layer index")
    skipped: dict[str, list[int]] = {"attention": [], "mlp": []}
    for key, overrides in layers.items():
        layer, where = _layer("per_layer_config", key), f"per_layer_config[{key!r}]"
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
            skipped[name].append(layer)
    for name, indices in skipped.items():
        check_indices(f"per_layer_config (skip {name})", indices, num_layers)
    return {name: sorted(indices) for name, indices in skipped.items()}


def _read_nemotron(config: Entries, num_layers: int) -> Gone:
    blocks = config["block_configs"]
    if not isinstance(blocks, Sequence) or isinstance(blocks, str):
        raise MaskError(f"block_configs is {blocks!r}; expected a list of one object per layer")
    if len(blocks) != num_layers:
        raise MaskError(f"block_configs describes {len(blocks)} layers; the model has {num_layers}")
    gone: dict[str, list[int]] = {"attention": [], "mlp": []}
    for layer, block in enumerate(blocks):
        for kind, key in NEMOTRON_NO_OP.items():
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
                gone[kind].append(layer)
    return gone


def _is_of_widths(config: Entries) -> bool:
    """Whether per_layer_config tells head sizes and the like, and skips nothing: then it says no mask."""
    return any({*each} - {"skip"} for each in _overrides(config)) and not _asks_transformers(config)


def _is_of_block_types(config: Entries) -> bool:
    """Whether block_configs tells what Nemotron-H's layers are and how wide, not what they go without."""
    blocks = config.get("block_configs")
    return (
        isinstance(blocks, Sequence)
        and bool(blocks)
        and all(block_entry(block, "block_type") is not None for block in blocks)
        and not any(block_entry(block, key) for block in blocks for key in NEMOTRON_NO_OP.values())
    )


def block_entry(block: object, key: str) -> Any:
    """A field of a Nemotron-NAS block config, which is a dict on disk and an object in that family's config class."""
    return block.get(key) if isinstance(block, Mapping) else getattr(block, key, None)


def _asks_llm_drop(config: Entries) -> bool:
    values = map(config.get, LLM_DROP.values())
    return any(any(entry is not False for entry in value) if isinstance(value, list) else value for value in values)


def _overrides(config: Entries) -> list[Entries]:
    layers = config.get("per_layer_config")
    return [each for each in layers.values() if isinstance(each, Mapping)] if isinstance(layers, Mapping) else []


def _asks_transformers(config: Entries) -> bool:
    return any(each.get("skip") for each in _overrides(config))


def _asks_nemotron(config: Entries) -> bool:
    blocks = config.get("block_configs") or ()
    settings = (block_entry(block, key) for block in blocks for key in NEMOTRON_NO_OP.values())
    return any(block_entry(each, "no_op") is True for each in settings)


def rank_order(config: Entries, gone: Gone, num_layers: int) -> Gone:
    """The same layers in the order that the config keeps beside its mask, if any. Raises MaskError for other layers."""
    if RANK_ORDER not in config:
        return gone
    order = config[RANK_ORDER]
    if not isinstance(order, Mapping) or set(order) != {"attention", "mlp"}:
        raise MaskError(f"{RANK_ORDER} is {order!r}; expected an object with 'attention' and 'mlp'")
    ranked = {kind: _read_index_or_boolean_list(f"{RANK_ORDER}.{kind}", order[kind], num_layers) for kind in gone}
    (attention, mlp), (own_attention, own_mlp) = (map(sorted, its.values()) for its in (ranked, gone))
    if (attention, mlp) != (own_attention, own_mlp):
        raise MaskError(
            f"{RANK_ORDER} names other layers than the mask: attention {attention} and MLP {mlp}, "
            f"the mask drops {own_attention} and {own_mlp}; remove {RANK_ORDER}"
        )
    return ranked


def windows_of(layers: Sequence[int], tokens: int | None) -> Windows:
    """One window for each of the layers. Raises MaskError unless both are given, or neither."""
    if bool(layers) != (tokens is not None):
        raise MaskError("--window-attention says in which layers, --window how many tokens; give both")
    check_indices("--window-attention", layers, max(layers, default=0) + 1)
    return () if tokens is None else tuple((layer, tokens) for layer in sorted(layers))


def read_windows(config: Entries) -> Windows:
    """What the config says of windows. Raises MaskError for anything but an object of numbers by layer."""
    found = config.get(WINDOWS, {})
    if not isinstance(found, Mapping):
        raise MaskError(f'{WINDOWS} is {found!r}; expected an object like {{"3": 1024}}, of tokens by layer')
    return tuple(sorted((_layer(WINDOWS, key), tokens) for key, tokens in found.items()))


def check_windows(windows: Windows, num_layers: int) -> None:
    """Raise MaskError unless each is of a layer of the model, named once, and of a token or more."""
    check_indices("windows", (layer for layer, _ in windows), num_layers)
    for layer, tokens in windows:
        if not is_int(tokens) or tokens < 1:
            hint = "; a window of nothing is dropped attention" if tokens == 0 and is_int(tokens) else ""
            raise MaskError(f"the window of layer {layer} is {tokens!r} tokens; expected 1 or more{hint}")


def _write_llm_drop(gone: Gone, num_layers: int) -> dict[str, Any]:
    return {key: list(gone[kind]) for kind, key in LLM_DROP.items()}


def _write_llm_drop_booleans(gone: Gone, num_layers: int) -> dict[str, Any]:
    return {key: [layer in gone[kind] for layer in range(num_layers)] for kind, key in LLM_DROP.items()}


def _write_transformers(gone: Gone, num_layers: int) -> dict[str, Any]:
    layers = sorted({*gone["attention"], *gone["mlp"]})
    skipped = {str(layer): {"skip": [kind for kind in gone if layer in gone[kind]]} for layer in layers}
    return {"per_layer_config": skipped}


def _write_nemotron(gone: Gone, num_layers: int) -> dict[str, Any]:
    layers = range(num_layers)
    blocks = [{key: {"no_op": layer in gone[kind]} for kind, key in NEMOTRON_NO_OP.items()} for layer in layers]
    return {"block_configs": blocks}


def written(dialect: str, gone: Gone, num_layers: int) -> dict[str, Any]:
    """The entries that say what is gone, and its rank order beside them where the dialect has no place for one."""
    if (write := WRITERS.get(dialect)) is None:
        raise MaskError(f"unknown mask dialect {dialect!r}; known: {', '.join(WRITERS)}")
    entries = write(gone, num_layers)
    if write is _write_llm_drop or all(list(its) == sorted(its) for its in gone.values()):
        return entries
    return entries | {RANK_ORDER: {kind: list(its) for kind, its in gone.items()}}


@dataclass(frozen=True)
class Dialect:
    """One way to say a mask: the config keys it uses, how to read them, and whether they ask to drop anything at all.

    `asks` is for configs that are not ours to judge: other architectures use the same keys for other things; `foreign`
    tells such a use.
    """

    keys: tuple[str, ...]
    read: Callable[[Entries, int], Gone]
    asks: Callable[[Entries], bool]
    foreign: Callable[[Entries], bool] = lambda _config: False

    def speaks(self, config: Entries) -> bool:
        """Whether the config has an entry of this dialect."""
        return any(key in config for key in self.keys) and not self.foreign(config)


# The first that is present decides the rank order, so the only dialect that has one comes first. "runtime" is read as
# LLM-Drop: vLLM merges --hf-overrides into the config before anyone sees it.
DIALECTS = {
    "llm-drop": Dialect(tuple(LLM_DROP.values()), _read_llm_drop, _asks_llm_drop),
    "transformers": Dialect(("per_layer_config",), _read_transformers, _asks_transformers, _is_of_widths),
    "nemotron-nas": Dialect(("block_configs",), _read_nemotron, _asks_nemotron, _is_of_block_types),
}
WRITERS: dict[str, Callable[[Gone, int], dict[str, Any]]] = {
    "llm-drop": _write_llm_drop,
    "llm-drop-booleans": _write_llm_drop_booleans,
    "transformers": _write_transformers,
    "nemotron-nas": _write_nemotron,
    "runtime": _write_llm_drop,
}
ON_DISK = tuple(name for name in WRITERS if name != "runtime")


def without_mask(config: Entries) -> dict[str, Any]:
    """The config's entries without any that say a mask, in whatever dialect."""
    ours = [dialect.keys for dialect in DIALECTS.values() if not dialect.foreign(config)]
    keys = {RANK_ORDER, WINDOWS}.union(*ours)
    return {key: value for key, value in config.items() if key not in keys}
