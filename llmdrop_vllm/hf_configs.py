"""Transformers' configs of models that lack sublayers: caches that are made from them have no room for these.

And how Transformers, and what is built on it, finds the classes of such models.
"""

import copy
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar

import transformers.processing_utils  # which puts another module in the place of `transformers`
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from llmdrop_vllm.architectures.families import EXPLICIT_PREFIX
from llmdrop_vllm.masks.mask import DropMask

MAPPINGS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)


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
        if shared := getattr(config, "num_kv_shared_layers", None):
            cached.num_kv_shared_layers = sum(layer >= config.num_hidden_layers - shared for layer in kept)
        if (layer_types := getattr(config, "layer_types", None)) is not None:
            kept_types = [layer_types[index] for index in kept]
            try:
                cached.layer_types = kept_types
            except AttributeError:  # the class works them out
                listed = dict.fromkeys(("layer_types", "layers_block_type"), kept_types)
                cached.__class__ = type(stock.__name__, (stock,), listed)
        return cached


@cache
def with_dropped_cache(stock: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """The config class, with caches for the remaining attention only."""
    return type(f"{EXPLICIT_PREFIX}{stock.__name__}", (DroppedConfig, stock), {"stock": stock, "__module__": __name__})


def __getattr__(name: str) -> type[PretrainedConfig]:
    """A class by its name, for processes that unpickle what another has made."""
    return with_dropped_cache(stock_of(__name__, name, PretrainedConfig))


def stock_of(module: str, name: str, base: type) -> Any:
    """Transformers' class that one of ours was made of. Raises AttributeError for a name in a module that is none's."""
    if name.startswith(EXPLICIT_PREFIX):
        plain = name.removeprefix(EXPLICIT_PREFIX)
        # Transformers writes some architectures' names otherwise: PhiMoE as Phimoe.
        spelt = next((each for each in dir(transformers) if each.lower() == plain.lower()), plain)
        stock = getattr(transformers, plain, None) or getattr(transformers, spelt, None)
        if isinstance(stock, type) and issubclass(stock, base):
            return stock
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def make_known(stock: type[PreTrainedModel], made: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that was made of a stock one, now to be found where a config's architecture names it: in
    `transformers`, where TRL looks, and by Transformers' Auto classes.
    """
    setattr(sys.modules["transformers"], made.__name__, _door(made, lambda _: made))
    for mapping in MAPPINGS:
        if mapping.get(stock.config_class, None) is stock:
            mapping.register(stock.config_class, _door(stock, partial(_named_by, stock)), exist_ok=True)
    return made


def _named_by(stock: Any, config: Any) -> Any:
    """The class that a config names, where it is one of ours."""
    name = (getattr(config, "architectures", None) or ("",))[0]
    return getattr(sys.modules["transformers"], name, stock) if name.startswith(EXPLICIT_PREFIX) else stock


def _door(model: Any, chosen: Callable[[Any], Any]) -> type[PreTrainedModel]:
    """A model class for others to find and call, behind which a config's own is chosen.

    Several classes for one config class, which Transformers knows too, would not do: it then wants every config to name
    an architecture, and those of towers do not. vLLM looks in `transformers` as well: without our plugin, which comes
    first, it would build the stock model of a dropped one's config, in full, were it told that it could.
    """

    class Door(model):
        stock_model = model

        def __new__(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
            return chosen(config)(config, *args, **kwargs)

        @classmethod
        def from_pretrained(cls, *args: Any, config: Any = None, **kwargs: Any) -> Any:
            return chosen(config).from_pretrained(*args, config=config, **kwargs)

        @classmethod
        def _from_config(cls, config: Any, **kwargs: Any) -> Any:
            return chosen(config)._from_config(config, **kwargs)

        @classmethod
        def is_backend_compatible(cls) -> bool:
            return False

        @classmethod
        def _can_set_attn_implementation(cls) -> bool:
            return False

    for name in ("__name__", "__qualname__", "__module__"):  # whose code it is decides about remote code
        setattr(Door, name, getattr(model, name))
    return Door
