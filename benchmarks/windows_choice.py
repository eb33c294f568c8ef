"""Layers whose window costs little, on texts that judge nothing."""

import json
from collections.abc import Sequence

import torch
from tqdm import tqdm

from benchmarks.windowed_attention import Window
from benchmarks.windows_subject import FITTED, FITTED_SAYING, Needles, Subject
from llmdrop_vllm.artifacts import write_atomically

CHOSEN_ON, CHOOSING_DEPTHS = 4096, (0.1, 0.35, 0.6, 0.85)
# A needle's answer is three to five tokens of thousands, and is to count beside them.
NEEDLE_WEIGHT, EVERY, POOL = 0.1, 8, 6


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
        self.texts: Needles = subject.needles(CHOSEN_ON, FITTED_SAYING, hay, CHOOSING_DEPTHS)
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
