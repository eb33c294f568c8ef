"""Masks switched in a running engine, for evaluation: one engine judges many masks.

The model is built with nothing gone; a mask is put on by the same stand-ins that a model under that mask is built with,
and taken off again. KV cache stays allocated for every layer. The engine runs each forward pass as it is written: of
a compiled one, vLLM would go on with what was compiled.
"""

from typing import Any

from torch import nn
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.distributed.parallel_state import get_pp_group

from llmdrop_vllm.architectures.family import Sublayer
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.serving.dropping import Dropping, SubstitutionError, decoder_layers, standing_in


class MaskSwitch:
    """vLLM mixes this into its worker, of which every rank has one (`worker_extension_cls`)."""

    vllm_config: VllmConfig
    model_runner: Any
    llmdrop_switching: "Switching | None" = None

    def llmdrop_refuses(self) -> str:
        """Why masks cannot be switched here; empty where they can. To be asked before anything else is."""
        model: nn.Module = self.get_model()  # type: ignore[attr-defined]
        compilation = self.vllm_config.compilation_config
        if compilation.mode != CompilationMode.NONE or compilation.cudagraph_mode != CUDAGraphMode.NONE:
            return "the model is compiled"
        kind: type[Dropping] | None = getattr(model, "dropping_class", None)
        if kind is None:
            return f"{type(model).__name__} has no row in the family table"
        if self.llmdrop_switching is None:
            self.llmdrop_switching = Switching(model, self.vllm_config, kind)
        runner = self.model_runner
        if get_pp_group().world_size > 1 and runner.intermediate_tensors is None:
            # What stages hand on is allocated by a warm-up, which vLLM's worker for CPUs leaves out in eager mode.
            runner.profile_run()
        return ""

    def llmdrop_put_on(self, attention: list[int], mlp: list[int]) -> None:
        """Go without these layers' sublayers from the next pass on; what was gone before comes back.

        Raises SubstitutionError where the model cannot, or was not built as its row of the family table says.
        """
        if self.llmdrop_switching is None and (refusal := self.llmdrop_refuses()):
            raise SubstitutionError(f"masks cannot be switched: {refusal}")
        assert self.llmdrop_switching is not None, "made by llmdrop_refuses"
        self.llmdrop_switching.put_on(tuple(attention), tuple(mlp))


class Switching:
    """A model whose sublayers can go and come back."""

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, dropping_class: type[Dropping]) -> None:
        self.dropping = dropping_class(Decoder.of(vllm_config.model_config.hf_config, model.architecture), vllm_config)
        self.before: list[tuple[nn.Module, str, nn.Module]] = []
        _, self.layers = decoder_layers(model, self.dropping.mask.num_hidden_layers)

    def put_on(self, attention: tuple[int, ...], mlp: tuple[int, ...]) -> None:
        """A mask that goes without what the model was built without, and perhaps more."""
        for layer, name, module in self.before:
            setattr(layer, name, module)
        self.before = []
        stage, own = self.dropping.stage_layers(), dict(self.dropping.gone)
        mask = DropMask(self.dropping.mask.num_hidden_layers, attention, mlp)
        for sublayer, dropped in self.dropping.family.sublayers(mask):
            for index in {*dropped}.intersection(stage).difference(own[sublayer]):
                self._substitute(index, sublayer)

    def _substitute(self, index: int, sublayer: Sublayer) -> None:
        layer = self.layers[index]
        for name, substitute in self.dropping.substitutes_of(sublayer).items():
            if (module := getattr(layer, name, None)) is not None:
                setattr(layer, name, standing_in(substitute(), module))
                self.before.append((layer, name, module))
            elif name not in sublayer.optional:
                row = self.dropping.family.name
                raise SubstitutionError(f"layer {index} has no {name}; the family table's row {row!r} does not fit")
