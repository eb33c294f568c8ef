"""DropMask: which attention and MLP sublayers a model goes without, and which attention sees a window only."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.dialects import (
    DIALECTS,
    WINDOWS,
    Windows,
    check_indices,
    check_windows,
    is_int,
    rank_order,
    read_windows,
    written,
)
from llmdrop_vllm.masks.layer_types import layer_types

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class DropMask:
    """The sublayers that are gone, in rank order: the first n entries are the mask that drops n.

    `windows` are pairs of a layer and a number of tokens: its attention sees that many last ones, itself among them.
    What is dropped has none: a mask that is made of another with more gone has fewer.

    Masks that drop the same sublayers in another order are different values that serve the same model; compare
    `effect` to ask whether two masks do the same.
    """

    num_hidden_layers: int
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    windows: Windows = ()
    __pydantic_config__ = {"extra": "forbid", "strict": True}  # for the records that hold a mask

    def __post_init__(self) -> None:
        _check_count("num_hidden_layers", self.num_hidden_layers)
        for key in ("attention", "mlp"):
            # Lists are accepted, and made tuples: a mask is a value that can be hashed.
            object.__setattr__(self, key, tuple(getattr(self, key)))
            check_indices(key, getattr(self, key), self.num_hidden_layers)
        check_windows(self.windows, self.num_hidden_layers)
        left = ((layer, tokens) for layer, tokens in self.windows if layer not in self.attention)
        object.__setattr__(self, "windows", tuple(sorted(left)))

    @classmethod
    def from_config(cls, config: object) -> Self:
        """Read the mask from a config.json dict or a Transformers config object, in whatever dialects it uses.

        A config that says nothing drops nothing. Raises MaskError for a value that no dialect allows and for two
        dialects that disagree; where they agree, the one that keeps a rank order is returned.
        """
        entries = config_dict(config)
        num_layers, windows = layer_count(entries), read_windows(entries)
        masks = {}
        for name in cls.dialects(entries):
            gone = rank_order(entries, DIALECTS[name].read(entries, num_layers), num_layers)
            masks[name] = cls(num_layers, tuple(gone["attention"]), tuple(gone["mlp"]))
        if not masks:
            return cls(num_layers).seeing(windows)
        (first, mask), *others = masks.items()
        for other, its_mask in others:
            if its_mask.dropped != mask.dropped:
                raise MaskError(
                    f"the config's drop masks disagree: {first} says {mask.summary()}; "
                    f"{other} says {its_mask.summary()}; keep one of them"
                )
        return mask.seeing(windows)

    def seeing(self, windows: Windows) -> Self:
        """With these windows, if any, in place of its own. Raises MaskError for one where attention is dropped."""
        if both := sorted(dict(windows).keys() & {*self.attention}):
            raise MaskError(f"layers {both} have a window, and their attention is dropped; say one of them")
        return replace(self, windows=windows or self.windows)

    @staticmethod
    def dialects(config: object) -> tuple[str, ...]:
        """Names of the dialects that the config speaks, whether or not they drop anything."""
        entries = config_dict(config)
        return tuple(name for name, dialect in DIALECTS.items() if dialect.speaks(entries))

    @staticmethod
    def said_in(config: object) -> tuple[str, ...]:
        """Dialects, and the entry for windows, that the config has: none where no mask is spoken of."""
        return (*DropMask.dialects(config), *({WINDOWS} & {*config_dict(config)}))

    @staticmethod
    def dialects_that_drop(config: object) -> tuple[str, ...]:
        """Names of the dialects in which any config asks to drop something, without judging what else it says; and
        the entry for windows, where it names any.
        """
        entries = config_dict(config)
        names = tuple(name for name, dialect in DIALECTS.items() if dialect.asks(entries))
        return (*names, WINDOWS) if entries.get(WINDOWS) else names

    @property
    def effect(self) -> tuple[frozenset[int], frozenset[int], Windows]:
        """Attention layers, MLP layers, windows: what the mask does, in whatever order it says that."""
        return *self.dropped, self.windows

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
        """Whether anything is dropped or windowed."""
        return bool(self.attention or self.mlp or self.windows)

    def to_config(self, dialect: str = "llm-drop") -> dict[str, Any]:
        """The config entries that say this mask in a dialect of `WRITERS`.

        The boolean form of LLM-Drop, Transformers and Nemotron-NAS have no place for the rank order: where it is not
        ascending, it stands beside the mask in an entry of its own. "runtime" is what `vllm serve MODEL --hf-overrides`
        takes, as JSON; it says everything, for it goes over whatever the config says. For "nemotron-nas" only the no-op
        flags are written: head counts and FFN widths of the kept sublayers are the checkpoint's to add.
        """
        entries = written(dialect, {"attention": self.attention, "mlp": self.mlp}, self.num_hidden_layers)
        says_windows = self.windows or dialect == "runtime"
        return entries | ({WINDOWS: {str(layer): tokens for layer, tokens in self.windows}} if says_windows else {})

    def summary(self) -> str:
        """For people: `attention dropped in 8 of 32 layers [21-28], MLP in 0`, and the windows where there are any."""
        attention = f"attention dropped in {len(self.attention)} of {self.num_hidden_layers} layers"
        said = [f"{attention}{_ranges(self.attention)}", f"MLP in {len(self.mlp)}{_ranges(self.mlp)}"]
        for tokens in sorted({tokens for _, tokens in self.windows}):
            layers = [layer for layer, its in self.windows if its == tokens]
            said.append(f"windows of {tokens:,} tokens in {len(layers)}{_ranges(layers)}")
        return ", ".join(said)


def config_dict(config: object) -> Mapping[str, Any]:
    """A config object's entries as config.json would hold them; a mapping is returned as it is."""
    if isinstance(config, Mapping):
        return config
    to_dict: Callable[[], dict[str, Any]] | None = getattr(config, "to_dict", None)
    if to_dict is None:
        raise MaskError(f"expected a config.json dict or a Transformers config, found {type(config).__name__}")
    return to_dict()


def has_layer_count(entries: Mapping[str, Any]) -> bool:
    """Whether a config's entries say how many decoder layers there are."""
    return any(entries.get(key) is not None for key in LAYER_COUNT_KEYS)


def layer_count(config: Mapping[str, Any]) -> int:
    """Number of decoder layers, under whichever of the usual keys the config has it."""
    for key in LAYER_COUNT_KEYS:
        if (value := config.get(key)) is not None:
            _check_count(key, value)
            return int(value)
    if (types := layer_types(config, None)) is not None:
        return len(types)
    raise MaskError(f"the config has no layer count; expected one of {', '.join(LAYER_COUNT_KEYS)}")


def _check_count(key: str, value: object) -> None:
    if not is_int(value) or value < 1:
        raise MaskError(f"{key} is {value!r}; expected a positive integer")


def _ranges(indices: Iterable[int]) -> str:
    """` [3,5-7]` for (7, 5, 3, 6), nothing for none."""
    return f" [{found}]" if (found := ranges(indices)) else ""


def ranges(indices: Iterable[int]) -> str:
    """`3,5-7` for (7, 5, 3, 6)."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
