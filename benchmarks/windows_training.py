"""Layers whose window costs little, and training after which it costs less: both on texts that judge nothing."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.windowed_attention import Window
from benchmarks.windows_subject import FITTED, FITTED_SAYINGS, Needles, Subject
from llmdrop_vllm.artifacts import write_atomically

CHOSEN_ON, CHOOSING_DEPTHS = 4096, (0.1, 0.35, 0.6, 0.85)
# A needle's answer is three to five tokens of thousands, and is to count beside them.
NEEDLE_WEIGHT, EVERY, POOL = 0.1, 8, 6


@dataclass(frozen=True)
class Training:
    """`sinks` alone, or the attention of the layers that are windowed with them; KL to the full model on `steps` texts
    of `tokens` each, half of them with a needle."""

    sinks: bool = True
    attention: bool = False
    steps: int = 160
    tokens: int = 4096
    sink_rate: float = 0.03
    rate: float = 1e-4


def least_lost(subject: Subject, count: int, window: Window, needles: bool) -> list[int]:
    """Layers that lose least together, found one after the other among those that lose least alone."""
    kept = subject.directory / f"windows-alone{'-needles' if needles else ''}.json"
    judge = _Judge(subject, window, needles)
    alone: list[float] = json.loads(kept.read_text()) if kept.exists() else []
    for layer in tqdm(range(len(alone), subject.depth), desc="layers alone"):
        alone.append(judge([layer]))
        write_atomically(kept, json.dumps(alone))
    order = sorted(range(subject.depth), key=alone.__getitem__)
    if not needles:
        return sorted(order[:count])
    path = subject.directory / "windows-greedy.json"
    chosen: list[int] = json.loads(path.read_text()) if path.exists() else []
    for _ in tqdm(range(len(chosen), count), desc="layers together"):
        pool = [layer for layer in order if layer not in chosen][: max(POOL, count - len(chosen))]
        chosen.append(min(pool, key=lambda layer: judge([*chosen, layer])))
        write_atomically(path, json.dumps(chosen))
    return sorted(chosen[:count])


class _Judge:
    """KL to the full model past the window, on texts with a needle in each, whose answers count for a tenth of it."""

    def __init__(self, subject: Subject, window: Window, needles: bool) -> None:
        self.subject, self.window, self.weight = subject, window, NEEDLE_WEIGHT if needles else 0.0
        hay = subject.documents[FITTED - 1][0].tolist()
        self.texts: Needles = subject.needles(CHOSEN_ON, FITTED_SAYINGS[0], hay, CHOOSING_DEPTHS)
        self.whole = self._said()

    def __call__(self, layers: Sequence[int]) -> float:
        with self.subject.windowed(dict.fromkeys(layers, self.window)):
            said = self._said()
        lost = [
            (whole.exp() * (whole - own)).sum(-1).mean().item() for whole, own in zip(self.whole, said, strict=True)
        ]
        return lost[0] + self.weight * lost[1]

    @torch.inference_mode()
    def _said(self) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.subject.hidden(self.texts.ids)
        spread, end = hidden[:, self.window.length : -1 : EVERY], -self.texts.answer_tokens
        return self.subject.log_probabilities(spread), self.subject.log_probabilities(hidden[:, end - 1 : -1])


@contextmanager
def trained(subject: Subject, windows: Mapping[int, Window], training: Training) -> Iterator[dict[int, Window]]:
    """Within this context the model has the weights, and the windows the sinks, that training came to."""
    attentions = [subject.attentions[layer] for layer in windows]
    weights = [each for attention in attentions for each in attention.parameters()] if training.attention else []
    before = [each.data.clone() for each in weights]
    sinks = {layer: nn.Parameter(window.sinks.clone()) for layer, window in windows.items() if window.sinks is not None}
    windows = {layer: replace(each, sinks=sinks.get(layer), always=layer in sinks) for layer, each in windows.items()}
    groups = [{"params": [*sinks.values()], "lr": training.sink_rate}, {"params": weights, "lr": training.rate}]
    for each in weights:
        each.data = each.data.float()  # steps are smaller than bfloat16 can tell
        each.requires_grad_(True)
    try:
        _train(
            subject, windows, training, torch.optim.AdamW([each for each in groups if each["params"]], weight_decay=0)
        )
        for weight, old in zip(weights, before, strict=True):
            weight.data = weight.data.to(old.dtype)
            weight.requires_grad_(False)
        yield {
            layer: each if each.sinks is None else replace(each, sinks=each.sinks.detach())
            for layer, each in windows.items()
        }
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.requires_grad_(False)
            weight.data = old


def _train(
    subject: Subject, windows: Mapping[int, Window], training: Training, optimizer: torch.optim.Optimizer
) -> None:
    warm = max(1, training.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / training.steps)),
    )
    with tqdm(total=training.steps, desc="training") as bar:
        for step, (ids, whole, rows) in enumerate(_lessons(subject, training)):
            with subject.windowed(windows), torch.autocast(subject.device.type, torch.bfloat16):
                said = subject.log_probabilities(subject.hidden(ids)[0, rows])
            loss = (whole.exp() * (whole - said)).sum(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update()
            if step % 10 == 9:
                bar.set_postfix(kl=f"{loss.item():.4f}")


def _lessons(subject: Subject, training: Training) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Token ids [1, tokens], what the full model says [rows, vocabulary] and where; asked before training."""
    prepared = []
    room = len(subject.manual) - training.tokens
    for step in range(training.steps):
        start = step * room // training.steps
        hay = subject.manual[start : start + training.tokens]
        rows = torch.arange(step % EVERY, training.tokens - 1, EVERY)
        ids = torch.tensor([hay], device=subject.device)
        if step % 2:
            saying, depth = FITTED_SAYINGS[1 + step // 2 % 2], (0.618 * step) % 0.95
            needles = subject.needles(training.tokens, saying, hay, (depth,))
            ids, answer = needles.ids, needles.answer_tokens
            rows = torch.cat([rows, torch.arange(training.tokens - answer - 1, training.tokens - 1).repeat(4)])
        with torch.no_grad(), torch.autocast(subject.device.type, torch.bfloat16):
            prepared.append((ids, subject.hidden(ids)[0, rows], rows))
    for ids, hidden, rows in prepared:
        with torch.no_grad():
            whole = subject.log_probabilities(hidden)
        yield ids, whole, rows
