"""Dropping, quantizing the weights and an 8-bit KV cache, alone and together: size, capacity, answers and speed.

    apt-get install debian-handbook
    llmdrop apply MODEL quantized/dropped --mask MASK.json; llmdrop quantize MODEL quantized/w8a8 --scheme w8a8 ...
    python benchmarks/quantized.py [--model qwen2.5-coder-1.5b] [--directory quantized] [--repeats 1]

Every directory of checkpoints that is there is measured: `dropped`, `w8a8`, `w4a16`, `dropped-w8a8`, `windows` and the
like. What `llmdrop evaluate` wrote beside one, DIRECTORY/NAME.json, is taken, so that `trained-8` may be the mask alone
where the weights that were trained for it, and judged, are elsewhere.
Answers come through vLLM, so activations are quantized in them; KL is told by Transformers, where only weights are, and
of an 8-bit KV cache it says nothing. 4-bit weights answer as the plain weights that they stand for, which is the same
function: CPUs without AMX have no quick kernel for them. Requests that fit are counted: what the weights leave of the
memory, by the layout of the KV cache. Speeds are taken in turns, beside the full model's. Interrupted, the same command
goes on.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.contenders import running
from benchmarks.options import ending
from benchmarks.real_quality import PRECISION, TASKS, measures, prose
from benchmarks.record import add_out, finish
from benchmarks.table import rows
from llmdrop_vllm import InputError
from llmdrop_vllm.artifacts import read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.dequantizing import dequantized
from llmdrop_vllm.checkpoints.hf_weights import read_tensor
from llmdrop_vllm.cli import main as llmdrop
from llmdrop_vllm.cli.values import names
from llmdrop_vllm.evaluation.inspection import inspect_checkpoint
from llmdrop_vllm.evaluation.records import Evaluation
from llmdrop_vllm.fetching.fetch import fetch

MEMORY_BYTES, CONTEXT = 8 << 30, 8192  # of the requests that are counted
BATCHES, PROMPT_TOKENS, OUTPUT_TOKENS = (1, 16), 64, 32
AT_ONCE = 2  # engines beside the full model's, which takes half as much again as its weights here
FULL, EIGHT_BIT, BUT = "full", "8-bit KV", "but in layers"
PLUS = " + "
WORDS = {"trained": "trained", "healed": "healed", "w8a8": "W8A8", "w4a16": "W4A16"}
PACKED = ("weight_scale", "weight_shape", "weight_zero_point")  # left over beside plain weights


@dataclass(frozen=True)
class Variant:
    """A checkpoint, and whether its keys and values take 8 bits, but in the layers that are `wide`."""

    name: str
    directory: Path
    eight_bit: bool
    wide: tuple[int, ...] = ()

    @property
    def is_emulated(self) -> bool:
        """Whether another checkpoint answers for it."""
        return self.directory.name.endswith("w4a16")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What is in the directory."""
        return Checkpoint.open(self.directory)

    @property
    def label(self) -> str:
        """For people: what was done to the model."""
        mask, name, parts = self.checkpoint.mask, self.directory.name, []
        if mask.attention:
            parts.append(f"{len(mask.attention)} of {mask.num_hidden_layers} dropped")
        if mask.windows:
            parts.append(f"{len(mask.windows)} of {mask.num_hidden_layers} in windows")
        parts += [word for key, word in WORDS.items() if key in name]
        if self.eight_bit:
            parts.append(f"{EIGHT_BIT} {BUT} {' and '.join(map(str, self.wide))}" if self.wide else EIGHT_BIT)
        return ", ".join(parts) or FULL

    @property
    def engine_args(self) -> str:
        """As `llmdrop evaluate` takes them."""
        return json.dumps(self.kv_options)

    @property
    def kv_options(self) -> dict[str, Any]:
        """What the engine is told of its keys and values."""
        skipped: dict[str, Any] = {"kv_cache_dtype_skip_layers": [*map(str, self.wide)]} if self.wide else {}
        if skipped and self.checkpoint.mask.windows:
            skipped["block_size"] = 64  # stretches of 128 are whole blocks, and those of 8 bits twice as large
        return {"kv_cache_dtype": "fp8", **skipped} if self.eight_bit else {}


def variants(model: Path, directory: Path) -> list[Variant]:
    """The full model first; each with an 8-bit KV cache too, in all layers or but in those whose keys are too large."""
    paths = sorted(each for each in directory.iterdir() if (each / "config.json").is_file())
    found = []
    for name, path in ((FULL, model), *((path.name, path) for path in paths)):
        found += [Variant(name, path, False), Variant(f"{name}{PLUS}{EIGHT_BIT}", path, True)]
        sizes = inspect_checkpoint(Checkpoint.open(path), memory_bytes=MEMORY_BYTES, kv_dtype="fp8")
        if wide := (*sizes.coarse_keys,):
            found.append(Variant(f"{name}{PLUS}{EIGHT_BIT} {BUT} {' '.join(map(str, wide))}", path, True, wide))
    return found


def quality(variant: Variant, model: str, text: Path, directory: Path) -> Evaluation:
    """What `llmdrop evaluate` says of it, now or before."""
    out = directory / f"{variant.name.replace(PLUS, '-').replace(' ', '-')}.json"
    if not out.exists():
        with plain(variant.directory) if variant.is_emulated else nullcontext(variant.directory) as checkpoint:
            task = TASKS[model].split(",")[-1]  # the one that says most, of so many variants
            asked = [str(checkpoint), "--text", str(text), *PRECISION, *measures(model, task), "--out", str(out)]
            # Without a mask there is nothing to compare with, but for quantized weights.
            full = [] if variant.directory == fetch(model) else ["--full", model]
            if llmdrop(["evaluate", *asked, *full, "--engine-args", variant.engine_args]):
                raise InputError(f"{variant.name} could not be evaluated")
    return read_record(Evaluation, out)


@contextmanager
def plain(quantized: Path) -> Iterator[Path]:
    """A checkpoint of the weights that the quantized numbers stand for."""
    from safetensors.torch import save_file

    checkpoint = dequantized(Checkpoint.open(quantized))
    with tempfile.TemporaryDirectory(dir=quantized.parent) as name:
        out = Path(name) / "plain"
        shutil.copytree(quantized, out, ignore=shutil.ignore_patterns("*.safetensors*"))
        config = json.loads((out / "config.json").read_text())
        del config["quantization_config"]
        (out / "config.json").write_text(json.dumps(config))
        # By the shard's own name: stock vLLM must not find a masked checkpoint's.
        shard = {each.path.name for each in checkpoint.tensors.values()}.pop()
        stored = {key: each for key, each in checkpoint.tensors.items() if not key.endswith(PACKED)}
        save_file({key: read_tensor(each) for key, each in stored.items()}, out / shard)
        yield out


def speeds(line: list[Variant], repeats: int) -> dict[str, dict[int, tuple[float, float]]]:
    """Output tokens per second by variant and batch, and as a share of the full model's in the same turns: medians."""
    full, others = line[0], line[1:]
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for start in range(0, max(len(others), 1), AT_ONCE):
        group = [full, *others[start : start + AT_ONCE]]
        seconds = in_turns(group, repeats)
        for each, batch in product(group, BATCHES):
            own = seconds[each.name, batch]
            shares = [base / its for base, its in zip(seconds[full.name, batch], own, strict=True)]
            rate = batch * OUTPUT_TOKENS / statistics.median(own)
            found.setdefault(each.name, {})[batch] = rate, statistics.median(shares)
    return found


def in_turns(group: list[Variant], repeats: int) -> dict[tuple[str, int], list[float]]:
    """Seconds by variant and batch, all engines in memory."""
    seconds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
        processes = []
        for each in group:
            process = stack.enter_context(running(each.name, Path(logs), plugin=True, device="cpu"))
            options = {"model": str(each.directory), "dtype": "bfloat16", "max_model_len": 256, "enforce_eager": True}
            options |= {"kv_cache_memory_bytes": 256 << 20, "enable_prefix_caching": False}
            process.load("vllm", options | each.kv_options)
            processes.append(process)
        for turn in range(repeats + 1):  # the first to warm up
            for batch in BATCHES:
                prompts = [[100 + 7 * turn + row + token for token in range(PROMPT_TOKENS)] for row in range(batch)]
                for each, process in zip(group, processes, strict=True):
                    run = process.ask("run", prompts=prompts, tokens=OUTPUT_TOKENS)
                    if turn:
                        seconds.setdefault((each.name, batch), []).append(max(run["last_s"]))
    return seconds


def line_of(variant: Variant, found: Evaluation, speed: dict[int, tuple[float, float]]) -> dict[str, Any]:
    """One variant's figures."""
    kv_dtype = "fp8" if variant.eight_bit else "bfloat16"
    sizes = inspect_checkpoint(
        variant.checkpoint, memory_bytes=MEMORY_BYTES, kv_dtype=kv_dtype, kv_wide=variant.wide, context=CONTEXT
    ).dropped
    divergence, scores = found.quality.divergence, {task.task: task for task in found.quality.tasks}
    return {
        "variant": variant.name,
        "label": variant.label,
        "attention_dropped": len(variant.checkpoint.mask.attention),
        "weight_bytes": sizes.weight_bytes,
        "kv_bytes_per_token": sizes.kv_bytes_per_token,
        "requests": sizes.requests,
        "perplexity": round(found.quality.perplexity.value, 2),
        "kl": None if divergence is None or variant.eight_bit else round(divergence.kl.value, 4),
        "agreement": None if divergence is None or variant.eight_bit else round(divergence.agreement.value, 3),
        "tasks": {name: (round(task.value, 4), task.stderr) for name, task in scores.items()},
        "tokens_per_s": {str(batch): round(value, 2) for batch, (value, _) in speed.items()},
        "of_full": {str(batch): round(share, 3) for batch, (_, share) in speed.items()},
    }


def table(lines: list[dict[str, Any]]) -> str:
    """For people."""
    tasks = sorted({task for each in lines for task in each["tasks"]})
    head = ("", "weights, GB", "KV bytes a token", f"requests of {CONTEXT:,} in {MEMORY_BYTES >> 30} GiB", "perplexity")
    head += ("KL", "same next token", *tasks, *(f"tokens/s, {batch} at once" for batch in BATCHES))
    body = [
        (each["label"], f"{each['weight_bytes'] / 1e9:.2f}", f"{each['kv_bytes_per_token']:,}", each["requests"])
        + (each["perplexity"], "" if each["kl"] is None else each["kl"])
        + ("" if each["agreement"] is None else f"{each['agreement']:.1%}",)
        + tuple(f"{each['tasks'][task][0]:.1%}" if task in each["tasks"] else "" for task in tasks)
        + tuple(
            f"{each['tokens_per_s'][batch]} ({each['of_full'][batch]:.2f}x)" if batch in each["of_full"] else ""
            for batch in map(str, BATCHES)
        )
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
        if args.repeats and line[0].name != FULL:
            raise InputError(f"speeds are compared with the full model's: name {FULL} first, or give --repeats 0")
        found = [quality(each, args.model, text, args.directory) for each in line]
        speed = speeds(line, args.repeats) if args.repeats else {each.name: {} for each in line}
        lines = [line_of(each, its, speed[each.name]) for each, its in zip(line, found, strict=True)]
        result = {"model": args.model, "memory_bytes": MEMORY_BYTES, "context": CONTEXT, "variants": lines}
        finish("quantized", result, args.out, table=table(lines))


if __name__ == "__main__":
    main()
