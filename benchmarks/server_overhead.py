"""What our routes and bounds cost: `llmdrop serve` against plain `vllm serve` of the same model under the same load.

    python benchmarks/server_overhead.py [--rounds 15]

Both serve the embedded model with the same mask, both are up all the time, and they take turns, in an order that
changes with every round. Time to first token: one client, streams of one token, pairs of requests. Throughput: many
clients at once, all tokens of all answers over the time for all of them. Medians, with the quartiles of what one turn
of ours is to the turn of vLLM's beside it; where the quartiles have no effect between them, there is no difference.
CPU time of the process that speaks HTTP, the only one that we add work to, is counted too: it is the same on a busy
machine.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx

from benchmarks.measures import quartiles
from benchmarks.record import add_out, finish
from benchmarks.servers import MASK, Served, leave_a_core, serving
from llmdrop_vllm.cli.values import count

PAIRS_PER_ROUND, CLIENTS, TOKENS = 20, 16, 128
PROMPT = "<|user|>What does os.path.join return for an absolute path?<|assistant|>"
OVERRIDES = f'{{"drop_attn_list": [{MASK}]}}'
MAX_TTFT_S, MIN_THROUGHPUT = 0.001, 0.99

Pair = tuple[float, float]  # ours, vLLM's


def body(tokens: int) -> dict[str, object]:
    options = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return {"model": "embedded", "prompt": PROMPT, **options}


async def ttft_s(client: httpx.AsyncClient) -> float:
    """Seconds from the request to the first event of its answer."""
    start = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body(1)) as answer:
        events = answer.aiter_lines()
        await anext(events)
        seconds = time.perf_counter() - start
        async for _ in events:
            pass
    return seconds


async def tokens_per_s(client: httpx.AsyncClient) -> float:
    """Generated tokens per second with all clients at once."""

    async def answer() -> int:
        found = await client.post("/v1/completions", json=body(TOKENS) | {"stream": False})
        return int(found.json()["usage"]["completion_tokens"])

    start = time.perf_counter()
    tokens = sum(await asyncio.gather(*(answer() for _ in range(CLIENTS))))
    return tokens / (time.perf_counter() - start)


async def pair(
    measure: Callable[[httpx.AsyncClient], Awaitable[float]], clients: Sequence[httpx.AsyncClient], turn: int
) -> Pair:
    """(ours, vLLM's), whichever comes first in this turn."""
    first, second = clients if turn % 2 else clients[::-1]
    one, two = await measure(first), await measure(second)
    return (one, two) if turn % 2 else (two, one)


async def measure(servers: Sequence[Served], rounds: int) -> tuple[list[Pair], list[Pair], Pair]:
    """Pairs of times to first token, pairs of throughputs, and CPU seconds of all that."""
    clients = [httpx.AsyncClient(base_url=server.url, timeout=120) for server in servers]
    for client in clients:  # warm up both ways
        for _ in range(PAIRS_PER_ROUND):
            await ttft_s(client)
        await tokens_per_s(client)
    before = [server.cpu_s() for server in servers]
    first_tokens, throughputs = [], []
    for turn in range(rounds):
        first_tokens += [await pair(ttft_s, clients, turn + i) for i in range(PAIRS_PER_ROUND)]
        throughputs.append(await pair(tokens_per_s, clients, turn))
    ours, theirs = (server.cpu_s() - start for server, start in zip(servers, before, strict=True))
    return first_tokens, throughputs, (ours, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=count, default=15)
    add_out(parser)
    args = parser.parse_args()
    with ExitStack() as stack:
        ours, theirs = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        vllm = ("vllm", "serve")
        servers = (
            stack.enter_context(serving(ours, "--drop-attention", MASK, env=leave_a_core())),
            stack.enter_context(serving(theirs, "--hf-overrides", OVERRIDES, command=vllm, env=leave_a_core())),
        )
        first_tokens, throughputs, cpu_s = asyncio.run(measure(servers, args.rounds))
    requests = args.rounds * (PAIRS_PER_ROUND + CLIENTS)
    differences_s = quartiles([ours - theirs for ours, theirs in first_tokens])
    ratios = quartiles([ours / theirs for ours, theirs in throughputs])
    finish(
        "server_overhead",
        {
            "ttft_ms": {name: round(1e3 * statistics.median(column), 3) for name, column in named(first_tokens)},
            "ttft_difference_ms": [round(1e3 * each, 3) for each in differences_s],
            "tokens_per_s": {name: round(statistics.median(column), 1) for name, column in named(throughputs)},
            "throughput_ratio": [round(each, 4) for each in ratios],
            "http_cpu_ms_per_request": {name: round(1e3 * column[0] / requests, 3) for name, column in named([cpu_s])},
            "ttft_within_1_ms": differences_s[1] <= MAX_TTFT_S,
            "throughput_within_1_percent": ratios[1] >= MIN_THROUGHPUT,
            "pairs": len(first_tokens),
            "rounds": args.rounds,
            "clients": CLIENTS,
            "tokens_per_answer": TOKENS,
        },
        args.out,
    )


def named(pairs: Sequence[Pair]) -> list[tuple[str, list[float]]]:
    return [*zip(("llmdrop serve", "vllm serve"), map(list, zip(*pairs, strict=True)), strict=True)]


if __name__ == "__main__":
    main()
