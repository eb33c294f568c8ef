"""Score and strip a 13 GB checkpoint under 4 GiB of memory: Llama-2-7B's shapes in real shards, random bf16 weights.

    python benchmarks/seven_billion.py [--limit-gib 4] [--directory /tmp] [--out benchmarks/results/seven_billion.json]

Each command of `llmdrop` is a process of its own. Where the system lets us make a control group (Linux, root) the limit
is enforced on everything that the command uses, the page cache included; the peak resident set is reported anyway.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from benchmarks.record import RESULTS, finish
from benchmarks.shapes import find
from benchmarks.weights import write_random

SHAPE = find("llama-2-7b")
# Larger than the memory limit: whoever reads a whole one has lost.
SHARD_BYTES = 5 * 10**9
SAMPLES, SEQ_LEN, ATTENTION = 4, 128, 8


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Path | None]:
    """A control group that holds its processes to this much memory; None where none can be made."""
    group = None
    for root, file in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        made = root / f"llmdrop-{os.getpid()}"
        with suppress(OSError):
            made.mkdir()
            if (made / file).exists():
                (made / file).write_text(str(limit_bytes))
                group = made
                break
            made.rmdir()
    try:
        yield group
    finally:
        if group is not None:
            group.rmdir()


def run(group: Path | None, *arguments: str) -> dict:
    """Run one command in the group; its seconds and peak memory."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    start = time.perf_counter()
    command = [sys.executable, "-m", "llmdrop_vllm.cli", *arguments]
    process = subprocess.Popen(command, preexec_fn=enter)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with status {status}")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_rss_mib": usage.ru_maxrss >> 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gib", type=float, default=4)
    parser.add_argument("--directory", type=Path, help="where 27 GB are free")
    parser.add_argument("--out", type=Path, default=RESULTS / "seven_billion.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as name, memory_limit(int(args.limit_gib * 2**30)) as group:
        here = Path(name)
        model, data, scores, mask = here / "model", here / "data.json", here / "scores.json", here / "mask.json"
        # In a process of its own: memory that it leaves behind would count against nobody, but hide the peaks.
        if os.fork() == 0:
            write_random(model, SHAPE, "bfloat16", shard_bytes=SHARD_BYTES)
            os._exit(0)
        if os.wait()[1]:
            raise SystemExit("the checkpoint could not be generated")
        tokens = np.random.default_rng(0).integers(0, SHAPE.config["vocab_size"], (SAMPLES, SEQ_LEN))
        data.write_text(json.dumps(tokens.tolist()))
        result = {
            "checkpoint_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
            "samples": SAMPLES,
            "seq_len": SEQ_LEN,
            "memory_limit_gib": args.limit_gib,
            "limit_enforced": group is not None,
            "score": run(group, "score", str(model), "--data", str(data), "--out", str(scores)),
            "select": run(group, "select", str(scores), "--attention", str(ATTENTION), "--out", str(mask)),
            "apply": run(group, "apply", str(model), str(here / "out"), "--mask", str(mask)),
            "written_bytes": sum(path.stat().st_size for path in (here / "out").glob("*.safetensors")),
        }
    finish(result, args.out)


if __name__ == "__main__":
    main()
