"""A dropped checkpoint as a Transformers model: the dropped sublayers are not built, load nothing and cache nothing.

    model = llmdrop_vllm.hf.from_pretrained("path/to/dropped")

is a PreTrainedModel like any other: it generates, trains, takes adapters, and can be handed to lm-eval's `hf` backend.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from llmdrop_vllm.architectures.families import EXPLICIT_PREFIX
from llmdrop_vllm.architectures.family import Family, Sublayer
from llmdrop_vllm.architectures.names import BEFORE_LAYER
from llmdrop_vllm.architectures.wrappers import WRAPPERS
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint, MaskedCheckpoint
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.checkpoints.hf_weights import in_own_names, leave_index
from llmdrop_vllm.checkpoints.shards import VARIANT
from llmdrop_vllm.checkpoints.tower import decoded
from llmdrop_vllm.errors import CheckpointError, InputError
from llmdrop_vllm.hf_configs import DroppedConfig, make_known, stock_of, with_dropped_cache
from llmdrop_vllm.hf_passthrough import check_norms, drop_sublayer
from llmdrop_vllm.hf_windows import look_back
from llmdrop_vllm.kv_cache.kinds import layer_kinds
from llmdrop_vllm.masks.mask import DropMask, config_dict

logger = logging.getLogger("llmdrop_vllm")
ANY_SIZE = 1 << 60  # bytes
DONOR = "kv_shared_layer_index"  # in Transformers' attention, of the layer whose keys and values it reads


def from_pretrained(model: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a checkpoint without the sublayers that its config's mask drops; one without a mask is loaded in full.

    `kwargs` go to Transformers' from_pretrained (dtype, device_map, attn_implementation, ...). Raises MaskError and
    CheckpointError for what cannot be loaded faithfully: a weight that a kept sublayer lacks is never invented.
    """
    if "config" in kwargs:
        raise InputError("config cannot be given here: the checkpoint has its own")
    return _opened(model, None, kwargs)


def register(model: str | Path) -> type[PreTrainedModel]:
    """Teach Transformers in this process about a dropped checkpoint, as loading it does, and give its class.

    From then on AutoModelForCausalLM, and whatever loads models by it or by an architecture's name (PEFT, TRL), load
    such checkpoints as they are.
    """
    checkpoint = Checkpoint.open(model)
    return model_class(transformers_config(checkpoint.under(checkpoint.mask)))


def load(masked: MaskedCheckpoint, config: PretrainedConfig | None = None, **kwargs: Any) -> PreTrainedModel:
    """As `from_pretrained`, for a checkpoint that is open and a mask, which may be another than its own."""
    checkpoint = masked.checkpoint
    config = config or transformers_config(masked)
    if any(path.name.startswith(f"model.{VARIANT}") for path in checkpoint.metadata):
        kwargs["variant"] = VARIANT
    kwargs |= {"config": config, "output_loading_info": True, "use_safetensors": True, "trust_remote_code": False}
    loaded, info = model_class(config).from_pretrained(checkpoint.directory, **kwargs)
    if wrong := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        raise CheckpointError(f"{checkpoint.directory} lacks weights that the mask keeps: {', '.join(wrong)}")
    if masked.mask:
        logger.warning("%s: %s", checkpoint.directory, masked.mask.summary())
    return loaded


def _opened(model: str | Path, decoder: Decoder | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    if refused := [key for key in ("cache_dir", "revision", "subfolder", "token") if kwargs.pop(key, None) is not None]:
        raise InputError(f"{', '.join(refused)} cannot be given here: download first, and name the directory")
    checkpoint = Checkpoint.open(model)
    if decoder is None:
        return load(checkpoint.under(checkpoint.mask), **kwargs)
    return load(checkpoint.under(decoder.mask), dropped_config(decoder, decoder.mask), **kwargs)


def transformers_config(masked: MaskedCheckpoint) -> PretrainedConfig:
    """The checkpoint's Transformers config with the mask, in one dialect."""
    try:
        return dropped_config(masked.checkpoint.decoder, masked.mask)
    except CheckpointError as error:
        raise CheckpointError(f"{masked.checkpoint.directory}: {error}") from None


def dropped_config(decoder: Decoder, mask: DropMask) -> PretrainedConfig:
    """The Transformers config of a decoder, whatever its own config says of a mask, with this one."""
    decoder.check_attention_is_left(mask)
    entries = decoder.config_with({}) | {"architectures": [decoder.architecture]}
    model_type = entries.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"the config's model_type is {model_type!r}, unknown to Transformers")
    stock = CONFIG_MAPPING[model_type]
    try:
        config = stock.from_dict(decoded(entries))
    except Exception as error:  # whatever the architecture's own code makes of a config that contradicts itself
        raise CheckpointError(f"the config does not describe a {decoder.architecture}: {error}") from error
    if mask:
        config.get_text_config().update(mask.to_config())
        config.__class__ = with_dropped_cache(stock)
    return config


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The Transformers class for a config from `transformers_config`, made able to drop where it has a mask.

    Raises CheckpointError where Transformers knows the config and has no model for it.
    """
    stock = config.stock if isinstance(config, DroppedConfig) else type(config)
    is_wrapper = config.architectures[0] in WRAPPERS
    classes = MODEL_FOR_MULTIMODAL_LM_MAPPING if is_wrapper else MODEL_FOR_CAUSAL_LM_MAPPING
    if stock not in classes:
        kind = "multimodal" if is_wrapper else "causal"
        raise CheckpointError(f"Transformers has no {kind} language model for model_type {config.model_type!r}")
    made: Any = classes[stock]
    made = getattr(made, "stock_model", made)  # where `make_known` has put something in between
    # Under the checkpoint's name for the architecture: Transformers may spell it otherwise, or have one class for two.
    return _dropped_model(made, config.architectures[0]) if isinstance(config, DroppedConfig) else made


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model that a config from here describes, without memory for any weights."""
    try:
        with torch.device("meta"):
            return model_class(config)(config)
    except InputError:
        raise
    except Exception as error:  # whatever the architecture's own code makes of a config that contradicts itself
        raise CheckpointError(f"the config does not describe a {config.architectures[0]}: {error}") from error


def decoder_layers(model: PreTrainedModel, num_layers: int) -> nn.ModuleList:
    """The decoder's list of layers, whatever the architecture calls it."""
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise CheckpointError(f"{type(model).__name__} has no list of {num_layers} decoder layers")


def drop(model: PreTrainedModel, family: Family, mask: DropMask) -> list[RemovableHandle]:
    """Put pass-throughs in place of what the mask drops, and number the kept attention by its place in the cache; the
    handles take the mask's windows away.
    """
    layers = decoder_layers(model, mask.num_hidden_layers)
    for index in {*mask.attention, *mask.mlp}:
        check_norms(layers[index], family, index)
    for sublayer, dropped in family.sublayers(mask):
        for index in dropped:
            drop_sublayer(layers[index], sublayer, index)
    name = family.attention.transformers_module
    needed = mask.windows or family.unlike_attention
    kinds = layer_kinds(config_dict(model.config.get_text_config())) if needed else ()
    handles = [
        look_back(getattr(layers[index], name), tokens, bare=kinds[index].name == "sliding")
        for index, tokens in mask.windows
    ]
    # Transformers reads the sequence length from entry 0 of the cache, which must not be a dropped layer's.
    for entry, index in enumerate(mask.kept_attention):
        for module in _mixers(layers[index], family, index):
            module.layer_idx = entry
            if getattr(module, DONOR, None) is not None:  # of Gemma 3n: by its number there, too
                setattr(module, DONOR, mask.kept_attention.index(kinds[index].donor))
    return handles


@contextmanager
def dropped(model: PreTrainedModel, family: Family, mask: DropMask) -> Iterator[None]:
    """Within this context, the model goes without what the mask drops and has its windows, beside any of its own; to be
    run without a KV cache.
    """
    layers = decoder_layers(model, mask.num_hidden_layers)
    before = [(dict(layer._modules), {*vars(layer)}) for layer in layers]
    mixers = [module for index, layer in enumerate(layers) for module in _mixers(layer, family, index)]
    entries = [{name: getattr(module, name, None) for name in ("layer_idx", DONOR)} for module in mixers]
    handles: list[RemovableHandle] = []
    try:
        handles += drop(model, family, mask)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, (modules, attributes) in zip(layers, before, strict=True):
            layer._modules.clear()  # in the order that they had
            layer._modules.update(modules)
            for name in {*vars(layer)} - attributes:
                del vars(layer)[name]  # delattr would take the module of that name, which is back
        for module, numbers in zip(mixers, entries, strict=True):
            vars(module).update(numbers)


def _mixers(layer: nn.Module, family: Family, index: int) -> list[Any]:
    """A layer's attention or recurrent mixer, or both."""
    mixer = family.mixer(index)
    names = () if mixer is None else (mixer.transformers_module, *mixer.also)
    return [getattr(layer, name) for name in names if getattr(layer, name, None) is not None]


class DroppedModel(PreTrainedModel):
    """Mixed in before a stock model class: goes without what the config's mask drops."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        text = config.get_text_config()
        if text is not config and isinstance(text, DroppedConfig):  # another model was made of it before
            text.__class__ = text.stock
        super().__init__(config, *args, **kwargs)
        decoder = Decoder.of(config, type(self).__name__)
        family, mask = decoder.family, decoder.mask
        assert family is not None, f"{type(self).__name__} was made without a row in the family table"
        drop(self, family, mask)
        # Of a wrapper, the decoder makes its cache by its own config, whose class it was chosen by.
        for part in self.get_decoder().modules():
            if isinstance(part, PreTrainedModel) and not isinstance(part.config, DroppedConfig):
                own: Any = type(part.config)
                part.config.__class__ = with_dropped_cache(own)
        self._keys_to_ignore_on_load_unexpected = {
            *(getattr(self, "_keys_to_ignore_on_load_unexpected", None) or ()),
            *(names_pattern(sublayer, dropped) for sublayer, dropped in family.sublayers(mask) if dropped),
        }

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: weights are renamed and tables filled as in the stock class, which else depends on the class's module."""
        return False

    @classmethod
    def from_pretrained(cls, model: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> PreTrainedModel:
        """As `hf.from_pretrained`, also with a config as Transformers' Auto classes read it, arguments included."""
        if isinstance(config, DroppedConfig):
            return super().from_pretrained(model, *args, config=config, **kwargs)
        kwargs.setdefault("attn_implementation", getattr(config, "_attn_implementation", None))
        return _opened(model, Decoder.of(config, cls.__name__) if config is not None else None, kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As Transformers', under the file names of stripped weights, so that nothing else loads them unnoticed.

        What Trainer saves has an index by which it finds them, and is one file: experts are not put together from two.
        """
        trainers = re.fullmatch(r"checkpoint-\d+", Path(save_directory).name)
        options: dict[str, Any] = {"variant": VARIANT} | ({"max_shard_size": ANY_SIZE} if trainers else {})
        super().save_pretrained(save_directory, **options | kwargs)
        if trainers:
            leave_index(Path(save_directory))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As torch's, also for tensors as checkpoints have them, which Trainer reads and Transformers renames."""
        return super().load_state_dict(in_own_names(self, state_dict), *args, **kwargs)


def names_pattern(sublayer: Sublayer, dropped: tuple[int, ...]) -> str:
    """Matches names of a sublayer's parameters in these layers, in the checkpoint's words and in Transformers' own."""
    names = {*sublayer.names, sublayer.transformers_module}
    return rf"^{BEFORE_LAYER}({'|'.join(map(str, dropped))})\.({'|'.join(map(re.escape, sorted(names)))})\."


@cache
def _dropped_model(stock: type[PreTrainedModel], architecture: str) -> type[PreTrainedModel]:
    name = f"{EXPLICIT_PREFIX}{architecture}"
    # Transformers knows some architectures' renamed weights by the class's name: GPT-NeoX' output head, for one. A
    # wrapper's it knows by the model's type, which it does not heed in a class that is not its own.
    conversions = get_checkpoint_conversion_mapping(stock.__name__)
    if conversions is None and architecture in WRAPPERS:
        conversions = get_checkpoint_conversion_mapping(stock.config_class.model_type)
    if conversions is not None:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    return make_known(stock, type(name, (DroppedModel, stock), {"__module__": __name__}))


def __getattr__(name: str) -> type[PreTrainedModel]:
    """A class by its name, for processes that unpickle what another has made."""
    return _dropped_model(stock_of(__name__, name, PreTrainedModel), name.removeprefix(EXPLICIT_PREFIX))
