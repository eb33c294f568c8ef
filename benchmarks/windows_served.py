"""What windows give in the engine at long contexts, beside dropping and an 8-bit KV cache, in one KV memory.

    apt-get install debian-handbook
    llmdrop windows MODEL --window 1024 --count 15 --out windows/MODEL/mask.json
    python benchmarks/windows_served.py [--models smollm2] [--context 8000]

Requests of a real model that fit, tokens per second, perplexity of what windows do not see in full, and whether numbers
said in the text are found at its end, all as served. Contenders answer the same prompts in turns, each in a process of
its own.
"""

import argparse
import math
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import Process, running
from benchmarks.options import ending, models
from benchmarks.record import RESULTS, add_out, finish
from benchmarks.table import rows
from benchmarks.windows_subject import FITTED, MEASURED_SAYING, Subject
from llmdrop_vllm import DropMask
from llmdrop_vllm.artifacts import read_record
from llmdrop_vllm.cli.values import count
from llmdrop_vllm.mask_file import MaskFile

FULL, WINDOWS, DROPPED, EIGHT_BIT, BOTH = "full", "windows", "dropped", "8-bit KV cache", "windows, 8-bit KV cache"
KV_BYTES = 1 << 30
STEP_TOKENS = 512  # of prompts that are computed together, which windows keep as well
OUTPUT_TOKENS = 64
DEPTHS = (0.1, 0.5, 0.8)  # of the numbers in the prompts
SEEN_BY_ALL = 1280  # tokens of a prompt that see everything under windows of 1,024
EIGHT_BITS = {"kv_cache_dtype": "fp8"}


@dataclass(frozen=True)
class Contender:
    """A mask, and options of the engine."""

    name: str
    mask: DropMask
    options: dict[str, str]

    def load(self, process: Process, model: Path, context: int) -> None:
        """The model under the mask, told as `vllm serve` would be."""
        process.load(
            "vllm",
            {
                "model": str(model),
                "dtype": "bfloat16",
                "max_model_len": context + OUTPUT_TOKENS + 8,
                "max_num_batched_tokens": STEP_TOKENS,
                "enable_prefix_caching": False,
                "kv_cache_memory_bytes": KV_BYTES,
                "enforce_eager": True,
                "hf_overrides": self.mask.to_config("runtime"),
                **self.options,
            },
        )


def contenders(windows: DropMask, dropped: DropMask | None) -> list[Contender]:
    """The full model first."""
    full, depth = DropMask(windows.num_hidden_layers), windows.num_hidden_layers
    line = [Contender(FULL, full, {}), Contender(f"{WINDOWS} in {len(windows.windows)} of {depth}", windows, {})]
    if dropped is not None:
        line.append(Contender(f"{DROPPED} in {len(dropped.attention)} of {depth}", dropped, {}))
    return [*line, Contender(EIGHT_BIT, full, EIGHT_BITS), Contender(BOTH, windows, EIGHT_BITS)]


def measure(subject: Subject, line: list[Contender], context: int, requests: int, repeats: int) -> list[dict[str, Any]]:
    """In turns; ratios are of neighbours in time."""
    hay = [token for ids in subject.documents[FITTED:] for token in ids[0].tolist()]
    needles = subject.needles(context, MEASURED_SAYING, hay, DEPTHS)
    prompts = [row[: -needles.answer_tokens] for row in needles.ids.tolist()]
    answers = needles.answers.tolist()
    found = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        processes = []
        for each in line:
            process = stack.enter_context(running(each.name, Path(name), plugin=True, device="cpu"))
            each.load(process, subject.checkpoint.directory, context)
            processes.append(process)
        told = [
            [process.ask("answer", prompt=prompt, tokens=needles.answer_tokens) for prompt in prompts]
            for process in processes
        ]
        runs: list[list[dict[str, Any]]] = [[] for _ in line]
        for _ in range(repeats):
            for process, its in zip(processes, runs, strict=True):
                its.append(process.ask("run", prompts=(prompts * requests)[:requests], tokens=OUTPUT_TOKENS))
        for each, process, said, its in zip(line, processes, told, runs, strict=True):
            seconds = [max(run["last_s"]) for run in its]
            lost = [-value for each_told in said for value in each_told["prompt_logprobs"][SEEN_BY_ALL:]]
            ratios = [base / own for base, own in zip((max(run["last_s"]) for run in runs[0]), seconds, strict=True)]
            found.append(
                {
                    "model": subject.name,
                    "contender": each.name,
                    "attention": sorted(each.mask.attention),
                    "windows": each.mask.windows,
                    "fits": process.kv_sequences,
                    "kv_tokens": process.kv_tokens,
                    "running": max((run["running"] for run in its), default=None),
                    "preemptions": max((run["preemptions"] for run in its), default=None),
                    "seconds": [round(value, 1) for value in seconds],
                    "requests_per_s": round(requests / statistics.median(seconds), 4) if its else None,
                    "speedup": [round(value, 3) for value in ratios],
                    "perplexity": round(math.exp(statistics.fmean(lost)), 3),
                    "needles": sum(a["tokens"] == b for a, b in zip(said, answers, strict=True)) / len(answers),
                }
            )
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """For people."""
    head = (
        "model",
        "contender",
        "requests that fit",
        "running",
        "requests/s",
        "speedup",
        "perplexity",
        "numbers found",
    )
    found = [
        (
            *(each["model"], each["contender"], each["fits"], each["running"] or "", each["requests_per_s"] or ""),
            f"{statistics.median(each['speedup']):.2f}" if each["speedup"] else "",
            each["perplexity"],
            f"{each['needles']:.0%}",
        )
        for each in lines
    ]
    return f"# Windows as they are served\n\n{rows(head, found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2", metavar="A,B")
    parser.add_argument("--directory", type=Path, default=Path("windows"), metavar="DIR", help="with a mask by model")
    parser.add_argument("--dropped", type=Path, metavar="FILE", help="the mask that drops, to compare")
    parser.add_argument("--context", type=count, default=8000, metavar="N", help="tokens of each prompt")
    parser.add_argument("--requests", type=count, default=10, metavar="N", help="at once")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="turns; 0 for what fits and what it costs")
    add_out(parser)
    args = parser.parse_args()
    with ending("windows_served"):
        lines: list[dict[str, Any]] = []
        for name in models(args.models, {"smollm2": None, "qwen2.5-coder-1.5b": None}):
            subject = Subject(name, args.directory / name)
            windows = read_record(MaskFile, subject.directory / "mask.json").mask
            dropped = None if args.dropped is None else read_record(MaskFile, args.dropped).mask
            line = contenders(windows, dropped)
            lines += measure(subject, line, args.context, args.requests, args.repeats)
        result = {"context": args.context, "kv_bytes": KV_BYTES, "step_tokens": STEP_TOKENS, "points": lines}
        finish("windows_served", result, args.out or RESULTS / "windows_served.json", table=table(lines))


if __name__ == "__main__":
    main()
