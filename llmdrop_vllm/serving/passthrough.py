"""What stands in a decoder layer where a sublayer was dropped.

Both classes subclass vLLM's PPMissingLayer, which makes every vLLM weight loader skip the dropped tensors, whether the
checkpoint still has them or not.
"""

import torch
from vllm.model_executor.models.utils import PPMissingLayer


class DroppedSublayer(PPMissingLayer):
    """In place of an attention or MLP module: hands on the hidden states that it was given."""

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        """The first floating-point tensor among the arguments; positions and the like are integers."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value
        raise TypeError("a dropped sublayer was called without hidden states")


class DroppedNorm(PPMissingLayer):
    """In place of a norm that vLLM fuses with the residual add.

    The pair (x, residual) stands for their sum, so both are handed on as they are: the next norm that was kept adds
    them.
    """

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """x and residual: [tokens, hidden]."""
        if residual is None:
            # First layer: the caller has already put x itself into the residual, so nothing is left to add.
            return torch.zeros_like(x)
        return x, residual
