"""`llmdrop serve` as its clients see it: one server with an API key and a short queue, for all of this file."""

import asyncio
import json
import time
from pathlib import Path

import httpx
import openai
import pytest
from playwright.sync_api import expect

from benchmarks.servers import MASK, SUMMARY, serving
from llmdrop_server.schemas import KV, Drop
from llmdrop_vllm.embedded import MODEL

pytestmark = pytest.mark.processes
KEY, QUEUE = "sesam", 12
QUESTION = [{"role": "user", "content": "What is os.path.join?"}]
GREEDY = {"model": "embedded", "max_tokens": 24, "temperature": 0}
LONG = GREEDY | {"prompt": "def f", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {
    "type": "object",
    "properties": {"module": {"type": "string", "maxLength": 8}},
    "required": ["module"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("server")
    (directory / "keys").write_text(f"{KEY}\n")
    options = ["--api-key-file", str(directory / "keys"), "--max-num-queued-reqs", str(QUEUE), "--limit", "n=4"]
    # The embedded model would fill its answers with the whitespace that JSON allows anywhere.
    json_options = ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with serving(directory, "--drop-attention", MASK, *options, *json_options, *tools) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
        yield client


def kv(http):
    return KV.model_validate(http.get("/v1/drop/kv").json())


def wait_until_idle(http, seconds=10.0):
    """Until no block is in use; returns the last look."""
    deadline = time.monotonic() + seconds
    while (found := kv(http)).blocks_used and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def test_chat_completion_and_streams_agree(client):
    chat = client.chat.completions.create(messages=QUESTION, **GREEDY).choices[0].message.content
    assert chat.strip()
    prompt = "<|user|>What is os.path.join?<|assistant|>"
    assert client.completions.create(prompt=prompt, **GREEDY).choices[0].text == chat
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [*client.chat.completions.create(messages=QUESTION, **options, **GREEDY)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == chat
    assert chunks[-1].usage.completion_tokens == 24
    chunks = [*client.completions.create(prompt=prompt, **options, **GREEDY)]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == chat


def test_structured_output(client):
    answer = client.chat.completions.create(
        messages=QUESTION,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}},
        **GREEDY | {"max_tokens": 60},
    )
    assert [*json.loads(answer.choices[0].message.content)] == ["module"]


def test_a_named_tool_is_called(client):
    choice = {"type": "function", "function": {"name": "look_up"}}
    options = GREEDY | {"max_tokens": 60}
    answer = client.chat.completions.create(messages=QUESTION, tools=[TOOL], tool_choice=choice, **options)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "look_up"


def test_logprobs(client):
    answer = client.chat.completions.create(messages=QUESTION, logprobs=True, top_logprobs=3, **GREEDY)
    for token in answer.choices[0].logprobs.content:
        assert token.logprob == pytest.approx(max(each.logprob for each in token.top_logprobs))
        assert len(token.top_logprobs) == 3


def test_the_responses_api(client):
    answer = client.responses.create(
        model="embedded", input="What is os.path.join?", max_output_tokens=8, temperature=0
    )
    assert answer.output_text.strip()


def complete(**options):
    return lambda client: client.completions.create(**GREEDY | {"prompt": "x"} | options)


def structured(**options):
    return complete(extra_body={"structured_outputs": options})


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda c: c.embeddings.create(model="embedded", input="x"), openai.NotFoundError, "/v1/embeddings: Not Found"),
        (lambda c: c.with_options(api_key="wrong").models.list(), openai.AuthenticationError, ""),
        (complete(model="gpt"), openai.NotFoundError, "`gpt` does not exist"),
        (complete(n=5), openai.BadRequestError, r"n is 5; the bound is 4 \(n\)"),
        (complete(logprobs=21), openai.BadRequestError, "max allowed: 20"),
        (complete(max_tokens=1025), openai.BadRequestError, "max_model_len"),
        (complete(prompt="x " * 1025), openai.BadRequestError, "maximum context length is 1024"),
        (complete(prompt="x" * (5 << 20)), openai.APIStatusError, "4,194,304 bytes"),
        (complete(temperature=-1), openai.BadRequestError, "temperature"),
        (complete(stop=["x"] * 17), openai.BadRequestError, r"16 \(stop\)"),
        (structured(regex="a" * 16385), openai.BadRequestError, r"the bound is 16,384 \(grammar_bytes\)"),
        (structured(regex="(("), openai.BadRequestError, ""),
    ],
)
def test_errors_are_the_clients_own_and_name_what_was_wrong(client, ask, error, words):
    with pytest.raises(error, match=words) as raised:
        ask(client)
    assert "Traceback" not in raised.value.response.text
    assert "site-packages" not in raised.value.response.text


def test_the_report_tells_what_is_dropped_and_what_fits(http):
    drop = Drop.model_validate_json(http.get("/v1/drop").content)
    assert (drop.summary, drop.mask.attention, drop.family) == (SUMMARY, (11, 7, 8, 10), "llama")
    assert (drop.full.attention_layers, drop.served.attention_layers) == (12, 8)
    assert (drop.full.kv_bytes_per_token, drop.served.kv_bytes_per_token) == (3072, 2048)
    assert drop.served.kv_tokens * 2048 == 1 << 30  # all of VLLM_CPU_KVCACHE_SPACE
    assert drop.served.parameters < drop.full.parameters


def test_every_model_card_has_the_mask(http, client):
    (card,) = http.get("/v1/models").json()["data"]
    assert card["drop"] == {"num_hidden_layers": 12, "attention": [11, 7, 8, 10], "mlp": [], "windows": []}
    assert card["drop_summary"] == SUMMARY
    assert (card["id"], card["root"], card["max_model_len"]) == ("embedded", str(MODEL), 1024)  # as vLLM gives it
    assert client.models.list().data[0].id == "embedded"


def test_the_mask_is_among_the_metrics(http):
    metrics = http.get("/metrics").text
    for line in (
        'llmdrop_dropped_sublayers{kind="attention"} 4.0',
        'llmdrop_kv_bytes_per_token{form="full"} 3072.0',
        'llmdrop_kv_bytes_per_token{form="served"} 2048.0',
        'llmdrop_kv_tokens{form="served"} 524288.0',
        f'llmdrop_mask_info{{mask="{SUMMARY}",model_name="embedded"}} 1.0',
    ):
        assert line in metrics
    assert "vllm:kv_cache_usage_perc" in metrics


def test_our_routes_are_in_the_schema_with_examples(http):
    schema = http.get("/openapi.json").json()
    for path in ("/v1/drop", "/v1/drop/kv", "/v1/models", "/health", "/ready"):
        operation = schema["paths"][path]["get"]
        reference = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
        assert schema["components"]["schemas"][reference.rpartition("/")[2]]["examples"]
        assert operation["tags"] == ["llmdrop"]


def test_without_the_key_only_probes_and_the_page_answer(server):
    with httpx.Client(base_url=server.url) as stranger:
        schema = httpx.get(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
        for path, operations in schema["paths"].items():
            for method in operations:
                status = stranger.request(method, path.replace("{response_id}", "x")).status_code
                assert status == (200 if path in ("/health", "/ready") else 401), (method, path)
        for path in ("/metrics", "/docs", "/openapi.json"):
            assert stranger.get(path).status_code == 401
        assert stranger.get("/").status_code == 200


def test_the_key_stands_neither_in_the_process_list_nor_in_the_log(server):
    assert KEY not in Path(f"/proc/{server.process.pid}/cmdline").read_text()
    assert f"'{KEY}'" not in server.log.read_text()


def test_other_origins_may_not_read_answers(http):
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for answer in (http.options("/v1/completions", headers=preflight), http.get("/v1/models", headers=preflight)):
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_the_page_may_ask_nothing_but_its_server_and_the_one_to_compare(http):
    policy = http.get("/").headers["Content-Security-Policy"]
    assert http.head("/").headers["Content-Security-Policy"] == policy
    assert "default-src 'none'" in policy
    assert "connect-src 'self';" in policy
    policy = http.get("/", params={"compare": "http://127.0.0.1:8001/"}).headers["Content-Security-Policy"]
    assert "connect-src 'self' http://127.0.0.1:8001;" in policy
    for hostile in ("http://a b", "http://a; script-src *", "javascript:x", "http://*", "http://a\r\nX: y", "//a"):
        assert "connect-src 'self';" in http.get("/", params={"compare": hostile}).headers["Content-Security-Policy"]


def test_files_beside_the_pages_are_not_served(http):
    for path in ("../routes.py", "..%2froutes.py", "%2e%2e/routes.py", "/etc/passwd", ""):
        assert http.get(f"/static/llmdrop/{path}").status_code in (401, 404)


def test_a_stream_in_progress_is_seen_and_a_client_that_goes_away_frees_its_blocks(client, http):
    with client.completions.create(stream=True, **LONG) as stream:
        next(iter(stream))
        deadline = time.monotonic() + 10
        while not (busy := kv(http)).requests_running and time.monotonic() < deadline:
            next(iter(stream))
        assert (busy.requests_running, busy.blocks_used + busy.blocks_free) == (1, busy.blocks)
        assert busy.blocks_used > 0
    idle = wait_until_idle(http)
    assert (idle.blocks_used, idle.requests_running) == (0, 0)


def test_a_full_queue_says_when_to_come_again(server, http):
    async def flood():
        timeout, headers = httpx.Timeout(120), {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=timeout) as many:
            body = GREEDY | {"prompt": "def f", "max_tokens": 200, "ignore_eos": True}
            asked = (many.post("/v1/completions", json=body | {"stream": i % 2 == 0}) for i in range(4 * QUEUE))
            return await asyncio.gather(*asked)

    answers = asyncio.run(flood())
    served, refused = ([each for each in answers if each.status_code == status] for status in (200, 429))
    assert len(served) + len(refused) == len(answers)
    assert len(served) >= QUEUE
    assert not any('"error"' in each.text for each in served)
    for each in refused:
        assert each.headers["Retry-After"] == "2"
        assert each.json()["error"]["type"] == "RateLimitError"
    assert refused
    assert wait_until_idle(http).blocks_used == 0


def test_the_prefix_cache_is_told(client, http):
    before = kv(http).prefix_hit_rate or 0
    for _ in range(3):
        client.completions.create(prompt="import os\n" * 60, **GREEDY | {"max_tokens": 1})
    assert kv(http).prefix_hit_rate > before


def test_the_page_asks_for_the_key_shows_the_model_and_streams_an_answer(server, browser):
    page = browser.new_context().new_page()
    complaints = []
    page.on("console", lambda message: complaints.append(message.text) if "401" not in message.text else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server.url)
    page.fill("input.key-input", KEY)
    page.press("input.key-input", "Enter")
    expect(page.locator("#layers .cell.dropped")).to_have_count(4)
    expect(page.locator("#summary")).to_have_text(SUMMARY)
    expect(page.locator("#capacity")).to_contain_text("512")
    page.fill("#max-tokens", "24")
    page.fill("#prompt", QUESTION[0]["content"])
    page.press("#prompt", "Enter")
    expect(page.locator("#log")).to_contain_text("24 tokens", timeout=30_000)
    expect(page.locator("#log")).to_contain_text("TTFT")
    expect(page.locator("#tiles")).to_contain_text("tokens/s")
    page.context.close()
    assert complaints == []


def test_the_log_has_no_traceback(server):
    """Last in this file: nothing above was an error of the server's."""
    log = server.log.read_text()
    assert "Traceback" not in log
    assert log.count(SUMMARY) == 2  # when it was loaded, and when the routes were added
