"""Checkpoint surgery against `cp` of the same bytes: time and memory, on a generated checkpoint of Llama-2-7B's shapes.

    python benchmarks/surgery.py [--layers 8] [--rounds 5] [--directory /tmp]

Contenders take turns: `cp -r` of the new checkpoint, surgery that writes it, and surgery that does not look for NaN.
Each is timed until it returns (the bytes are in the page cache) and until a sync after it has returned (they are on the
disk). The source is in the page cache for all of them if it fits there. Planning, which asks Transformers for every
tensor's shape, is timed by itself: it takes as long for any size.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.memory import kernel_bytes
from benchmarks.options import ending
from benchmarks.record import add_out, finish
from benchmarks.shapes import find
from benchmarks.weights import write_random_apart
from llmdrop_vllm import DropMask
from llmdrop_vllm.cli.values import count
from llmdrop_vllm.writing import stream
from llmdrop_vllm.writing.plan import SurgeryPlan, plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint


def measure(plan: SurgeryPlan, directory: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds until each contender returns and until the sync after it does, by name; one more round comes first."""
    reference, out = directory / "reference", directory / "out"
    write_checkpoint(plan, reference)
    contenders: dict[str, Callable[[], object]] = {
        "cp": lambda: subprocess.run(["cp", "-r", str(reference), str(out)], check=True),
        "surgery": lambda: write_checkpoint(plan, out),
        "surgery_without_nan_check": lambda: without_nan_check(plan, out),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            os.sync()
            start = time.perf_counter()
            run()
            returned_s = time.perf_counter() - start
            os.sync()
            synced_s = time.perf_counter() - start
            shutil.rmtree(out)
            if number:  # the first is to warm up
                times[name].append((returned_s, synced_s))
    return times


def without_nan_check(plan: SurgeryPlan, out: Path) -> None:
    """What the check costs is the difference."""
    check, stream.holds_nan = stream.holds_nan, lambda *_: False
    try:
        write_checkpoint(plan, out)
    finally:
        stream.holds_nan = check


def peak_memory_bytes(plan: SurgeryPlan, out: Path) -> tuple[int, int]:
    """(what the process has at most while it writes, of that what it did not have before), resident in memory."""
    before = kernel_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begin to look for the peak anew
    write_checkpoint(plan, out)
    peak = kernel_bytes("VmHWM")
    return peak, peak - before


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=count, default=8, help="0.4 GB each, and 0.5 GB outside of them; 32 is 13 GB")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--directory", type=Path, help="where to generate; twice the size is needed, and removed again")
    add_out(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with ending("surgery"), tempfile.TemporaryDirectory(dir=args.directory) as temporary:
        directory = Path(temporary)
        model = write_random_apart(directory / "model", find("llama-2-7b", args.layers), "bfloat16")
        deep = tuple(range(args.layers - 1, args.layers // 2, -1))
        start = time.perf_counter()
        plan = plan_surgery(model, DropMask(args.layers, attention=deep, mlp=deep[:1]))
        plan_s = time.perf_counter() - start
        largest = max(tensor.num_bytes for shard in plan.shards for tensor in shard.tensors)
        print(
            f"{plan.weight_bytes / 1e9:.2f} GB to write, {3 * (args.rounds + 1) + 2} times; expected: at most 1.3 "
            f"times as long as cp, at most {2 * largest:,} bytes of memory more than before",
            flush=True,
        )
        peak, growth = peak_memory_bytes(plan, directory / "memory")
        shutil.rmtree(directory / "memory")
        times = measure(plan, directory, args.rounds)
    medians = {
        name: {
            "returned_s": round(statistics.median(returned for returned, _ in runs), 3),
            "synced_s": round(statistics.median(synced for _, synced in runs), 3),
        }
        for name, runs in times.items()
    }
    result = {
        "weight_bytes": plan.weight_bytes,
        "largest_tensor_bytes": largest,
        "plan_s": round(plan_s, 3),
        "medians": medians,
        "surgery_over_cp": {
            key: round(medians["surgery"][key] / medians["cp"][key], 3) for key in ("returned_s", "synced_s")
        },
        "peak_rss_bytes": peak,
        "peak_rss_growth_bytes": growth,
        "runs": {name: [[round(value, 3) for value in run] for run in runs] for name, runs in times.items()},
        "layers": args.layers,
    }
    for name, median in medians.items():
        print(f"{name:28} {median['returned_s']:8.2f} s {median['synced_s']:8.2f} s with sync")
    finish("surgery", result, args.out)


if __name__ == "__main__":
    main()
