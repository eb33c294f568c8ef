"""Dropping in models that vLLM serves through its Transformers backend, which builds Transformers' own decoder.

There the whole decoder is made on the meta device, where it takes no memory, and then assigned to an attribute: that is
when its dropped sublayers are replaced. The backend then wants an attention interface in every layer, and makes
a vLLM attention layer for each; a dropped layer's is given up as soon as it is assigned.
"""

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from vllm.model_executor.models.transformers.fusers import AttentionFuser
from vllm.model_executor.models.utils import PPMissingLayer

from llmdrop_vllm.architectures.family import Sublayer
from llmdrop_vllm.serving.dropping import Dropping, Substitutes, decoder_layers
from llmdrop_vllm.serving.passthrough import DroppedPostNorm, ZeroSublayer


class DroppedBackendAttention(ZeroSublayer):
    """In place of an attention module that the backend will give a vLLM attention layer."""


class BackendDropping(Dropping):
    """As `Dropping`, for decoders of Transformers: layers add the residual themselves, norms get one argument."""

    layers_name: str

    def __call__(self, parent: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
        """The module-registration hook; see `Dropping`."""
        if isinstance(module, PreTrainedModel):
            self._replace_all(name, module)
        elif isinstance(parent, DroppedBackendAttention) and module is not None:
            self.forget(module)
            return PPMissingLayer()
        return None

    def substitutes_of(self, sublayer: Sublayer) -> Substitutes:
        """As `Dropping.substitutes_of`, by the names in Transformers' decoder layer."""
        module = DroppedBackendAttention if sublayer is self.family.attention else ZeroSublayer
        names = (sublayer.transformers_module, *sublayer.also, *dict(sublayer.inner))
        parts: Substitutes = dict.fromkeys(names, partial(module, sublayer.transformers_tuple))
        return parts | dict.fromkeys(sublayer.norms, DroppedPostNorm)

    def _replace_all(self, attribute: str, model: PreTrainedModel) -> None:
        name, layers = decoder_layers(model, self.mask.num_hidden_layers)
        self.layers_name = f"{attribute}.{name}"
        for index, layer in enumerate(layers):
            if index in self.stage_layers():  # vLLM takes the others away
                self.layer_index[layer] = index
                gone = [self.substitutes_of(sublayer) for sublayer, dropped in self.gone if index in dropped]
                for part, substitute in (each for parts in gone for each in parts.items()):
                    if getattr(layer, part, None) is not None:
                        setattr(layer, part, substitute())
                        self.replaced.add((index, part))


class DroppableBackend(nn.Module):
    """Mixed in before `Droppable` and a model class of the Transformers backend."""

    dropping_class = BackendDropping
    dropping: BackendDropping | None

    def recursive_replace(self, *args: Any, **kwargs: Any) -> None:
        """As the stock class; then says where the attention of the dropped layers would be."""
        super().recursive_replace(*args, **kwargs)
        if (dropping := self.dropping) is not None:
            attention = dropping.family.attention.transformers_module
            for layer in set(dropping.mask.attention) & set(dropping.stage_layers()):
                name = f"{dropping.layers_name}.{layer}.{attention}"
                self.attention_fusers[layer] = name, AttentionFuser("a dropped sublayer")
