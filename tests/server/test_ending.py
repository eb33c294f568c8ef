"""How `llmdrop serve` ends: told to, while it streams; and when its engine is stuck or killed."""

import json
import os
import signal
import threading
import time

import httpx
import pytest

from benchmarks.servers import MASK, serving

pytestmark = pytest.mark.processes
TOKENS = 800  # on a fast machine, one that is told to end has finished a few before a second request reaches it
ASK = {"model": "embedded", "prompt": "def f", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
ASK |= {"temperature": 0, "return_token_ids": True}


@pytest.fixture
def server(tmp_path):
    # On a busy machine, what is left of a stream takes longer than the default of 30 s.
    with serving(tmp_path, "--drop-attention", MASK, "--shutdown-timeout", "120") as served:
        yield served


class Stream(threading.Thread):
    """A client that reads one stream to its end."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url = url
        self.lines, self.begun = [], threading.Event()

    def run(self):
        with httpx.stream("POST", f"{self.url}/v1/completions", json=ASK, timeout=120) as answer:
            for line in answer.iter_lines():
                if line:
                    self.lines.append(line)
                    self.begun.set()


def streaming(server):
    stream = Stream(server.url)
    stream.start()
    assert stream.begun.wait(60)
    return stream


def test_told_to_end_it_finishes_its_streams_and_takes_no_new_requests(server):
    stream = streaming(server)
    server.process.send_signal(signal.SIGTERM)
    refused = None
    while stream.is_alive() and refused is None:
        answer = httpx.post(f"{server.url}/v1/completions", json=ASK | {"stream": False, "max_tokens": 1})
        refused = answer if answer.status_code != 200 else None
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is about to end")
    assert httpx.get(f"{server.url}/ready").status_code == 503
    stream.join(150)
    *chunks, end = (line.removeprefix("data: ") for line in stream.lines)
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    # A server that is busy puts what has come meanwhile into one chunk.
    assert sum(len(choice["token_ids"]) for choice in choices) == TOKENS
    assert (choices[-1]["finish_reason"], end) == ("length", "[DONE]")
    assert server.process.wait(timeout=60) == 0


def test_a_stuck_engine_is_unhealthy_and_a_killed_one_ends_the_server_with_an_error(server):
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    answer = httpx.get(f"{server.url}/health", timeout=30)
    assert (answer.status_code, answer.json()["reason"]) == (503, "the engine has not answered for 10 s")
    os.kill(engine, signal.SIGCONT)
    deadline = time.monotonic() + 10
    while (status := httpx.get(f"{server.url}/health", timeout=30).status_code) != 200 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert status == 200

    stream = streaming(server)
    os.kill(engine, signal.SIGKILL)
    killed = time.monotonic()
    stream.join(10)
    assert '"error"' in "".join(stream.lines[-2:])
    answers = {path: httpx.get(f"{server.url}{path}", timeout=5).status_code for path in ("/health", "/ready")}
    answers["/v1/completions"] = httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=5).status_code
    assert set(answers.values()) == {503}
    assert time.monotonic() - killed < 2
    assert server.process.wait(timeout=30) == 1
    assert time.monotonic() - killed < 10
    assert "llmdrop: error: the engine has died; the log above says why" in server.log.read_text()
