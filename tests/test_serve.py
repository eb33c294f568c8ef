"""`vllm serve` with the plugin, as an OpenAI client sees it."""

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest

from llmdrop_vllm.embedded import MODEL

pytestmark = pytest.mark.processes
QUESTION = [{"role": "user", "content": "What is os.path.join?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(base URL, log file, process) of a server for the embedded model with four attention sublayers dropped."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [Path(sys.executable).with_name("vllm"), "serve", MODEL, "--port", str(port), "--host", "127.0.0.1"]
    options = ["--served-model-name", "embedded", "--enforce-eager", "--gpu-memory-utilization", "0.3"]
    mask = ["--hf-overrides", '{"drop_attn_list": [11, 7, 8, 10]}']
    with log.open("w") as stdout:
        process = subprocess.Popen([*command, *options, *mask], stdout=stdout, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield url, log, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none")


def test_completion_and_chat_and_stream_agree(client):
    options = {"model": "embedded", "max_tokens": 24, "temperature": 0}
    chat = client.chat.completions.create(messages=QUESTION, **options)
    text = chat.choices[0].message.content
    assert text.strip()
    completion = client.completions.create(prompt="<|user|>What is os.path.join?<|assistant|>", **options)
    assert completion.choices[0].text == text
    chunks = [*client.chat.completions.create(messages=QUESTION, stream=True, **options)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert len(chunks) > 5


def test_structured_output(client):
    answer = client.chat.completions.create(
        model="embedded",
        messages=QUESTION,
        temperature=0,
        max_tokens=16,
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert answer.choices[0].message.content in ("yes", "no")


def test_what_was_dropped_stands_in_the_log_once(server):
    line = (
        "attention dropped in 4 of 12 layers [7-8,10-11], MLP in 0; KV cache 2,048 bytes/token, 67% of the full model"
    )
    assert server[1].read_text().count(line) == 1


def test_ctrl_c_ends_the_server(server):
    """Last in this file: the server is gone afterwards."""
    _, log, process = server
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert "Traceback" not in log.read_text()
