"""One layer's output weights refitted: in closed form where there is one, by descent elsewhere.

Elsewhere are experts, gated ones, and whatever a norm stands behind. Gradients are off around all of this.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from llmdrop_vllm.healing.outputs import Projection, projection
from llmdrop_vllm.healing.ridge import Sums, fit
from llmdrop_vllm.healing.task import Task

STEPS, PATIENCE = 40, 4


@dataclass(frozen=True)
class Refit:
    """A layer's squared error on held-out tokens before, and what share of it is left; 1 where nothing was changed.

    `tensors` are those of the checkpoint that were.
    """

    error: float
    columns: int
    left: float = 1.0
    ridge: float | None = None
    steps: int | None = None
    tensors: tuple[str, ...] = ()


def refit(task: Task, parameters: Mapping[str, nn.Parameter], bar: "tqdm[Any]") -> Refit:
    """Change the parameters in place, or leave them where no change makes the held-out error smaller."""
    if (single := projection(task.layer, parameters)) is not None:
        return _by_ridge(task, single, bar)
    before = {name: each.dtype for name, each in task.layer.named_parameters()}
    task.layer.float().requires_grad_(False)  # bfloat16 cannot take steps as small as these
    found = _by_descent([*parameters.values()], task.loss)
    for name, parameter in task.layer.named_parameters():
        parameter.data = parameter.data.to(before[name])
    bar.update(len(task.streams.chunks))
    return found


def _by_ridge(task: Task, single: Projection, bar: "tqdm[Any]") -> Refit:
    device, rounded = task.streams.device, task.streams.student.dtype is torch.bfloat16
    learnt, held_out = (Sums(single.columns, single.weight.shape[1], device, rounded=rounded) for _ in range(2))
    with single.recording() as recorded:
        constant = task.constant(recorded)
        for chunk in task.streams.chunks:
            e, w = task.lack(chunk)
            z = recorded.inputs.reshape(*chunk.shape, -1)
            for sums, judging in ((learnt, False), (held_out, True)):
                rows = task.rows(chunk, judging)
                sums.add(single.features(z[rows]).mul_(constant * w[rows]), e[rows])
            bar.update()
    if (fitted := fit(learnt, held_out)) is None:
        return Refit(held_out.ee, single.columns)
    single.add(fitted.delta)
    return Refit(held_out.ee, single.columns, fitted.error_left, ridge=fitted.ridge)


def _by_descent(parameters: Sequence[nn.Parameter], loss: Callable[[bool], float]) -> Refit:
    """Float32 parameters changed to what the held-out tokens like best of the steps of L-BFGS, all of them together; it
    starts from no change and is stopped by those tokens, so that experts which few tokens see stay near what they were.

    `loss` is the sum of squared errors of the learnt tokens (True) or those held out; with gradients on it leaves them.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.LBFGS(parameters, max_iter=1, history_size=20, line_search_fn="strong_wolfe")
    first = loss(False)
    scale = 1 / max(first, 1e-30)  # L-BFGS stops at gradients that are small in absolute terms

    def closure() -> float:  # with gradients on
        optimizer.zero_grad()
        value = loss(True) * scale
        for parameter in parameters:
            if parameter.grad is not None:  # that of an expert which no token sees
                parameter.grad.mul_(scale)
        return value

    best, kept, best_step = first, [parameter.detach().clone() for parameter in parameters], 0
    for step in range(1, STEPS + 1):
        optimizer.step(closure)
        value = loss(False)
        if value < best * (1 - 1e-4):
            best, best_step = value, step
            kept = [parameter.detach().clone() for parameter in parameters]
        elif step - best_step >= PATIENCE or not value < float("inf"):
            break
    for parameter, value_kept in zip(parameters, kept, strict=True):
        parameter.copy_(value_kept)
        parameter.requires_grad_(False)
        parameter.grad = None
    columns = max(each.shape[-1] for each in parameters)
    return Refit(first, columns, best / first, steps=best_step) if best_step and first else Refit(first, columns)
