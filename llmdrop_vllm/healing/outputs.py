"""The last projections of a kept sublayer, which are what healing refits, and what they multiply."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmdrop_vllm.architectures.family import Sublayer
from llmdrop_vllm.scoring.layers import LayerStream


@dataclass(frozen=True)
class Projection:
    """One linear module at the end of a sublayer, whose output reaches the residual stream times a constant."""

    module: nn.Module

    @property
    def weight(self) -> torch.Tensor:
        """[columns, outputs], a view of the parameter."""
        return self.module.weight if isinstance(self.module, Conv1D) else self.module.weight.T

    @property
    def columns(self) -> int:
        """What a token is described by: the projection's inputs, and a one where it has a bias."""
        return len(self.weight) + (self.module.bias is not None)

    def features(self, z: torch.Tensor) -> torch.Tensor:
        """Rows for the regression, [tokens, columns] in float32, of inputs [tokens, inputs]."""
        z = z.float()
        return z if self.module.bias is None else torch.cat([z, torch.ones_like(z[:, :1])], dim=1)

    def add(self, delta: torch.Tensor) -> None:
        """Change weight and bias by dW [columns, outputs]."""
        inputs = len(self.weight)
        self.weight.add_(delta[:inputs].to(self.weight.dtype))
        if self.module.bias is not None:
            self.module.bias.add_(delta[inputs].to(self.module.bias.dtype))

    @contextmanager
    def recording(self) -> Iterator["Recorded"]:
        """Within this context, what the projection got and gave is kept, one call's at a time."""
        found = Recorded()

        def record(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            found.inputs, found.outputs = args[0], output
            return torch.zeros_like(output) if found.silenced else None

        with self.module.register_forward_hook(record):
            yield found


class Recorded:
    """[batch, tokens, inputs] and [batch, tokens, outputs] of the last call; silenced, its output counts as zeros."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    silenced = False


def output_parameters(stream: LayerStream, index: int, sublayer: Sublayer) -> dict[str, nn.Parameter]:
    """The parameters of a layer's sublayer that its output is linear in, or its post-norm multiplies, by their names.

    What the checkpoint calls the sublayer's output decides, for Transformers may store it otherwise: experts as one.
    """
    layer, prefix = stream.layers[index], f"{stream.layers_prefix}{index}."
    # Where the module is the projection itself, as OPT's is, the others beside it are its input.
    itself = "weight" in sublayer.output.split("|")
    modules = sublayer.module if itself else "|".join((sublayer.module, *sublayer.also))
    ours = rf"(?:{modules})\.(?:.*\.)?{sublayer.output_ending}|{sublayer.post_norm}\.\w+"
    pattern = re.compile(rf"^.*\.{index}\.(?:{ours})$")
    return {
        name: parameter
        for name, parameter in layer.named_parameters()
        if any(map(pattern.match, stream.stored_names([prefix + name])))
    }


def projection(layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Projection | None:
    """The one linear module that these parameters are of; None where there are several, or something else."""
    for owner, module in layer.named_modules():
        names = {f"{owner}.{name}" for name, _ in module.named_parameters()}
        if names == parameters.keys() and isinstance(module, nn.Linear | Conv1D):
            return Projection(module)
    return None
