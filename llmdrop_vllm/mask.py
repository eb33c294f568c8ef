"""DropMask: which attention and MLP sublayers a model goes without, and the dialects in which a config says so."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NEMOTRON_NO_OP = (("attention", "attention"), ("ffn", "mlp"))  # key in a block config, sublayer it stands for


class MaskError(ValueError):
    """A drop mask that cannot be read or served; the message names the key, the value and what is allowed."""


@dataclass(frozen=True)
class DropMask:
    """The sublayers that are gone, in rank order: the first n entries are the mask that drops n.

    Masks that drop the same sublayers in another order are different values that serve the same model; compare
    `dropped` to ask whether two masks do the same.
    """

    num_hidden_layers: int
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_count("num_hidden_layers", self.num_hidden_layers)
        _check_indices("attention", self.attention, self.num_hidden_layers)
        _check_indices("mlp", self.mlp, self.num_hidden_layers)

    @classmethod
    def from_config(cls, config: object) -> Self:
        """Read the mask from a config.json dict or a Transformers config object, in whatever dialects it uses.

        A config that says nothing drops nothing. Raises MaskError for a value that no dialect allows and for two
        dialects that disagree; where they agree, the one that keeps a rank order is returned.
        """
        entries = config_dict(config)
        num_layers = layer_count(config)
        masks = {name: cls(num_layers, *read(entries, num_layers)) for name, read in _present(entries).items()}
        if not masks:
            return cls(num_layers)
        (first, mask), *others = masks.items()
        for other, its_mask in others:
            if its_mask.dropped != mask.dropped:
                raise MaskError(
                    f"the config's drop masks disagree: {first} says {mask.summary()}; "
                    f"{other} says {its_mask.summary()}; keep one of them"
                )
        return mask

    @staticmethod
    def dialects(config: object) -> tuple[str, ...]:
        """Names of the dialects that the config speaks, whether or not they drop anything."""
        return tuple(_present(config_dict(config)))

    @property
    def dropped(self) -> tuple[frozenset[int], frozenset[int]]:
        """(attention layers, MLP layers), whatever their order."""
        return frozenset(self.attention), frozenset(self.mlp)

    @property
    def kept_attention(self) -> tuple[int, ...]:
        """Layers that still have attention, ascending."""
        gone = set(self.attention)
        return tuple(layer for layer in range(self.num_hidden_layers) if layer not in gone)

    def __bool__(self) -> bool:
        """Whether anything is dropped."""
        return bool(self.attention or self.mlp)

    def to_config(self, dialect: str = "llm-drop") -> dict[str, Any]:
        """The config entries that say this mask in a dialect of `WRITERS`.

        The boolean form of LLM-Drop, Transformers and Nemotron-NAS have no place for the rank order. "runtime" is what
        `vllm serve MODEL --hf-overrides` takes, as JSON. For "nemotron-nas" only the no-op flags are written: head
        counts and FFN widths of the kept sublayers are the checkpoint's to add.
        """
        if dialect not in WRITERS:
            raise MaskError(f"unknown mask dialect {dialect!r}; known: {', '.join(WRITERS)}")
        return WRITERS[dialect](self)

    def summary(self) -> str:
        """For people: `attention dropped in 8 of 32 layers [21-28], MLP in 0`."""
        attention = f"attention dropped in {len(self.attention)} of {self.num_hidden_layers} layers"
        return f"{attention}{_ranges(self.attention)}, MLP in {len(self.mlp)}{_ranges(self.mlp)}"


def config_dict(config: object) -> Mapping[str, Any]:
    """A config object's entries as config.json would hold them; a mapping is returned as it is."""
    if isinstance(config, Mapping):
        return config
    to_dict: Callable[[], dict[str, Any]] | None = getattr(config, "to_dict", None)
    if to_dict is None:
        raise MaskError(f"expected a config.json dict or a Transformers config, found {type(config).__name__}")
    return to_dict()


def layer_count(config: object) -> int:
    """Number of decoder layers, under whichever of the usual keys the config has it."""
    for key in LAYER_COUNT_KEYS:
        value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
        if value is not None:
            _check_count(key, value)
            return int(value)
    raise MaskError(f"the config has no layer count; expected one of {', '.join(LAYER_COUNT_KEYS)}")


def _check_count(key: str, value: object) -> None:
    if not _is_int(value) or value < 1:
        raise MaskError(f"{key} is {value!r}; expected a positive integer")


def _is_int(value: object) -> TypeGuard[int]:
    # bool is a subclass of int: without this, [False, True] would read as layers 0 and 1.
    return isinstance(value, int) and not isinstance(value, bool)


def _check_indices(key: str, indices: Iterable[object], num_layers: int) -> None:
    seen = set()
    for index in indices:
        if not _is_int(index):
            raise MaskError(f"{key} holds {index!r}; expected layer indices or one boolean per layer")
        if not 0 <= index < num_layers:
            raise MaskError(f"{key} names layer {index}; the model's {num_layers} layers are 0 to {num_layers - 1}")
        if index in seen:
            raise MaskError(f"{key} names layer {index} twice; expected each layer once")
        seen.add(index)


def _ranges(indices: Iterable[int]) -> str:
    """` [3,5-7]` for (7, 5, 3, 6), nothing for none."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    spans = (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f" [{','.join(spans)}]" if runs else ""


# What each dialect means. A reader gives (attention, mlp) layer indices; a writer gives config entries.

Indices = tuple[tuple[int, ...], tuple[int, ...]]
Reader = Callable[[Mapping[str, Any], int], Indices]


def _read_llm_drop(config: Mapping[str, Any], num_layers: int) -> Indices:
    attention, mlp = (
        _read_index_or_boolean_list(key, config.get(key, []), num_layers) for key in ("drop_attn_list", "drop_mlp_list")
    )
    return attention, mlp


def _read_index_or_boolean_list(key: str, value: object, num_layers: int) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise MaskError(f"{key} is {value!r}; expected a list of layer indices or of one boolean per layer")
    booleans = [entry for entry in value if isinstance(entry, bool)]
    if not booleans:
        _check_indices(key, value, num_layers)
        return tuple(value)
    if len(booleans) != len(value):
        odd = next(entry for entry in value if not isinstance(entry, bool))
        raise MaskError(f"{key} mixes booleans with {odd!r}; expected only indices or only booleans")
    if len(booleans) != num_layers:
        raise MaskError(f"{key} holds {len(booleans)} booleans; expected one for each of the {num_layers} layers")
    return tuple(layer for layer, gone in enumerate(booleans) if gone)


def _read_transformers(config: Mapping[str, Any], num_layers: int) -> Indices:
    layers = config["per_layer_config"]
    if not isinstance(layers, Mapping):
        raise MaskError(f"per_layer_config is {layers!r}; expected an object keyed by layer index")
    skipped: dict[str, list[int]] = {"attention": [], "mlp": []}
    for key, overrides in layers.items():
        where = f"per_layer_config[{key!r}]"
        if not (_is_int(key) or (isinstance(key, str) and key.isdecimal())):
            raise MaskError(f"per_layer_config has the key {key!r}; expected layer indices")
        if not isinstance(overrides, Mapping):
            raise MaskError(f"{where} is {overrides!r}; expected an object")
        if extra := sorted(set(overrides) - {"skip"}):
            raise MaskError(f"{where} overrides {', '.join(extra)}; only 'skip' is supported")
        names = overrides.get("skip", [])
        if not isinstance(names, list | tuple | set):
            raise MaskError(f"{where}.skip is {names!r}; expected a list of 'attention' and 'mlp'")
        for name in names:
            if name not in skipped:
                raise MaskError(f"{where}.skip holds {name!r}; expected 'attention' or 'mlp'")
            skipped[name].append(int(key))
    for name, indices in skipped.items():
        _check_indices(f"per_layer_config (skip {name})", indices, num_layers)
    return tuple(sorted(skipped["attention"])), tuple(sorted(skipped["mlp"]))


def _read_nemotron(config: Mapping[str, Any], num_layers: int) -> Indices:
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


def block_entry(block: object, key: str) -> Any:
    """A field of a Nemotron-NAS block config, which is a dict on disk and an object in that family's config class."""
    return block.get(key) if isinstance(block, Mapping) else getattr(block, key, None)


def _write_llm_drop(mask: DropMask) -> dict[str, Any]:
    return {"drop_attn_list": list(mask.attention), "drop_mlp_list": list(mask.mlp)}


def _write_llm_drop_booleans(mask: DropMask) -> dict[str, Any]:
    layers = range(mask.num_hidden_layers)
    return {
        "drop_attn_list": [layer in mask.attention for layer in layers],
        "drop_mlp_list": [layer in mask.mlp for layer in layers],
    }


def _write_transformers(mask: DropMask) -> dict[str, Any]:
    layers = {}
    for layer in range(mask.num_hidden_layers):
        skip = [name for name in ("attention", "mlp") if layer in getattr(mask, name)]
        if skip:
            layers[str(layer)] = {"skip": skip}
    return {"per_layer_config": layers}


def _write_nemotron(mask: DropMask) -> dict[str, Any]:
    blocks = [
        {key: {"no_op": layer in getattr(mask, sublayer)} for key, sublayer in NEMOTRON_NO_OP}
        for layer in range(mask.num_hidden_layers)
    ]
    return {"block_configs": blocks}


# The first that is present decides the rank order, so the only dialect that has one comes first. "runtime" is read as
# LLM-Drop: vLLM merges --hf-overrides into the config before anyone sees it.
READERS: dict[str, tuple[tuple[str, ...], Reader]] = {
    "llm-drop": (("drop_attn_list", "drop_mlp_list"), _read_llm_drop),
    "transformers": (("per_layer_config",), _read_transformers),
    "nemotron-nas": (("block_configs",), _read_nemotron),
}
WRITERS: dict[str, Callable[[DropMask], dict[str, Any]]] = {
    "llm-drop": _write_llm_drop,
    "llm-drop-booleans": _write_llm_drop_booleans,
    "transformers": _write_transformers,
    "nemotron-nas": _write_nemotron,
    "runtime": _write_llm_drop,
}


def _present(config: Mapping[str, Any]) -> dict[str, Reader]:
    return {name: read for name, (keys, read) in READERS.items() if any(key in config for key in keys)}
