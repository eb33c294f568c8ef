"""A model whose decoder layers are in memory one at a time, read from the shards when they are needed."""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmdrop_vllm.checkpoint import Checkpoint
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.hf import TORCH_DTYPES, model_class, stored_tensors, transformers_config
from llmdrop_vllm.mask import DropMask
from llmdrop_vllm.shards import StoredTensor


@dataclass(frozen=True)
class LayerCall:
    """What the decoder passes to one layer beside the hidden states: positions, masks and the like."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayerStream:
    """The decoder of a checkpoint, without the mask's sublayers; Transformers' own code runs every part of it.

    The whole model exists on the meta device, where it takes no memory. `begin` runs what comes before the layers.
    """

    def __init__(
        self, checkpoint: Checkpoint, mask: DropMask, *, device: torch.device, dtype: torch.dtype, attention: str
    ) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        config = transformers_config(checkpoint, mask)
        config._attn_implementation = attention
        with torch.device("meta"):
            self.model = model_class(config)(config).eval()  # weights get their dtype as they come; tables keep theirs
        self.decoder: nn.Module = self.model.get_decoder()
        self.layers: nn.ModuleList = self.decoder.layers
        prefix = next(f"{name}." for name, module in self.model.named_modules() if module is self.decoder)
        stored = stored_tensors(checkpoint, self.model)
        self.tensors = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        self.buffers: dict[tuple[str, int], bytearray] = {}
        self.hidden_size: int = config.get_text_config().hidden_size
        self.calls: dict[tuple[int, int], tuple[LayerCall, ...]] = {}

    @contextmanager
    def embedding(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Within this context everything of the decoder but its layers is in memory, and the function given maps token
        ids [batch, tokens] to the first layer's input [batch, tokens, hidden].
        """
        outside = [name for name in self.decoder.state_dict() if not name.startswith("layers.")]
        self._load(self.decoder, "", outside)
        self._fill_buffers(child for name, child in self.decoder.named_modules() if not name.startswith("layers."))
        try:
            yield self._begin
        finally:
            self.decoder.to("meta")
            self.buffers.clear()

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Within this context one decoder layer is in memory; the next one's bytes are asked for meanwhile."""
        layer = self.layers[index]
        self._load(layer, f"layers.{index}.", list(layer.state_dict()))
        self._fill_buffers(layer.modules())
        self._read_ahead(index + 1)
        try:
            yield layer
        finally:
            layer.to("meta")
            _return_free_memory()

    def call(self, index: int, shape: tuple[int, int]) -> LayerCall:
        """What layer `index` gets beside hidden states of shape [batch, tokens]; known once `begin` saw that shape."""
        return self.calls[shape][index]

    def _begin(self, token_ids: torch.Tensor) -> torch.Tensor:
        recorded: dict[int, tuple[torch.Tensor, LayerCall]] = {}

        def recorder(index: int) -> Callable[..., torch.Tensor]:
            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                recorded[index] = hidden_states, LayerCall(args, kwargs)
                return hidden_states

            return forward

        try:
            for index, layer in enumerate(self.layers):
                layer.forward = recorder(index)
            self.decoder(input_ids=token_ids.to(self.device), use_cache=False)
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)
        batch, tokens = token_ids.shape
        self.calls[batch, tokens] = tuple(recorded[index][1] for index in range(len(self.layers)))
        return recorded[0][0]

    def _load(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        state = {name: self._tensor(self.tensors[prefix + name], name) for name in names}
        module.load_state_dict(state, strict=False, assign=True)

    def _tensor(self, stored: StoredTensor, name: str) -> torch.Tensor:
        # Layers alike in shape take turns in the same memory: allocated anew for each, it would not all come back.
        buffer = self.buffers.setdefault((name, stored.num_bytes), bytearray(stored.num_bytes))
        stored.read_into(buffer)
        tensor = torch.frombuffer(buffer, dtype=TORCH_DTYPES[stored.dtype]).view(stored.shape)
        if tensor.max().isnan():
            raise CheckpointError(
                f"{stored.name} in {stored.path} holds NaN; the model cannot compute anything with it"
            )
        return tensor.to(self.device, self.dtype)

    def _fill_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Give tables that are computed and not stored, such as the rotary frequencies, their values."""
        for module in modules:
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                module.to_empty(device=self.device, recurse=False)
                self.model._init_weights(module)

    def _read_ahead(self, index: int) -> None:
        if index < len(self.layers):
            for name in self.layers[index].state_dict():
                self.tensors[f"layers.{index}.{name}"].read_ahead()


def _return_free_memory() -> None:
    """Give the heap's free pages back to the system: glibc keeps a few MiB more after every layer otherwise."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
