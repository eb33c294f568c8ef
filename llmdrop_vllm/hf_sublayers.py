"""What stands in a Transformers model where a sublayer was: nothing is added, and nothing kept."""

from typing import Any

import torch
from torch import nn


class DroppedSublayer(nn.Module):
    """Stands where attention or an MLP was: adds nothing to the residual stream, and has no keys and values.

    `tuple_length` is how many values the module returned, 0 for a tensor alone; all but the first become None.
    `adds_residual` is for a module that was given the residual stream to add its output to.
    """

    def __init__(self, tuple_length: int = 0, *, adds_residual: bool = False) -> None:
        super().__init__()
        self.tuple_length, self.adds_residual = tuple_length, adds_residual

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the input's shape, [batch, tokens, hidden], or the residual stream as it is."""
        output = args[0] if self.adds_residual else torch.zeros_like(hidden_states)
        return (output, *[None] * (self.tuple_length - 1)) if self.tuple_length else output


class DroppedNorm(nn.Identity):
    """Stands where a norm was. Some layers ask a norm for the dtype of its weight before they call it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0), persistent=False)
