"""Weights and a mask: what must have been loaded, and which adapter weights have nowhere to go."""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.model_executor.models.utils import WeightsMapper, _model_to_pp_missing_layer_names

from llmdrop_vllm.architectures.names import layer_in
from llmdrop_vllm.checkpoints.checkpoint import check_complete
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.checkpoints.directory import read_config
from llmdrop_vllm.errors import InputError, MaskError
from llmdrop_vllm.masks.mask import has_layer_count
from llmdrop_vllm.serving.overrides import may_say
from llmdrop_vllm.serving.passthrough import DroppedNorm, DroppedPostNorm, DroppedSublayer

DROPPED = (DroppedSublayer, DroppedNorm, DroppedPostNorm)


class Source:
    """The checkpoint of a model. vLLM can load another one into it while it runs: the weights, and not the config."""

    def __init__(self, model_config: ModelConfig, architecture: str, decoder: Decoder | None) -> None:
        self.model_config, self.architecture, self.decoder = model_config, architecture, decoder
        self.model = model_config.model

    def left(self, model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights but those of dropped modules, by their names in vLLM's model, and where an override says how many
        layers there are, of others behind these, which vLLM's loaders refuse.

        Nearly all of vLLM's loaders skip what a stage of a pipeline lacks, by the names that they rename weights to.
        The one of Granite's hybrids does not, and renames none.
        """
        gone = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, DROPPED))
        shortened = self.decoder is not None and may_say(self.model_config.hf_overrides, has_layer_count)
        depth = self.decoder.mask.num_hidden_layers if self.decoder and shortened else math.inf
        for name, tensor in weights:
            if not name.startswith(gone) and (layer_in(name) or 0) < depth:
                yield name, tensor

    def has_changed(self, model: nn.Module) -> bool:
        """Whether another checkpoint has taken its place since this was asked, from which the model is to be loaded.

        Raises InputError for one that does not fit, with the model as it was.
        """
        if self.model == self.model_config.model:
            return False
        try:
            self._check(Path(self.model_config.model))
        except InputError:
            self.model_config.model = self.model
            finalize_layerwise_reload(model, self.model_config)  # puts back what was made ready for other weights
            raise
        self.model = self.model_config.model
        return True

    def _check(self, directory: Path) -> None:
        """Raise MaskError for another mask than the model was built with, CheckpointError for missing weights."""
        if not directory.is_dir():
            return
        own, theirs = self.decoder, Decoder.of_masked(read_config(directory), self.architecture)
        if theirs is not None and (own is None or own.mask.effect != theirs.mask.effect):
            raise MaskError(
                f"{directory} has a mask ({theirs.mask.summary()}), and the running model was built with "
                f"{f'another ({own.mask.summary()})' if own else 'none'}; start an engine for it"
            )
        if own is not None and own.family is not None:
            check_complete(directory, own.family, own.mask)


def forget_missing_layers(model: nn.Module) -> None:
    """Take out of vLLM's memory what earlier models in this process lacked.

    vLLM remembers it by id, and ids are used again: a model at the address of a dropped one would keep random weights.
    """
    for module in model.modules():
        _model_to_pp_missing_layer_names.pop(id(module), None)


def check_all_loaded(
    model: nn.Module, loaded: set[str], seen: set[str], *, quantized: bool, without_values: Collection[int] = ()
) -> None:
    """Raise ValueError naming the weights of kept sublayers that the checkpoint lacked.

    loaded: parameter names that the stock class says it filled; seen: tensor names that the checkpoint gave. vLLM's own
    check exempts linear layers, and counts a merged parameter (q, k and v in one) as loaded once one part was there.
    A quantized model's parameters are not its checkpoint's tensors, so only the merged ones are checked there. Layers
    `without_values` have the keys' projection for them.
    """
    missing: set[str] = set()
    if not quantized:
        # Outside the decoder layers, a head may be made by vLLM itself after loading.
        parameters = dict(model.named_parameters(remove_duplicate=False))
        # One parameter may be known by several names, as an expert's bias is to the router and to the experts.
        filled = {id(parameters[name]) for name in loaded & parameters.keys()}
        missing |= {name for name, each in parameters.items() if layer_in(name) is not None and id(each) not in filled}
    # The checkpoint of a wrapper names its tower otherwise than vLLM does.
    renames = WeightsMapper.get_rename_mapper(getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper())
    seen = seen.union(filter(None, map(renames.map_name, seen)))
    merged: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for name in (each for each in loaded if layer_in(each) is not None):
        for part, sources in merged.items():
            if f".{part}." in name:
                given = {name.replace(f".{part}.", f".{source}.") for source in sources}
                # Where no part is known by its stock name, the checkpoint has other names or the merged tensor itself.
                if layer_in(name) in without_values:
                    given = {each for each in given if ".v_proj." not in each}
                if given & seen:
                    missing |= given - seen
    if missing:
        raise ValueError(f"the checkpoint lacks weights of sublayers that the mask keeps: {', '.join(sorted(missing))}")


@dataclass
class RefuseDroppedAdapters(WeightsMapper):
    """The model's own weight-name mapper, which refuses LoRA weights for a dropped sublayer instead of losing them.

    vLLM asks a model's mapper for its renames when it loads an adapter, and maps every tensor name of the adapter.
    """

    dropped: tuple[str, ...] = ()
    names_an_adapter: bool = False

    @classmethod
    def around(cls, model: nn.Module) -> Self:
        """The mapper of `model`, whose sublayers are dropped already."""
        stock = getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper()
        dropped = (name for name, module in model.named_modules() if isinstance(module, DROPPED))
        return cls(**{field.name: getattr(stock, field.name) for field in fields(stock)}, dropped=tuple(dropped))

    def get_rename_mapper(self) -> Self:
        """What LoRA loading uses; see the stock class."""
        return replace(super().get_rename_mapper(), names_an_adapter=True)

    def map_name(self, key: str) -> str | None:
        """As the stock class. Raises ValueError for an adapter's tensor that belongs to a dropped sublayer."""
        name = super().map_name(key)
        if self.names_an_adapter and name is not None:
            for module in self.dropped:
                if name.startswith(f"{module}."):
                    raise ValueError(
                        f"the LoRA adapter carries {key}, but the drop mask removed {module}; "
                        "take out what has no place: llmdrop adapter DROPPED OUT --lora ADAPTER"
                    )
        return name
