"""Score and strip a 13 GB checkpoint under 4 GiB of memory: Llama-2-7B's shapes in real shards, random bf16 weights.

    python benchmarks/seven_billion.py [--limit-gib 4] [--directory /tmp]

Each command of `llmdrop` is a process of its own. Where the system lets us make a control group (Linux, root) the limit
is enforced on everything that the command uses, the page cache included; the peak resident set is reported anyway.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.options import ending, positive
from benchmarks.record import add_out, finish
from benchmarks.shapes import find
from benchmarks.weights import write_random_apart, write_tokens

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
    command = [sys.executable, "-c", "from llmdrop_vllm.cli import main; raise SystemExit(main())", *arguments]
    process = subprocess.Popen(command, preexec_fn=enter)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with status {status}")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_rss_mib": usage.ru_maxrss >> 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gib", type=positive, default=4)
    parser.add_argument("--directory", type=Path, help="where 27 GB are free")
    add_out(parser)
    args = parser.parse_args()
    with (
        ending("seven_billion"),
        tempfile.TemporaryDirectory(dir=args.directory) as name,
        memory_limit(int(args.limit_gib * 2**30)) as group,
    ):
        here = Path(name)
        scores, mask = here / "scores.json", here / "mask.json"
        model = write_random_apart(here / "model", SHAPE, "bfloat16", SHARD_BYTES)
        data = write_tokens(here / "data.json", SHAPE.config["vocab_size"], SAMPLES, SEQ_LEN)
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
    finish("seven_billion", result, args.out)


if __name__ == "__main__":
    main()
