"""Refitting where there is no closed form: experts, gated ones, and whatever a norm stands behind.

The same squared error, over all output parameters of the layer together, by L-BFGS; it starts from no change and is
stopped by held-out tokens, so that experts which few tokens see stay near what they were.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

STEPS, PATIENCE = 40, 4

# Sum of squared errors, of the learnt tokens (True) or those held out; called with gradients on, it leaves them.
Loss = Callable[[bool], float]


def descend(parameters: Sequence[nn.Parameter], loss: Loss) -> tuple[int, float] | None:
    """Change float32 parameters in place to what the held-out tokens like best; how many steps were kept, and what
    share of the held-out squared error is left. None, and no change, if nothing helps.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.LBFGS(parameters, max_iter=1, history_size=20, line_search_fn="strong_wolfe")
    with torch.no_grad():
        first = loss(False)
    scale = 1 / max(first, 1e-30)  # L-BFGS stops at gradients that are small in absolute terms

    def closure() -> float:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss(True) * scale
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.mul_(scale)
        return value

    best, kept, best_step = first, [parameter.detach().clone() for parameter in parameters], 0
    for step in range(1, STEPS + 1):
        optimizer.step(closure)
        with torch.no_grad():
            value = loss(False)
        if value < best * (1 - 1e-4):
            best, best_step = value, step
            kept = [parameter.detach().clone() for parameter in parameters]
        elif step - best_step >= PATIENCE or not value < float("inf"):
            break
    with torch.no_grad():
        for parameter, value_kept in zip(parameters, kept, strict=True):
            parameter.copy_(value_kept)
            parameter.requires_grad_(False)
            parameter.grad = None
    return (best_step, best / first) if best_step and first else None
