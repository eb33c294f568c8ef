"""How much of its perplexity on prose a dropped SmolLM2 regains, healed on its answers and healed on prose.

    apt-get install debian-handbook
    python benchmarks/healing_prose.py

A handbook's pages, every other one to heal on and the rest to measure: of their kind, and not seen. Healed on answers
are the checkpoints that `healing.py` left in --directory.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.healing import Subject, heal
from benchmarks.healing_ways import Way
from benchmarks.options import ending
from benchmarks.real_quality import CONTEXT, loss, prose
from benchmarks.record import RESULTS, add_out, finish
from benchmarks.table import rows
from llmdrop_vllm import DropMask, InputError, hf
from llmdrop_vllm.artifacts import write_atomically
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.calibration import load_calibration

MODEL, COUNT, WINDOWS = "smollm2", 8, 64
# By the name in the table, the way's directory.
ON_ANSWERS = {
    "closed form, answers": "8-closed-form",
    "closed form, the embedded text": "8-closed-form-text",
    "closed form, then training, answers": "8-closed-form-then-training",
}


class Prose(Subject):
    """Learns from prose."""

    def learnt_from(self, sources: tuple[str, ...], tokens: int | None) -> Any:
        """Windows of the pages that are not measured."""
        return load_calibration(self.checkpoint, str(self.directory / "prose-learnt.txt"), samples=128, seq_len=CONTEXT)


def halves(directory: Path) -> Path:
    """Write the pages to heal on and those to measure; the place of the latter."""
    pages = prose(directory / "prose.txt").read_text().splitlines()
    learnt, measured = directory / "prose-learnt.txt", directory / "prose-measured.txt"
    write_atomically(learnt, "\n".join(pages[::2]))
    write_atomically(measured, "\n".join(pages[1::2]))
    return measured


def perplexity(checkpoint: Checkpoint, mask: DropMask, text: Path) -> float:
    """On windows of the text, in float32."""
    windows = load_calibration(checkpoint, str(text), samples=WINDOWS, seq_len=CONTEXT).sequences
    model = hf.load(checkpoint.under(mask), dtype=torch.float32).eval()
    with torch.inference_mode():
        losses = [loss(model, torch.from_numpy(window)[None]) for window in windows]
    return math.exp(float(np.mean(losses)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("healing"), metavar="DIR", help="of `healing.py`")
    add_out(parser)
    args = parser.parse_args()
    with ending("healing_prose"):
        subject = Prose(MODEL, args.directory / MODEL, RESULTS / "real" / MODEL)
        if missing := [name for name in ON_ANSWERS.values() if not (subject.directory / name).is_dir()]:
            raise InputError(f"{subject.directory} lacks {', '.join(missing)}; run benchmarks/healing.py before")
        text, whole, mask = halves(subject.directory), subject.checkpoint, subject.mask(COUNT, None)
        heal(subject, mask, Way("closed form, prose"), subject.directory / "8-closed-form-prose")
        healed = {**ON_ANSWERS, "closed form, prose": "8-closed-form-prose"}
        points = {"full": perplexity(whole, whole.mask, text), "dropped": perplexity(whole, mask, text)}
        for name, where in healed.items():
            points[name] = perplexity(Checkpoint.open(subject.directory / where), mask, text)
        lost = points["dropped"] - points["full"]
        lines = [
            (name, f"{value:.2f}", f"{(points['dropped'] - value) / lost:.0%}" if name in healed else "")
            for name, value in points.items()
        ]
        table = rows(("SmolLM2, 8 of 30", "perplexity, prose", "regained"), lines)
        finish(
            "healing_prose", {"points": points}, args.out, table=f"# Prose, healed on answers and on prose\n\n{table}"
        )


if __name__ == "__main__":
    main()
