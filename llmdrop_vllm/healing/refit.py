"""One layer's output weights refitted: in closed form where there is one, by descent elsewhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from llmdrop_vllm.healing.descent import descend
from llmdrop_vllm.healing.outputs import Projection, projection
from llmdrop_vllm.healing.ridge import Sums, fit
from llmdrop_vllm.healing.task import Task


@dataclass(frozen=True)
class Refit:
    """A layer's squared error on held-out tokens before, and what share of it is left; 1 where nothing was changed."""

    error: float
    columns: int
    left: float = 1.0
    ridge: float | None = None
    steps: int | None = None


def refit(task: Task, parameters: Mapping[str, nn.Parameter], on_chunk: Callable[[], object]) -> Refit:
    """Change the parameters in place, or leave them where no change makes the held-out error smaller."""
    if (single := projection(task.layer, parameters)) is not None:
        return _by_ridge(task, single, on_chunk)
    return _by_descent(task, parameters, on_chunk)


def _by_ridge(task: Task, single: Projection, on_chunk: Callable[[], object]) -> Refit:
    device, chunks = task.streams.device, task.streams.batches.chunks
    rounded = task.streams.student.dtype is torch.bfloat16
    learnt, held_out = (Sums(single.columns, single.weight.shape[1], device, rounded=rounded) for _ in range(2))
    with single.recording() as recorded:
        constant = task.constant(recorded)
        for chunk in chunks:
            e, w = task.lack(chunk)
            z = recorded.inputs.reshape(*chunk.shape, -1)
            for sums, judging in ((learnt, False), (held_out, True)):
                rows = task.rows(chunk, judging)
                sums.add(single.features(z[rows]).mul_(constant * w[rows]), e[rows])
            on_chunk()
    fitted = fit(learnt, held_out)
    if fitted is None:
        return Refit(held_out.ee, single.columns)
    single.add(fitted.delta)
    return Refit(held_out.ee, single.columns, fitted.error_left, ridge=fitted.ridge)


def _by_descent(task: Task, parameters: Mapping[str, nn.Parameter], on_chunk: Callable[[], object]) -> Refit:
    before = {name: each.dtype for name, each in task.layer.named_parameters()}
    task.layer.float().requires_grad_(False)  # bfloat16 cannot take steps as small as these
    error, found = task.loss(learnt=False), descend([*parameters.values()], task.loss)
    for name, parameter in task.layer.named_parameters():
        parameter.data = parameter.data.to(before[name])
    for _ in task.streams.batches.chunks:
        on_chunk()
    columns = max(each.shape[-1] for each in parameters.values())
    steps, left = found or (None, 1.0)
    return Refit(error, columns, left, steps=steps)
