"""KV tokens and concurrent sequences, predicted and measured, for published masks; and what more of them buys.

    python benchmarks/kv_capacity.py
    python benchmarks/kv_capacity.py --smoke

Tokens and sequences are those of real engines whose models keep depth, KV heads, head size and mask, and are narrow
otherwise: the KV cache does not depend on the rest. The gain, and pipeline stages with as much memory on each rank, are
planned by vLLM's own functions for the engine's layers, which allocate nothing and can have the memory of a real GPU.
Throughput: a KV cache too small for all requests of stock vLLM, and the same bytes with half of attention dropped.
Writes results/kv_capacity.json and .md; --smoke writes results/kv_capacity-smoke.json and .md.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.contenders import Process, Settings, running
from benchmarks.kv_short import COLUMNS, row, throughput_when_short
from benchmarks.options import ending, positive
from benchmarks.record import add_out, finish
from benchmarks.shapes import Kind, Shape, find
from benchmarks.table import rows
from llmdrop_vllm import DropMask
from llmdrop_vllm.cli.values import count
from llmdrop_vllm.kv_cache.kinds import dtype_bytes, layer_kinds
from llmdrop_vllm.kv_cache.layout import stage_values
from llmdrop_vllm.serving.pipeline import LayerCost, partition, stage_attention

DTYPE, MAX_MODEL_LEN = "bfloat16", 1024
# So much that a block more or less does not show in the gain.
GPU_BYTES = 64 << 30
NARROW = {"intermediate_size": 128, "vocab_size": 256}
Case = tuple[Shape, str, DropMask]


def case(name: str, kind: Kind, count: int) -> Case:
    """A published mask, or one that goes from the last layer but one upwards."""
    return find(name), f"{kind} {count}", find(name).mask(kind, count)


CASES: tuple[Case, ...] = (
    case("cpu-small", "attention", 4),
    case("mistral-7b", "attention", 4),
    case("mistral-7b", "attention", 8),
    case("mistral-7b", "block", 8),
    case("llama-2-13b", "attention", 4),
    case("llama-2-13b", "attention", 8),
    case("llama-2-13b", "block", 8),
    case("llama-2-70b", "attention", 40),
    # Nemotron-Super-49B's mask on the model that it was cut from.
    case("llama-3-70b", "attention", 31),
    # Sliding and full attention in turn: vLLM pads what does not come out even.
    case("gemma-2-9b", "attention", 8),
    (find("gemma-2-9b"), "8 sliding", DropMask(42, tuple(range(24, 40, 2)))),
)
STAGES = (2, 4)


@dataclass(frozen=True)
class Capacity:
    """What an engine's KV cache holds; `padding_layers` are stored for nobody."""

    shape: str
    mask: str
    attention_layers: int
    padding_layers: int
    predicted_tokens: int
    measured_tokens: int
    predicted_sequences: int
    measured_sequences: int
    gain_predicted: float
    gain_measured: float


@dataclass(frozen=True)
class StagedCapacity:
    """The same for pipeline stages: layers and attention sublayers per stage; 0 tokens where vLLM cannot run."""

    shape: str
    mask: str
    split: str
    layers: tuple[int, ...]
    attention: tuple[int, ...]
    predicted_tokens: int
    measured_tokens: int


def capacities(cases: Sequence[Case], stages: Sequence[int], memory_bytes: int) -> Iterator[Capacity | StagedCapacity]:
    """Measured in one process, one engine after the other; the full model of a shape first."""
    with tempfile.TemporaryDirectory() as name, running("kv", Path(name), plugin=True, device="cpu") as process:
        full: dict[str, int] = {}
        for shape, label, mask in cases:
            new = {} if shape.name in full else {"full": DropMask(shape.num_layers)}
            for each_label, each in (new | {label: mask}).items():
                load(process, Path(name), shape, each, memory_bytes)
                (planned,) = process.ask("stages_kv_tokens", splits=[[shape.num_layers]], memory_bytes=GPU_BYTES)
                gain = planned / full.setdefault(shape.name, planned)
                yield capacity(shape, each_label, each, process, memory_bytes, gain)
            if len(set(layer_kinds(shape.config))) == 1:
                yield from staged(shape, label, mask, process, stages, memory_bytes)


def load(process: Process, directory: Path, shape: Shape, mask: DropMask, memory_bytes: int) -> None:
    """A narrow model with the shape's KV cache; its weights are made in memory and never used."""
    heads = shape.config["num_key_value_heads"]
    config = {**shape.config, **NARROW, "num_attention_heads": heads, "hidden_size": 16 * heads, "dtype": DTYPE}
    (directory / "config.json").write_text(json.dumps(config | (mask.to_config() if mask else {})))
    settings = Settings(DTYPE, "cpu", memory_bytes, max_step_tokens=MAX_MODEL_LEN, compiled=False)
    process.load("vllm", settings.options("vllm", directory) | {"max_model_len": MAX_MODEL_LEN, "load_format": "dummy"})


def whole_blocks(block_values: int, memory_bytes: int, block_tokens: int) -> int:
    """Blocks that fit, with so many numbers for each of their tokens."""
    return memory_bytes // (block_values * dtype_bytes(DTYPE) * block_tokens)


def predict(shape: Shape, mask: DropMask, memory_bytes: int, block_tokens: int) -> tuple[int, int]:
    """(tokens, sequences) of the longest kind that fit, as vLLM counts them."""
    layout = shape.layout(mask)
    blocks = whole_blocks(layout.block_values, memory_bytes, block_tokens)
    blocks_per_sequence = layout.request_blocks(MAX_MODEL_LEN, block_tokens, MAX_MODEL_LEN)
    return int(blocks / blocks_per_sequence * MAX_MODEL_LEN), blocks // blocks_per_sequence


def capacity(shape: Shape, label: str, mask: DropMask, process: Process, memory_bytes: int, gain: float) -> Capacity:
    """The loaded engine's, beside what config and mask say; `gain` is over the full model."""
    layout = shape.layout(mask)
    of_gpu, of_full = (
        predict(shape, each, GPU_BYTES, process.block_tokens)[0] for each in (mask, DropMask(shape.num_layers))
    )
    tokens, sequences = predict(shape, mask, memory_bytes, process.block_tokens)
    return Capacity(
        shape=shape.name,
        mask=label,
        attention_layers=layout.layers,
        padding_layers=round(layout.padding_share * layout.layers),
        predicted_tokens=tokens,
        measured_tokens=int(process.kv_tokens),
        predicted_sequences=sequences,
        measured_sequences=process.kv_sequences,
        gain_predicted=of_gpu / of_full,
        gain_measured=gain,
    )


def staged(
    shape: Shape, label: str, mask: DropMask, process: Process, stages: Sequence[int], memory_bytes: int
) -> Iterator[StagedCapacity]:
    """Equal stages, and those that the plugin chooses where the KV cache has memory of its own."""
    for ranks in stages:
        if shape.num_layers % ranks:
            continue
        for split, layers in {
            "equal": [shape.num_layers // ranks] * ranks,
            "by remaining attention": partition(mask, ranks, LayerCost(1, 2)),
        }.items():
            attention = stage_attention(mask, layers)
            (measured,) = process.ask("stages_kv_tokens", splits=[layers], memory_bytes=memory_bytes)
            values = stage_values(shape.layout(mask), mask.kept_attention, shape.num_layers)
            bounds = [*accumulate(layers, initial=0)]
            predicted = min(
                whole_blocks(stored, memory_bytes, process.block_tokens) * process.block_tokens if stored else 0
                for stored in map(values, bounds, bounds[1:])
            )
            yield StagedCapacity(shape.name, label, split, tuple(layers), tuple(attention), predicted, measured)


def markdown(found: Sequence[Capacity | StagedCapacity], short: Mapping[str, Any], memory_bytes: int) -> str:
    """Three tables."""
    parts = [
        f"# Tokens and sequences of {MAX_MODEL_LEN} tokens in {memory_bytes / 2**30:g} GiB of KV cache, {DTYPE}\n",
        rows(
            ("model", "dropped", "attention layers", "padding", "tokens, predicted", "measured")
            + ("sequences", "gain, predicted", "measured"),
            (
                (each.shape, each.mask, each.attention_layers, each.padding_layers)
                + (f"{each.predicted_tokens:,}", f"{each.measured_tokens:,}")
                + (f"{each.predicted_sequences}, {each.measured_sequences}",)
                + (f"{each.gain_predicted:.3f}x", f"{each.gain_measured:.3f}x")
                for each in found
                if isinstance(each, Capacity)
            ),
        ),
        "# Pipeline stages, as much memory on each\n",
        rows(
            ("model", "dropped", "split", "layers", "attention", "tokens, predicted", "measured"),
            (
                (each.shape, each.mask, each.split, str(each.layers)[1:-1], str(each.attention)[1:-1])
                + (
                    f"{each.predicted_tokens:,}",
                    f"{each.measured_tokens:,}" if each.measured_tokens else "does not run",
                )
                for each in found
                if isinstance(each, StagedCapacity)
            ),
        ),
        "# Throughput with KV memory short\n",
        rows(COLUMNS, map(row, short["lines"])),
    ]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-gib", type=positive, default=1, help="KV cache of each engine, or of each pipeline stage")
    parser.add_argument("--repeats", type=count, default=5, help="of the throughput measurement")
    parser.add_argument("--smoke", action="store_true", help="seconds, to see that everything works")
    add_out(parser)
    args = parser.parse_args(arguments)
    cases, stages, memory_bytes = CASES, STAGES, int(args.kv_gib * 2**30)
    if args.smoke:
        cases, stages, memory_bytes = CASES[:1], STAGES[:1], 1 << 27
    with ending("kv_capacity"):
        found = []
        for each in capacities(cases, stages, memory_bytes):
            print(*asdict(each).values(), flush=True)
            found.append(each)
        short = throughput_when_short(repeats=args.repeats, smoke=args.smoke)
    result = {
        "benchmark": "kv_capacity",
        "all_exact": all(each.predicted_tokens == each.measured_tokens for each in found),
        "capacity": [asdict(each) for each in found],
        "kv_bytes": memory_bytes,
        "when_short": short,
    }
    name = "kv_capacity-smoke" if args.smoke else "kv_capacity"
    finish(name, result, args.out, table=markdown(found, short, memory_bytes))


if __name__ == "__main__":
    main()
