"""What stands in a decoder layer where a sublayer was dropped.

All of them subclass vLLM's PPMissingLayer, which makes every vLLM weight loader skip the dropped tensors, whether the
checkpoint still has them or not.
"""

from typing import TypeAlias

import torch
from vllm.model_executor.models.utils import PPMissingLayer

Normed: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # and the residual, if given


class DroppedSublayer(PPMissingLayer):
    """In place of an attention or MLP module whose norm goes too: hands on what the dropped norm returned.

    `tuple_length` is how many values the module returned, 0 for a tensor alone; all but the first become None. `fills`
    is for a module that wrote its output into its last argument.
    """

    def __init__(self, tuple_length: int = 0, fills: bool = False) -> None:
        super().__init__()
        self.tuple_length, self.fills = tuple_length, fills

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        """What stands in for the output, [tokens, hidden]: the hidden states among the arguments."""
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        floating = [each for each in tensors if each.is_floating_point()]  # positions and the like are integers
        if not floating:
            raise TypeError("a dropped sublayer was called without hidden states")
        output = self.output(floating[0])
        if self.fills:
            floating[-1].copy_(output)
        return (output, *[None] * (self.tuple_length - 1)) if self.tuple_length else output

    def output(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the layer is to take for the module's output, [tokens, hidden]."""
        return hidden_states


class ZeroSublayer(DroppedSublayer):
    """In place of a module whose norm stays, or which has none: adds nothing to the residual stream."""

    def output(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros; in place of a linear layer as many as it returned."""
        width = getattr(self, "output_size_per_partition", hidden_states.shape[-1])
        return hidden_states.new_zeros(*hidden_states.shape[:-1], width)


class DroppedNorm(PPMissingLayer):
    """In place of a norm before a dropped sublayer. vLLM fuses it with the residual add in most layers.

    The pair (x, residual) stands for their sum, so both are handed on as they are: the next norm that was kept adds
    them.
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
        """x and residual: [tokens, hidden]."""
        if residual is None:
            # The caller keeps x itself as the residual: in a first layer, and where layers add the residual themselves.
            return torch.zeros_like(x)
        return x, residual


class AddingNorm(DroppedNorm):
    """A dropped norm for layers that multiply what a sublayer returned, which must not reach what is handed on."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
        """As a kept norm, the residual that is returned holds the whole stream; x and residual: [tokens, hidden]."""
        return super().forward(x) if residual is None else (torch.zeros_like(x), x + residual)


class DroppedPostNorm(PPMissingLayer):
    """In place of a norm after a dropped sublayer: a layer norm would make its bias of the zeros that it is given."""
