"""A load that fills the KV cache, with clients that go away, lie and ask too much: nothing may fail, leak or grow.

    python benchmarks/server_soak.py [--seconds 600]     # make soak

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

from benchmarks.options import positive
from benchmarks.record import add_out, finish
from benchmarks.servers import MASK, Served, serving

BLOCKS, GOOD_CLIENTS, BAD_CLIENTS = 24, 16, 8
# Allocators keep what they were once given; a leak goes on, and a tenth of this would be seen after ten minutes.
MAX_GROWTH_BYTES = 32 << 20
MIN_COMPLETE, MIN_LOOKS, PATIENCE_S, PAUSE_S = 30, 12, 120, 0.5
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

    @property
    def is_enough(self) -> bool:
        """Whether there is enough to judge."""
        return self.answers["complete"] >= MIN_COMPLETE and len(self.rss_bytes) >= MIN_LOOKS

    def memory(self) -> tuple[float, float]:
        """(median resident bytes in the second quarter of the time, by how much that of the last is larger)."""
        looks = self.rss_bytes or [0]
        quarter = max(1, len(looks) // 4)
        before = statistics.median(looks[quarter : 2 * quarter] or looks)
        return before, statistics.median(looks[-quarter:]) - before

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


def watch(served: Served) -> Deed:
    """Have a look at the server: its KV cache and its memory."""

    async def look(client: httpx.AsyncClient, chance: random.Random, tally: Tally) -> None:
        now = (await client.get("/v1/drop/kv")).json()
        tally.busiest_usage = max(tally.busiest_usage, now["usage"])
        tally.preemptions = now["preemptions"]
        tally.rss_bytes.append(served.rss_bytes())

    return look


async def client_of(
    url: str, deeds: tuple[Deed, ...], pause_s: float, seed: int, is_over: Callable[[], bool], tally: Tally
) -> None:
    """One client: one deed after another, with pauses of up to `pause_s`."""
    chance = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        while not is_over():
            deed = chance.choice(deeds)
            try:
                await deed(client, chance, tally)
            except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
                tally.failures.append(f"{deed.__name__}: {error!r}")
            await asyncio.sleep(chance.uniform(0, pause_s))


async def load(served: Served, seconds: float) -> Tally:
    """All clients at once, for so long, and on a busy machine until there is something to judge."""
    tally, start_s = Tally(), time.monotonic()

    def is_over() -> bool:
        passed_s = time.monotonic() - start_s
        return passed_s > seconds and (tally.is_enough or passed_s > seconds + PATIENCE_S)

    good = [(GOOD, 0.0)] * GOOD_CLIENTS
    bad = [(BAD, PAUSE_S)] * BAD_CLIENTS
    everyone = enumerate([*good, *bad, ((watch(served),), PAUSE_S)])
    await asyncio.gather(
        *(client_of(served.url, deeds, pause_s, seed, is_over, tally) for seed, (deeds, pause_s) in everyone)
    )
    return tally


def blocks_left_in_use(served: Served, patience_s: float = 30) -> int:
    """Blocks that are not given back."""
    deadline = time.monotonic() + patience_s
    while (used := httpx.get(f"{served.url}/v1/drop/kv").json()["blocks_used"]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return int(used)


def failures(tally: Tally, leaked: int, log: str, *, healthy: bool) -> list[str]:
    """What went wrong, from what the clients saw and how they left the server."""
    grown = tally.memory()[1]
    judged = {
        f"{tally.answers['complete']} complete answers and {len(tally.rss_bytes)} looks at the memory; at least "
        f"{MIN_COMPLETE} and {MIN_LOOKS} are needed to judge": not tally.is_enough,
        f"{leaked} blocks are still in use": leaked > 0,
        "the server is not healthy": not healthy,
        f"memory grew by {grown:,.0f} bytes": grown > MAX_GROWTH_BYTES,
        "the log has a traceback": "Traceback" in log,
    }
    return [*tally.failures[:20], *(failure for failure, is_so in judged.items() if is_so)]


def soak(seconds: float) -> dict[str, object]:
    """Serve, load and judge. `failures` is empty where all went well."""
    with tempfile.TemporaryDirectory() as directory:
        options = ["--num-gpu-blocks-override", str(BLOCKS), "--drop-attention", MASK]
        with serving(Path(directory), *options) as served:
            tally = asyncio.run(load(served, seconds))
            leaked, healthy = 0, False
            with contextlib.suppress(httpx.HTTPError):  # a server that is gone is not healthy, and still judged
                leaked = blocks_left_in_use(served)
                healthy = httpx.get(f"{served.url}/health", timeout=30).status_code == 200
            log = served.log.read_text(errors="replace")
    before, growth = tally.memory()
    return {
        "failures": failures(tally, leaked, log, healthy=healthy),
        "seconds": seconds,
        "answers": dict(tally.answers),
        "failed_answers": len(tally.failures),
        "tokens": tally.tokens,
        "busiest_kv_usage": round(tally.busiest_usage, 3),
        "preemptions": tally.preemptions,
        "blocks": BLOCKS,
        "blocks_leaked": leaked,
        "rss_bytes_second_quarter": round(before),
        "rss_growth_bytes": round(growth),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=positive, default=600)
    add_out(parser)
    args = parser.parse_args()
    result = soak(args.seconds)
    finish("server_soak", result, args.out)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
