"""Dropping, quantizing the weights and an 8-bit KV cache, alone and together: size, capacity, answers and speed.

    apt-get install debian-handbook
    llmdrop apply MODEL quantized/dropped --mask MASK.json; llmdrop quantize MODEL quantized/w8a8 --scheme w8a8 ...
    python benchmarks/quantized.py [--model qwen2.5-coder-1.5b] [--directory quantized] [--repeats 1]

Every directory of checkpoints that is there is measured: `dropped`, `w8a8`, `w4a16`, `dropped-w8a8` and the like.
Answers come through vLLM, so activations are quantized in them; KL is told by Transformers, where only weights are, and
of an 8-bit KV cache it says nothing. Requests that fit are counted: what the weights leave of the memory, by the layout
of the KV cache. Speeds are taken in turns. Interrupted, the same command goes on.
"""

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import running
from benchmarks.options import ending
from benchmarks.real_quality import PRECISION, measures, prose
from benchmarks.record import add_out, finish
from benchmarks.table import rows
from llmdrop_vllm import InputError
from llmdrop_vllm.artifacts import read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main as llmdrop
from llmdrop_vllm.cli.values import names
from llmdrop_vllm.evaluation.inspection import inspect_checkpoint
from llmdrop_vllm.evaluation.records import Evaluation
from llmdrop_vllm.fetching.fetch import fetch

MEMORY_BYTES, CONTEXT = 8 << 30, 4096  # of the requests that are counted
BATCHES, PROMPT_TOKENS, OUTPUT_TOKENS = (1, 16), 64, 32
FULL, EIGHT_BIT = "full", "8-bit KV"
PLUS = " + "


@dataclass(frozen=True)
class Variant:
    """A checkpoint, and whether its keys and values take 8 bits."""

    name: str
    directory: Path
    eight_bit: bool

    @property
    def engine_args(self) -> str:
        """As `llmdrop evaluate` takes them."""
        return '{"kv_cache_dtype": "fp8"}' if self.eight_bit else "{}"


def variants(model: Path, directory: Path) -> list[Variant]:
    """The full model first; an 8-bit KV cache beside it, what is dropped and what is smallest."""
    found = [Variant(FULL, model, False), Variant(f"{FULL}{PLUS}{EIGHT_BIT}", model, True)]
    for path in sorted(each for each in directory.iterdir() if (each / "config.json").is_file()):
        found.append(Variant(path.name, path, False))
        if path.name in ("dropped", "dropped-w4a16"):
            found.append(Variant(f"{path.name}{PLUS}{EIGHT_BIT}", path, True))
    return found


def quality(variant: Variant, model: str, text: Path, directory: Path) -> Evaluation:
    """What `llmdrop evaluate` says of it, now or before."""
    out = directory / f"{variant.name.replace(PLUS, '-').replace(' ', '-')}.json"
    if not out.exists():
        asked = [str(variant.directory), "--text", str(text), *PRECISION, *measures(model), "--out", str(out)]
        # Without a mask there is nothing to compare with, but for quantized weights.
        full = [] if variant.directory == fetch(model) else ["--full", model]
        if llmdrop(["evaluate", *asked, *full, "--engine-args", variant.engine_args]):
            raise InputError(f"{variant.name} could not be evaluated")
    return read_record(Evaluation, out)


def speeds(line: list[Variant], repeats: int) -> dict[str, dict[int, float]]:
    """Output tokens per second by variant and batch: the median over turns, all engines in memory."""
    seconds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
        processes = []
        for each in line:
            process = stack.enter_context(running(each.name, Path(logs), plugin=True, device="cpu"))
            options = {"model": str(each.directory), "dtype": "bfloat16", "max_model_len": 256, "enforce_eager": True}
            options |= {"kv_cache_memory_bytes": 256 << 20, "enable_prefix_caching": False}
            process.load("vllm", options | ({"kv_cache_dtype": "fp8"} if each.eight_bit else {}))
            processes.append(process)
        for turn in range(repeats + 1):  # the first to warm up
            for batch in BATCHES:
                prompts = [[100 + 7 * turn + row + token for token in range(PROMPT_TOKENS)] for row in range(batch)]
                for each, process in zip(line, processes, strict=True):
                    run = process.ask("run", prompts=prompts, tokens=OUTPUT_TOKENS)
                    if turn:
                        seconds.setdefault((each.name, batch), []).append(max(run["last_s"]))
    return {
        each.name: {batch: batch * OUTPUT_TOKENS / statistics.median(seconds[each.name, batch]) for batch in BATCHES}
        for each in line
    }


def line_of(variant: Variant, found: Evaluation, speed: dict[int, float]) -> dict[str, Any]:
    """One variant's figures."""
    checkpoint = Checkpoint.open(variant.directory)
    kv_dtype = "fp8" if variant.eight_bit else "bfloat16"
    sizes = inspect_checkpoint(checkpoint, memory_bytes=MEMORY_BYTES, kv_dtype=kv_dtype, context=CONTEXT).dropped
    divergence, scores = found.quality.divergence, {task.task: task for task in found.quality.tasks}
    return {
        "variant": variant.name,
        "attention_dropped": len(checkpoint.mask.attention),
        "weight_bytes": sizes.weight_bytes,
        "kv_bytes_per_token": sizes.kv_bytes_per_token,
        "requests": sizes.requests,
        "perplexity": round(found.quality.perplexity.value, 2),
        "kl": None if divergence is None or variant.eight_bit else round(divergence.kl.value, 4),
        "agreement": None if divergence is None or variant.eight_bit else round(divergence.agreement.value, 3),
        "tasks": {name: (round(task.value, 4), task.stderr) for name, task in scores.items()},
        "tokens_per_s": {str(batch): round(value, 2) for batch, value in speed.items()},
    }


def table(lines: list[dict[str, Any]]) -> str:
    """For people."""
    tasks = sorted({task for each in lines for task in each["tasks"]})
    head = ("", "weights, GB", "KV bytes a token", f"requests of {CONTEXT:,} in {MEMORY_BYTES >> 30} GiB", "perplexity")
    head += ("KL", "same next token", *tasks, *(f"tokens/s, {batch} at once" for batch in BATCHES))
    body = [
        (each["variant"], f"{each['weight_bytes'] / 1e9:.2f}", f"{each['kv_bytes_per_token']:,}", each["requests"])
        + (each["perplexity"], "" if each["kl"] is None else each["kl"])
        + ("" if each["agreement"] is None else f"{each['agreement']:.1%}",)
        + tuple(f"{each['tasks'][task][0]:.1%}" if task in each["tasks"] else "" for task in tasks)
        + tuple(each["tokens_per_s"].get(str(batch), "") for batch in BATCHES)
        for each in lines
    ]
    return f"# Dropping, quantized weights and an 8-bit KV cache\n\n{rows(head, body)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b", metavar="NAME")
    parser.add_argument("--directory", type=Path, default=Path("quantized"), metavar="DIR", help="with checkpoints")
    what = "by their names in the table, in this order; default all"
    parser.add_argument("--variants", type=names, default=(), metavar="A,B", help=what)
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="turns of speed; 0 for none")
    add_out(parser)
    args = parser.parse_args()
    with ending("quantized"):
        text = prose(args.directory / "prose.txt")
        there = {each.name: each for each in variants(fetch(args.model), args.directory)}
        if unknown := {*args.variants} - {*there}:
            raise InputError(f"no {', '.join(sorted(unknown))}; there are {', '.join(there)}")
        line = [there[name] for name in args.variants or there]
        found = [quality(each, args.model, text, args.directory) for each in line]
        speed = speeds(line, args.repeats) if args.repeats else {each.name: {} for each in line}
        lines = [line_of(each, its, speed[each.name]) for each, its in zip(line, found, strict=True)]
        result = {"model": args.model, "memory_bytes": MEMORY_BYTES, "context": CONTEXT, "variants": lines}
        finish("quantized", result, args.out, table=table(lines))


if __name__ == "__main__":
    main()
