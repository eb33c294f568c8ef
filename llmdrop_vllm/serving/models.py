"""vLLM's own model classes, made able to drop: one subclass per stock class, created when vLLM asks for it.

vLLM imports models by a `module:attribute` string. The attribute here is `Architecture@stock.module.StockClass`, so
every process can create the same class from the string alone.
"""

import importlib
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger

from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.serving.agreement import agree
from llmdrop_vllm.serving.config_hook import BACKEND_MODULE, SAFETENSORS_FORMATS
from llmdrop_vllm.serving.dropping import Dropping, dropping, is_dropping
from llmdrop_vllm.serving.weights import RefuseDroppedAdapters, Source, check_all_loaded, forget_missing_layers
from llmdrop_vllm.serving.windows import check_engine

# With these, vLLM's loader hands over a checkpoint in one call.
WHOLE_CHECKPOINT_FORMATS = SAFETENSORS_FORMATS | {"pt", "mistral", "npcache"}

# Under vLLM's logger, so that the line looks like the others; at WARNING, because without vLLM's logging set-up
# anything lower is hidden by default.
logger = init_logger("vllm.llmdrop")


class Droppable(nn.Module):
    """Mixed in before a stock model class: builds it without the sublayers that the config's mask drops.

    Without a mask, construction and loading are the stock class's own; so they are for a model inside of one that
    drops: the outermost knows the checkpoint and sees every decoder layer, whatever class builds it.
    """

    architecture: str
    dropping_class: type[Dropping] = Dropping
    dropping: Dropping | None = None
    expects_whole_checkpoint = False
    source: Source | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        decoder = None
        if not is_dropping.get():
            decoder = Decoder.of_masked(vllm_config.model_config.hf_config, self.architecture)
            self.source = Source(vllm_config.model_config, self.architecture, decoder)
            agree(decoder, vllm_config)
        if decoder is None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            forget_missing_layers(self)
            return
        if decoder.mask.windows:
            check_engine(vllm_config)
        self.dropping = self.dropping_class(decoder, vllm_config)
        with dropping(self.dropping) as dropped:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        dropped.finish(self)
        forget_missing_layers(self)
        self.expects_whole_checkpoint = vllm_config.load_config.load_format in WHOLE_CHECKPOINT_FORMATS
        self.hf_to_vllm_mapper = RefuseDroppedAdapters.around(self)
        _log(dropped)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As the stock class, but a checkpoint that lacks weights of a kept sublayer is an error, and so is one under
        another mask that takes the first one's place.
        """
        if self.source is not None:
            changed = self.source.has_changed(self)
            if self.dropping is not None:
                weights = self.source.left(self, weights)
                self.expects_whole_checkpoint |= changed
        if self.dropping is None or not self.expects_whole_checkpoint:
            return super().load_weights(weights)
        self.expects_whole_checkpoint = False  # later calls update some weights of a running model, as RL trainers do
        seen: set[str] = set()
        loaded: set[str] = super().load_weights(_recorded(weights, seen))
        quantized = self.dropping.vllm_config.quant_config is not None
        without_values = self.dropping.decoder.keys_are_values
        check_all_loaded(self, loaded, seen, quantized=quantized, without_values=without_values)
        return loaded


def _recorded(weights: Iterable[tuple[str, torch.Tensor]], seen: set[str]) -> Iterable[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        seen.add(name)
        yield name, tensor


def _log(dropped: Dropping) -> None:
    """One line per model, from the first rank on each node and of each pipeline stage, whose layers it then names."""
    tp, pp = get_tp_group(), get_pp_group()
    if tp.rank_in_group != 0 and tp.local_rank != 0:
        return
    ranks = f" on each of {tp.world_size} ranks" if tp.world_size > 1 else ""
    layers = sorted(dropped.layer_index.values())
    stage = f" in pipeline stage {pp.rank_in_group} (layers {layers[0]}-{layers[-1]})" if pp.world_size > 1 else ""
    logger.warning("%s; %s%s%s", dropped.mask.summary(), dropped.kv_summary(), ranks, stage)


@cache
def _droppable(name: str) -> type[nn.Module]:
    architecture, _, path = name.partition("@")
    module, _, class_name = path.rpartition(".")
    stock = getattr(importlib.import_module(module), class_name)
    bases: tuple[type, ...] = (Droppable, stock)
    if module == BACKEND_MODULE:
        from llmdrop_vllm.serving.transformers_backend import DroppableBackend

        bases = (DroppableBackend, *bases)
    return type(stock.__name__, bases, {"architecture": architecture, "__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    if "@" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _droppable(name)
