"""Load from vLLM's own `vllm bench serve`, and what the server counts of it.

The functions behind that command are called here with its options, because the command itself spends ten seconds of all
cores on imports before every run. What it saves with `--save-result` is what is read.
"""

import contextlib
import gc
import json
import logging
import math
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.contenders import ContenderError
from benchmarks.servers import Served
from benchmarks.workloads import Workload
from llmdrop_vllm.evaluation.harness import only_from

MODEL_NAME = "loaded"
# Ours, and the name that vLLM has for it: e2e_s is the time from the request to its last token.
LATENCIES = {"ttft_s": "ttft", "tpot_s": "tpot", "e2e_s": "e2el"}
PREEMPTIONS, QUEUE = "vllm:num_preemptions_total", "vllm:request_queue_time_seconds"


def bench(
    server: Served, model: Path, workload: Workload, rate_per_s: float, *, seed: int, warmups: int = 0
) -> dict[str, Any]:
    """Send the workload's requests at a mean rate, as a Poisson process, or all at once where the rate is infinite.

    Latencies are in seconds, as vLLM computes them over the requests of this run. The same seed gives the same prompts
    at the same times. Raises ContenderError where no request was answered.
    """
    before = counters(server)
    found = _vllm_bench_serve(
        server,
        *("--backend", "openai", "--model", str(model), "--served-model-name", MODEL_NAME),
        *("--dataset-name", "random", "--random-input-len", str(workload.prompt_tokens)),
        *("--random-output-len", str(workload.output_tokens), "--num-prompts", str(workload.batch)),
        *("--request-rate", str(rate_per_s), "--seed", str(seed), "--num-warmups", str(warmups), "--temperature", "0"),
        *("--percentile-metrics", ",".join(LATENCIES.values()), "--metric-percentiles", "95"),
    )
    if not found["completed"]:
        reason = next(filter(None, found["errors"]), "no reason given").strip().splitlines()[-1]
        raise ContenderError(f"{server.url} answered none of {workload.batch} requests: {reason}")
    counted = {name: count - before[name] for name, count in counters(server).items()}
    return {
        **{
            name: {"median": found[f"median_{theirs}_ms"] / 1e3, "p95": found[f"p95_{theirs}_ms"] / 1e3}
            for name, theirs in LATENCIES.items()
        },
        "requests_per_s": found["request_throughput"],
        "output_tokens_per_s": found["output_throughput"],
        "seconds": found["duration"],
        "failures": found["failed"],
        "preemptions": int(counted[PREEMPTIONS]),
        "queue_s": counted[f"{QUEUE}_sum"] / max(1, counted[f"{QUEUE}_count"]),
    }


def counters(server: Served) -> dict[str, float]:
    """Preemptions, and seconds and number of waits for a place among the running requests, since the server's start."""
    found = dict.fromkeys((PREEMPTIONS, f"{QUEUE}_sum", f"{QUEUE}_count"), 0.0)
    for metric in _metrics(server):
        for sample in metric.samples:
            if sample.name in found:
                found[sample.name] += sample.value
    return found


def requests_that_fit(server: Served) -> int:
    """Requests of the server's longest kind that its KV cache holds at once; one block is vLLM's own."""
    (info,) = (metric for metric in _metrics(server) if metric.name == "vllm:cache_config_info")
    labels = info.samples[0].labels
    blocks = int(labels["num_gpu_blocks"])
    return math.floor(float(labels["kv_cache_max_concurrency"]) * (blocks - 1) / blocks)


def _metrics(server: Served) -> Iterator[Metric]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        yield from text_string_to_metric_families(answer.read().decode())


def _vllm_bench_serve(server: Served, *arguments: str) -> dict[str, Any]:
    """The saved result, requests one by one; what vLLM prints goes to a log beside the server's."""
    parser, run = _entry()
    result = server.log.with_name("bench.json")
    saved = ("--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name)
    # It announces every data set on the standard output that vLLM found when it was imported.
    quiet = only_from(logging.WARNING, "vllm")
    with server.log.with_name("bench.log").open("a") as log, contextlib.redirect_stdout(log), quiet:
        run(parser.parse_args(["--base-url", server.url, "--disable-tqdm", *arguments, *saved]))
    # It hides all objects from the garbage collector, and extension modules complain of them when the process ends.
    gc.unfreeze()
    found: dict[str, Any] = json.loads(result.read_bytes())
    return found


@cache
def _entry() -> tuple[Any, Any]:
    """The option parser and the function of `vllm bench serve`."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return parser, main
