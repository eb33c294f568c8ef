"""A model whose decoder layers are in memory one at a time, read from the shards when they are needed."""

import ctypes
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llmdrop_vllm.checkpoints import hf_weights
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint, MaskedCheckpoint
from llmdrop_vllm.checkpoints.dequantizing import dequantized
from llmdrop_vllm.checkpoints.shards import StoredTensor
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.hf import decoder_layers, model_class, transformers_config
from llmdrop_vllm.scoring.batches import Batches
from llmdrop_vllm.scoring.scratch import Chunk, HiddenStates
from llmdrop_vllm.versions import __version__

SHARED_STATES = "shared_kv_states"  # what Transformers' layers leave keys and values for later ones in


@dataclass(frozen=True)
class LayerCall:
    """What the decoder passes to one layer beside the hidden states: positions, masks and the like."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def own(self) -> "LayerCall":
        """What of it is of these tokens alone, and not alike for all of their shape."""
        return LayerCall(self.args, {key: value for key, value in self.kwargs.items() if key == SHARED_STATES})


def check_stream(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where layers hand on more than one residual stream."""
    if (several := checkpoint.family.streams) is not None:
        raise CheckpointError(
            f"{checkpoint.directory} keeps several residual streams ({several}), and importance and healing are of "
            "one; name layers yourself (`llmdrop apply --attention`), and see with `llmdrop evaluate` what they cost"
        )


class LayerStream:
    """The decoder of a checkpoint, without the mask's sublayers; Transformers' own code runs every part of it.

    The whole model exists on the meta device, where it takes no memory. `begin` runs what comes before the layers.
    """

    def __init__(self, masked: MaskedCheckpoint, *, device: torch.device, dtype: torch.dtype, attention: str) -> None:
        checkpoint = self.checkpoint = masked.checkpoint
        self.mask = masked.mask
        check_stream(checkpoint)
        self.device, self.dtype = device, dtype
        config = transformers_config(masked)
        made = model_class(config)
        config._attn_implementation = _implementation(made, config, attention)
        with torch.device("meta"):
            self.model = made(config).eval()
        hf_weights.declare_dtype(self.model, dtype)
        self.decoder: PreTrainedModel = self.model.get_decoder()
        self.layers = decoder_layers(self.model, masked.mask.num_hidden_layers)
        names = {id(module): name for name, module in self.model.named_modules()}
        self.decoder_prefix, self.layers_prefix = (
            f"{names[id(each)]}.".lstrip(".") for each in (self.decoder, self.layers)
        )
        self.tensors = hf_weights.find_tensors(dequantized(checkpoint), self.model)
        self.is_converted = hf_weights.is_converted(self.model, self.tensors)
        self.buffers: dict[tuple[str, int], bytearray] = {}
        # What each layer gets beside hidden states of a shape [batch, tokens], known once `embedding` saw that shape.
        self.calls: dict[tuple[int, int], tuple[LayerCall, ...]] = {}
        text = config.get_text_config()
        self.hidden_size: int = text.hidden_size
        self.shares_keys = bool(getattr(text, "num_kv_shared_layers", None))
        self.is_by_chunk = self.shares_keys or bool(getattr(text, "hidden_size_per_layer_input", None))
        self.by_chunk: dict[Chunk, tuple[LayerCall, ...]] = {}

    @contextmanager
    def embedding(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Within this context everything of the decoder but its layers is in memory, and the function given maps token
        ids [batch, tokens] to the first layer's input [batch, tokens, hidden].
        """
        layers = self.layers_prefix.removeprefix(self.decoder_prefix)
        outside = [name for name in self.decoder.state_dict() if not name.startswith(layers)]
        self._fill_buffers(child for name, child in self.decoder.named_modules() if not name.startswith(layers))
        self._load(self.decoder, self.decoder_prefix, outside)
        try:
            yield self._begin
        finally:
            self.decoder.to("meta")
            self.buffers.clear()

    def embed(self, batches: Batches, into: HiddenStates | None) -> None:
        """Write the first layer's input; without a place for it, as in a run that goes on, learn only what the layers
        get beside it.

        That is alike for chunks of one shape, but for inputs that some architectures give each layer of each token, and
        keys and values that later layers read: these stay in memory for all tokens.
        """
        with self.embedding() as begin:
            for chunk in batches.chunks:
                if into is not None or self.is_by_chunk or chunk.shape not in self.calls:
                    hidden = begin(batches.token_ids(chunk))
                    if into is not None:
                        into.write(0, chunk, hidden)
                if self.is_by_chunk:
                    self.by_chunk[chunk] = tuple(call.own for call in self.calls[chunk.shape])

    def take_up(self, other: "LayerStream") -> None:
        """Begin where another stream stands: with the keys and values that layers before have left for later ones."""
        if self.shares_keys:
            for chunk, (call, *_) in self.by_chunk.items():  # one for all layers
                call.kwargs[SHARED_STATES].update(other.by_chunk[chunk][0].kwargs[SHARED_STATES])

    @property
    def identity(self) -> list[Any]:
        """JSON values that tell which runs may go on with one another's: those alike, and none where keys and values
        would be lost that are in memory only.
        """
        gone = [*map(sorted, self.mask.dropped), *self.mask.windows]
        own = [__version__, self.checkpoint.fingerprint, gone, str(self.device), str(self.dtype)]
        return [*own, uuid4().hex] if self.shares_keys else own

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Within this context one decoder layer is in memory; the next one's bytes are asked for meanwhile."""
        layer = self.layers[index]
        self._fill_buffers(layer.modules())
        self._load(layer, f"{self.layers_prefix}{index}.", list(layer.state_dict()))
        self._read_ahead(index + 1)
        try:
            yield layer
        finally:
            layer.to("meta")
            _return_free_memory()

    def stored_names(self, names: Collection[str]) -> Collection[str]:
        """What the checkpoint calls these parameters of the model: of one, several names may be there."""
        return hf_weights.checkpoint_tensors(self.model, names).keys() if self.is_converted else names

    def through(self, layer: nn.Module, index: int, chunk: Chunk, hidden: torch.Tensor) -> torch.Tensor:
        """Layer `index`, which is in memory, run on a chunk's [batch, tokens, hidden]; `embed` must have seen it."""
        call = self.calls[chunk.shape][index]
        own = self.by_chunk[chunk][index] if self.is_by_chunk else call
        return first_of(layer(hidden, *own.args, **(call.kwargs | own.kwargs)))

    def _begin(self, token_ids: torch.Tensor) -> torch.Tensor:
        recorded: dict[int, tuple[torch.Tensor, LayerCall]] = {}

        def record(index: int, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            recorded[index] = hidden_states, LayerCall(args, kwargs)
            return (hidden_states, None) if self.checkpoint.family.transformers_layer_tuple else hidden_states

        with running_instead({layer: partial(record, index) for index, layer in enumerate(self.layers)}):
            self.decoder(input_ids=token_ids.to(self.device), use_cache=False)
        batch, tokens = token_ids.shape
        self.calls[batch, tokens] = tuple(recorded[index][1] for index in range(len(self.layers)))
        return recorded[0][0]

    def _load(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        if self.is_converted:
            wanted = hf_weights.checkpoint_tensors(self.model, [prefix + name for name in names])
            tensors = {name: self._tensor(self.tensors[name], name.removeprefix(prefix)) for name in wanted}
            hf_weights.load_converted(self.model, tensors, self.device)
            return
        dtypes = {name: parameter.dtype for name, parameter in module.state_dict().items()}
        state = {name: self._tensor(self.tensors[prefix + name], name).to(self.device, dtypes[name]) for name in names}
        module.load_state_dict(state, strict=False, assign=True)

    def _tensor(self, stored: StoredTensor, name: str) -> torch.Tensor:
        # Layers alike in shape take turns in the same memory: allocated anew for each, it would not all come back.
        key = name, stored.num_bytes
        if key not in self.buffers:
            self.buffers[key] = bytearray(stored.num_bytes)
        tensor = hf_weights.read_tensor(stored, self.buffers[key])
        if tensor.max().isnan():  # in bfloat16 several times as fast as the check in stream.py
            raise CheckpointError(
                f"{stored.name} in {stored.path} holds NaN; the model cannot compute anything with it"
            )
        return tensor

    def _fill_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Give tables that are computed and not stored, such as the rotary frequencies, their values.

        Before the weights are loaded: Transformers initializes a module as a whole, and would overwrite them.
        """
        for module in modules:
            tables = {name: table for name, table in module.named_buffers(recurse=False) if table.is_meta}
            for name, table in tables.items():
                setattr(module, name, torch.empty_like(table, device=self.device))
            if tables:
                self.decoder._init_weights(module)
                self.decoder._init_weights(self.decoder)  # who fills some: Falcon-H1's

    def _read_ahead(self, index: int) -> None:
        if index < len(self.layers):
            names = [f"{self.layers_prefix}{index}.{name}" for name in self.layers[index].state_dict()]
            for name in self.stored_names(names):
                self.tensors[name].read_ahead()


@contextmanager
def running_instead(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within this context, each of the modules runs what is given in place of its own code."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def first_of(output: Any) -> torch.Tensor:
    """What a layer or sublayer returned, without what it may return beside."""
    return output[0] if isinstance(output, tuple) else output


def _implementation(made: type[PreTrainedModel], config: PretrainedConfig, attention: str) -> str:
    """How attention is computed: as asked where the model's code can, else the nearest that it can."""
    # PyTorch's attention knows no soft caps on logits, and some architectures have none but their own.
    text = config.get_text_config()
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    # PaliGemma's sees a prompt without images in both directions, which neither vLLM nor its eager attention does.
    looks_ahead = getattr(text, "use_bidirectional_attention", None) is True
    if capped or looks_ahead or not made._supports_sdpa:
        return "eager"
    stock: Any = next(each for each in made.__mro__ if each.__module__.startswith("transformers."))
    return attention if stock._can_set_attn_implementation() else "sdpa"


def _return_free_memory() -> None:
    """Give the heap's free pages back to the system: glibc keeps a few MiB more after every layer otherwise."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
