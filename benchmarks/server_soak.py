"""A load that fills the KV cache, with clients that go away, lie and ask too much: nothing may fail, leak or grow.

    python benchmarks/server_soak.py [--seconds 600] [--out benchmarks/results/server_soak.json]     # make soak

The embedded model is served with a KV cache of two dozen blocks, so that requests wait and are preempted. Two thirds
of the clients are good: every answer of theirs must be complete. The others hang up in mid-stream or before the first
token, send half a body, a body that is no JSON, one that is too large, or ask for more than is allowed: each must get
the refusal that is meant for it. At the end no block may be in use, and the memory of the server's processes may not
have grown from the second quarter of the time to the last.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.record import RESULTS, finish
from benchmarks.servers import MASK, Served, serving

BLOCKS, GOOD_CLIENTS, BAD_CLIENTS = 24, 16, 8
# Allocators keep what they were once given; a leak goes on, and a tenth of this would be seen after ten minutes.
MAX_GROWTH_BYTES = 32 << 20
MIN_COMPLETE, MIN_LOOKS, PATIENCE_S = 30, 12, 120
ROUTE = "/v1/completions"
WORDS = ("def", "class", "import", "return", "lambda", "self", "path", "join", "list", "dict", "open", "read")


@dataclass
class Tally:
    """What the clients saw."""

    answers: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    tokens: int = 0
    busiest_usage: float = 0.0
    preemptions: int = 0
    rss_bytes: list[int] = field(default_factory=list)

    def expect(self, kind: str, answer: httpx.Response, status: int) -> None:
        """Count a refusal, or note that it was another one."""
        self.answers[kind] += 1
        if answer.status_code != status:
            self.failures.append(f"{kind}: {status} expected, {answer.status_code} found: {answer.text[:200]}")


def request(chance: random.Random, **options: object) -> dict[str, object]:
    """A prompt of up to 400 words, some of which another request has had, and up to 300 tokens of answer."""
    shared, own = WORDS * chance.randrange(4), chance.choices(WORDS, k=chance.randrange(1, 120))
    base = {"model": "embedded", "prompt": " ".join([*shared, *own]), "max_tokens": chance.randrange(1, 300)}
    return base | {"temperature": 0.8, "seed": chance.randrange(1 << 30), "ignore_eos": True} | options


async def complete(client: httpx.AsyncClient, chance: random.Random, tally: Tally) -> None:
    """A good request: all its tokens come, streamed or at once."""
    body = request(chance, stream=chance.random() < 0.7, stream_options=None)
    wanted = body["max_tokens"]
    if not body["stream"]:
        answer = await client.post(ROUTE, json=body)
        got = answer.json()["usage"]["completion_tokens"] if answer.status_code == 200 else answer.text[:200]
    else:
        body["stream_options"] = {"include_usage": True}
        got, last = "no usage", ""
        async with client.stream("POST", ROUTE, json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    got = (event.get("usage") or {}).get("completion_tokens", got) if "error" not in event else line
                last = line or last
        got = got if last == "data: [DONE]" else f"the stream ended with {last[:200]!r}"
    tally.answers["complete"] += 1
    if got == wanted:
        tally.tokens += wanted
    else:
        tally.failures.append(f"complete: {wanted} tokens expected, found {got}")


async def hang_up(client: httpx.AsyncClient, chance: random.Random, tally: Tally) -> None:
    """Go away in mid-stream."""
    async with client.stream("POST", ROUTE, json=request(chance, stream=True, max_tokens=600)) as answer:
        left = chance.randrange(1, 40)
        async for _ in answer.aiter_lines():
            left -= 1
            if not left:
                break
    tally.answers["hung up"] += 1


async def give_up(client: httpx.AsyncClient, chance: random.Random, tally: Tally) -> None:
    """Go away before there is an answer."""
    with contextlib.suppress(httpx.TimeoutException):
        await client.post(ROUTE, json=request(chance, max_tokens=600), timeout=chance.uniform(0.01, 0.5))
    tally.answers["gave up"] += 1


async def send_half(client: httpx.AsyncClient, chance: random.Random, tally: Tally) -> None:
    """Promise a body and close the connection in the middle of it."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    body = json.dumps(request(chance)).encode()
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body[: len(body) // 2])
    await writer.drain()
    writer.close()
    tally.answers["half a body"] += 1


async def send_no_json(client: httpx.AsyncClient, chance: random.Random, tally: Tally) -> None:
    body = json.dumps(request(chance))[: chance.randrange(1, 30)]
    headers = {"Content-Type": "application/json"}
    tally.expect("no JSON", await client.post(ROUTE, content=body, headers=headers), 400)


async def send_too_much(client: httpx.AsyncClient, chance: random.Random, tally: Tally) -> None:
    body = request(chance, prompt="x" * (4 * 2**20 + chance.randrange(1 << 20)))
    tally.expect("too large", await client.post(ROUTE, json=body), 413)


async def ask_too_much(client: httpx.AsyncClient, chance: random.Random, tally: Tally) -> None:
    over = chance.choice([{"n": 1000}, {"max_tokens": 10**6}, {"logprobs": 1000}, {"prompt": "x " * 3000}])
    tally.expect("over a bound", await client.post(ROUTE, json=request(chance, **over)), 400)


GOOD = (complete,)
BAD = (hang_up, give_up, send_half, send_no_json, send_too_much, ask_too_much)
Deed = Callable[[httpx.AsyncClient, random.Random, Tally], Awaitable[None]]


async def client_of(url: str, deeds: tuple[Deed, ...], seed: int, is_over: Callable[[], bool], tally: Tally) -> None:
    """One client: one deed after another."""
    chance = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        while not is_over():
            deed = chance.choice(deeds)
            try:
                await deed(client, chance, tally)
            except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
                tally.failures.append(f"{deed.__name__}: {error!r}")
            if deeds is BAD:
                await asyncio.sleep(chance.uniform(0, 0.5))


async def watch(served: Served, is_over: Callable[[], bool], tally: Tally) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
        while not is_over():
            now = (await client.get("/v1/drop/kv")).json()
            tally.busiest_usage = max(tally.busiest_usage, now["usage"])
            tally.preemptions = now["preemptions"]
            tally.rss_bytes.append(served.rss_bytes())
            await asyncio.sleep(0.5)


async def load(served: Served, seconds: float) -> Tally:
    """All clients at once, for so long, and on a busy machine until there is something to judge."""
    tally, start_s = Tally(), time.monotonic()

    def is_over() -> bool:
        passed_s = time.monotonic() - start_s
        judged = tally.answers["complete"] >= MIN_COMPLETE and len(tally.rss_bytes) >= MIN_LOOKS
        return passed_s > seconds and (judged or passed_s > seconds + PATIENCE_S)

    good = (client_of(served.url, GOOD, seed, is_over, tally) for seed in range(GOOD_CLIENTS))
    bad = (client_of(served.url, BAD, 1000 + seed, is_over, tally) for seed in range(BAD_CLIENTS))
    await asyncio.gather(*good, *bad, watch(served, is_over, tally))
    return tally


def blocks_left_in_use(served: Served, patience_s: float = 30) -> int:
    """Blocks that are not given back."""
    deadline = time.monotonic() + patience_s
    while (used := httpx.get(f"{served.url}/v1/drop/kv").json()["blocks_used"]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return int(used)


def soak(seconds: float) -> dict[str, object]:
    """Serve, load and judge. `failures` is empty where all went well."""
    with tempfile.TemporaryDirectory() as directory:
        options = ["--num-gpu-blocks-override", str(BLOCKS), "--drop-attention", MASK]
        with serving(Path(directory), *options) as served:
            tally = asyncio.run(load(served, seconds))
            leaked = blocks_left_in_use(served)
            healthy = httpx.get(f"{served.url}/health", timeout=30).status_code == 200
            log = served.log.read_text(errors="replace")
    quarter = len(tally.rss_bytes) // 4
    growth = statistics.median(tally.rss_bytes[-quarter:]) - statistics.median(tally.rss_bytes[quarter : 2 * quarter])
    failures = [*tally.failures[:20]]
    failures += [f"{leaked} blocks are still in use"] * bool(leaked)
    failures += ["the server is not healthy"] * (not healthy)
    failures += [f"memory grew by {growth:,.0f} bytes"] * (growth > MAX_GROWTH_BYTES)
    failures += ["the log has a traceback"] * ("Traceback" in log)
    return {
        "failures": failures,
        "seconds": seconds,
        "answers": dict(tally.answers),
        "failed_answers": len(tally.failures),
        "tokens": tally.tokens,
        "busiest_kv_usage": round(tally.busiest_usage, 3),
        "preemptions": tally.preemptions,
        "blocks": BLOCKS,
        "blocks_leaked": leaked,
        "rss_bytes_second_quarter": round(statistics.median(tally.rss_bytes[quarter : 2 * quarter])),
        "rss_growth_bytes": round(growth),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--out", type=Path, default=RESULTS / "server_soak.json")
    args = parser.parse_args()
    result = soak(args.seconds)
    finish(result, args.out)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
