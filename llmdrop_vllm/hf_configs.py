"""Transformers' configs of models that lack sublayers: caches that are made from them have no room for these."""

import copy
from functools import cache
from typing import Any, ClassVar, TypeVar

import transformers
from transformers import PretrainedConfig

from llmdrop_vllm.architectures.families import EXPLICIT_PREFIX
from llmdrop_vllm.masks.mask import DropMask

T = TypeVar("T")


class DroppedConfig(PretrainedConfig):
    """Mixed in before a stock config class: caches made from it have entries for the remaining attention only."""

    stock: ClassVar[type[PretrainedConfig]]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """As the stock config, but its decoder, which Transformers asks for to build a cache, has fewer layers."""
        config = super().get_text_config(decoder=decoder, encoder=encoder)
        if not decoder or encoder:
            return config
        kept = DropMask.from_config(config).kept_attention
        stock: type[PretrainedConfig] = getattr(config, "stock", type(config))
        cached = copy.copy(config)
        cached.__class__ = stock
        cached.num_hidden_layers = len(kept)
        if (layer_types := getattr(config, "layer_types", None)) is not None:
            kept_types = [layer_types[index] for index in kept]
            try:
                cached.layer_types = kept_types
            except AttributeError:  # the class works them out
                cached.__class__ = _listing(stock, kept_types)
        return cached


def _listing(stock: type[PretrainedConfig], layer_types: list[str]) -> type[PretrainedConfig]:
    """A config class whose layers are these."""
    return type(stock.__name__, (stock,), dict.fromkeys(("layer_types", "layers_block_type"), layer_types))


@cache
def with_dropped_cache(stock: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """The config class, with caches for the remaining attention only."""
    return type(f"{EXPLICIT_PREFIX}{stock.__name__}", (DroppedConfig, stock), {"stock": stock, "__module__": __name__})


def __getattr__(name: str) -> type[PretrainedConfig]:
    """A class by its name, for processes that unpickle what another has made."""
    stock: Any = stock_of(__name__, name, PretrainedConfig)
    return with_dropped_cache(stock)


def stock_of(module: str, name: str, base: type[T]) -> type[T]:
    """Transformers' class that one of ours was made of. Raises AttributeError for a name in a module that is none's."""
    stock = getattr(transformers, name.removeprefix(EXPLICIT_PREFIX), None)
    if name.startswith(EXPLICIT_PREFIX) and isinstance(stock, type) and issubclass(stock, base):
        return stock
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
