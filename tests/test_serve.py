"""`vllm serve` with the plugin, as an OpenAI client sees it."""

import json
import signal
import urllib.request

import openai
import pytest

from benchmarks.servers import SUMMARY, serving
from tests.warm import cold

pytestmark = pytest.mark.processes
QUESTION = [{"role": "user", "content": "What is os.path.join?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Four attention sublayers dropped by vLLM's own option; VLLM_PLUGINS names the plugin, so its routes are there.

    Of all servers of the tests it is the one that starts as it does for its users, whatever other tests' may share.
    """
    mask = ["--hf-overrides", '{"drop_attn_list": [11, 7, 8, 10]}']
    directory, env = tmp_path_factory.mktemp("server"), {"VLLM_PLUGINS": "llmdrop"}
    with cold(), serving(directory, *mask, command=("vllm", "serve"), env=env) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


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


def test_the_plugins_routes_are_there_in_vllms_own_server_too(server):
    with urllib.request.urlopen(f"{server.url}/v1/drop") as answer:
        assert json.load(answer)["summary"] == SUMMARY
    with urllib.request.urlopen(f"{server.url}/ready") as answer:
        assert json.load(answer) == {"status": "ok", "reason": None}


def test_what_was_dropped_stands_in_the_log_once(server):
    line = f"{SUMMARY}; KV cache 2,048 bytes/token, 67% of the full model"
    assert server.log.read_text().count(line) == 1


def test_ctrl_c_ends_the_server(server):
    """Last in this file: the server is gone afterwards."""
    assert "Traceback" not in server.log.read_text()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=60) == 0
    # vLLM's output handler may notice the engine's end before it is cancelled, and then logs a traceback of its own.
    assert "llmdrop_" not in server.log.read_text().partition("[shutdown]")[2]
