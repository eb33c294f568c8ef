"""What dropping costs real models that can speak: attention, MLPs and blocks by importance, from nothing to half.

    apt-get install debian-handbook
    python benchmarks/real_quality.py [--models smollm2,qwen2.5-coder-1.5b] [--counts 2,4,8]

Each model gets a sweep (`llmdrop sweep`): perplexity on prose, next tokens on its own answers, reasoning problems, and
of the coder every fourth HumanEval problem. Beside it stand perplexity on code, and for attention a multiple choice (to
which of four docstrings a function belongs). No text is calibrated on. Interrupted, the same command goes on. Results
are in benchmarks/results/real/MODEL, the table in real_quality.md.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import rich

from benchmarks.options import ending, models
from benchmarks.record import RESULTS, add_out, finish
from benchmarks.table import rows
from llmdrop_vllm import InputError, hf
from llmdrop_vllm.artifacts import read_record, write_atomically
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main as llmdrop
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.evaluation.records import Point, Sweep, mask_id
from llmdrop_vllm.evaluation.sweep import SCORES_FILE, SWEEP_FILE
from llmdrop_vllm.fetching.fetch import fetch

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
CODE_WINDOWS, CONTEXT = 8, 512
TASKS = {"smollm2": "llmdrop_reasoning", "qwen2.5-coder-1.5b": "llmdrop_reasoning,llmdrop_humaneval"}
# Every fourth HumanEval problem, and all of the reasoning problems.
LIMIT = 41
CHOICE = "llmdrop_docstring"
# How exactly: windows of text, and what is computed in.
PRECISION = ("--windows", "16", "--dtype", "bfloat16")


class Text(HTMLParser):
    """What a page says, without commands and their output."""

    LEFT_OUT = frozenset({"head", "script", "style", "pre"})

    def __init__(self) -> None:
        super().__init__()
        self.left_out = 0
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.left_out += tag in self.LEFT_OUT

    def handle_endtag(self, tag: str) -> None:
        self.left_out -= tag in self.LEFT_OUT

    def handle_data(self, data: str) -> None:
        if not self.left_out:
            self.found.append(data)


def prose(out: Path) -> Path:
    """A handbook's paragraphs as a text file. Raises InputError where it is not installed."""
    pages = sorted(HANDBOOK.glob("*.html"))
    if not pages:
        raise InputError(f"{HANDBOOK} holds no pages; apt-get install debian-handbook")
    found = []
    for page in pages:
        parser = Text()
        parser.feed(page.read_text(encoding="utf-8"))
        found.append(" ".join("".join(parser.found).split()))
    write_atomically(out, "\n".join(found))
    return out


def code(out: Path) -> Path:
    """The sources of a package that is always here, as a text file."""
    sources = sorted(Path(rich.__file__).parent.glob("*.py"))
    write_atomically(out, "\n".join(path.read_text(encoding="utf-8") for path in sources))
    return out


def code_perplexities(model: Path, found: Sweep, text: Path, kept: Path) -> dict[str, float]:
    """By mask id, through one model in memory; what the file has is not computed again."""
    import torch

    done: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    missing = {name: point for name, point in found.points.items() if name not in done}
    if missing:
        checkpoint = Checkpoint.open(model)
        windows = load_calibration(checkpoint, str(text), samples=CODE_WINDOWS, seq_len=CONTEXT).sequences
        full = hf.load(checkpoint.under(checkpoint.mask), dtype=torch.bfloat16).eval()
        for name, point in missing.items():
            with hf.dropped(full, checkpoint.family, point.quality.mask), torch.inference_mode():
                losses = [loss(full, torch.from_numpy(window)[None]) for window in windows]
            done[name] = math.exp(float(np.mean(losses)))
            write_atomically(kept, json.dumps(done, indent=2) + "\n")
    return done


def loss(model: Any, token_ids: Any) -> float:
    """Mean negative log-likelihood of a window's tokens after the first, in nats; [1, tokens]."""
    logits = model(token_ids, use_cache=False).logits[0, :-1].float()
    return float(-logits.log_softmax(-1).gather(1, token_ids[0, 1:, None]).mean())


def sweep(name: str, directory: Path, text: Path, series: str, counts: str, *options: str) -> Sweep:
    """A sweep without speeds, in a directory of its own."""
    asked = ["--series", series, "--counts", counts, "--results", str(directory), "--text", str(text), *options]
    asked += [*PRECISION, "--no-speed", "--samples", "32", "--seq-len", str(CONTEXT)]
    if llmdrop(["sweep", name, *asked]):
        raise InputError(f"the sweep of {name} did not come to its end")
    return read_record(Sweep, directory / SWEEP_FILE)


def measures(name: str, tasks: str | None = None) -> tuple[str, ...]:
    """What is asked of each mask of a model, beside perplexity; `tasks` in place of all of the model's."""
    return (
        "--tasks",
        tasks or TASKS[name],
        "--limit",
        str(LIMIT),
        "--run-generated-code",
        "--divergence-tokens",
        "2000",
    )


def measure(name: str, counts: str, directory: Path) -> Iterator[dict[str, Any]]:
    """A line for each point of a model's sweep, and how long all of them took, in however many runs."""
    model, directory = fetch(name), Path(os.path.relpath(directory)) / name
    directory.mkdir(parents=True, exist_ok=True)
    texts = [make(directory / f"{make.__name__}.txt") for make in (prose, code)]
    counts += f",{Checkpoint.open(model).mask.num_hidden_layers // 2}"
    begin, before = time.monotonic(), points_in(directory) + points_in(directory / "choice")
    found = sweep(name, directory, texts[0], "attention,mlp,blocks", counts, *measures(name))
    of_choice = ("--tasks", CHOICE, "--divergence-tokens", "0", "--scores", str(directory / SCORES_FILE))
    choices = sweep(name, directory / "choice", texts[0], "attention", counts, *of_choice)
    on_code = code_perplexities(model, found, texts[1], directory / "code.json")
    spent = directory / "seconds.json"
    seconds = json.loads(spent.read_text())["seconds"] if spent.exists() else 0
    if points_in(directory) + points_in(directory / "choice") > before:
        seconds += round(time.monotonic() - begin)
        write_atomically(spent, json.dumps({"seconds": seconds}) + "\n")
    llmdrop(["report", name, "--results", str(directory)])
    for text in texts:
        text.unlink()
    for series in found.series:
        for n, point in found.of(series):
            if n or series is found.series[0]:
                mask = mask_id(point.quality.mask)
                yield line(name, series.name, n, point, on_code[mask], choices.points.get(mask))
    yield {"model": name, "seconds": seconds, "points": len(found.points)}


def points_in(directory: Path) -> int:
    """How many points a sweep has so far."""
    path = directory / SWEEP_FILE
    return len(read_record(Sweep, path).points) if path.exists() else 0


def line(name: str, what: str, n: int, point: Point, on_code: float, choice: Point | None) -> dict[str, Any]:
    """One point's figures."""
    quality, scores = point.quality, {task.task: task.value for task in point.quality.tasks}
    divergence = quality.divergence
    return {
        "model": name,
        "dropped": what if n else "nothing",
        "n": n,
        "prose_perplexity": round(quality.perplexity.value, 2),
        "code_perplexity": round(on_code, 2),
        "agreement": None if divergence is None else round(divergence.agreement.value, 3),
        "kl": None if divergence is None else round(divergence.kl.value, 4),
        "reasoning": scores.get("llmdrop_reasoning"),
        "humaneval": scores.get("llmdrop_humaneval"),
        "multiple_choice": None if choice is None else choice.quality.tasks[0].value,
        "kv_share": round(point.kv_share, 3),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """For people."""
    head = ("model", "dropped", "n", "perplexity, prose", "code", "same next token, own answers", "KL", "reasoning")
    head += ("HumanEval", "multiple choice")

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    body = [
        (each["model"], each["dropped"], each["n"], each["prose_perplexity"], each["code_perplexity"])
        + (percent(each["agreement"]), each["kl"], percent(each["reasoning"]), percent(each["humaneval"]))
        + (percent(each["multiple_choice"]),)
        for each in lines
    ]
    return f"# Quality against the number dropped, by importance\n\n{rows(head, body)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(TASKS), metavar="A,B")
    parser.add_argument("--counts", default="2,4,8", metavar="N,N", help="and half of the layers")
    parser.add_argument("--directory", type=Path, default=RESULTS / "real", metavar="DIR")
    add_out(parser)
    args = parser.parse_args()
    with ending("real_quality"):
        lines = [each for name in models(args.models, TASKS) for each in measure(name, args.counts, args.directory)]
        runs = [each for each in lines if "seconds" in each]
        points = [each for each in lines if "seconds" not in each]
        finish("real_quality", {"runs": runs, "points": points}, args.out, table=table(points))


if __name__ == "__main__":
    main()
