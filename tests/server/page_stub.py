"""A stand-in for the server behind the page: its files under its Content-Security-Policy, and canned answers.

Run by itself to work on the page: `python -m tests.server.page_stub [PORT]`.
"""

import copy
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from llmdrop_server.schemas import Drop

STATIC = Path(__file__).parents[2] / "server" / "llmdrop_server" / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# As llmdrop_server.routes has them; test_page_drop checks that. They are not imported, because vLLM would come along.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?|https?://\[[0-9A-Fa-f:]+\](:\d{1,5})?")
# The example of the schema, with scores.
DROP: dict[str, Any] = Drop.model_config["json_schema_extra"]["examples"][0] | {
    "scores": {
        "importance": {
            "attention": [0.41, 0.22, 0.13, 0.11, 0.094, 0.071, 0.052, 0.0081, 0.0093, 0.034, 0.012, 0.0042],
            "mlp": [0.62, 0.33, 0.21, 0.18, 0.15, 0.12, 0.11, 0.094, 0.088, 0.12, 0.19, 0.47],
            "block": [0.71, 0.42, 0.29, 0.25, 0.21, 0.17, 0.15, 0.099, 0.094, 0.14, 0.20, 0.48],
        },
        "calibration": "embedded",
    },
}
KV = {
    "blocks": 4096,
    "blocks_used": 96,
    "blocks_free": 4000,
    "block_tokens": 128,
    "usage": 0.0234375,
    "prefix_hit_rate": 0.61,
    "requests_running": 8,
    "requests_waiting": 3,
    "preemptions": 2,
}
BOUNDS_S = {"time_to_first_token": (0.01, 0.02, 0.04, 0.08), "inter_token_latency": (0.005, 0.01, 0.025, 0.05)}
NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template"
)


@dataclass
class Stub:
    """What the next requests are answered; `requests` holds (method, path, headers, JSON body) of those answered."""

    drop: dict[str, Any] | None = field(default_factory=lambda: copy.deepcopy(DROP))
    kv: dict[str, Any] | None = field(default_factory=lambda: dict(KV))
    pieces: tuple[str, ...] = ("A", " short", " answer", ".")
    first_s: float = 0.02
    gap_s: float = 0.01
    finish: str = "stop"
    stream_error: str | None = None
    api_key: str | None = None
    allowed_origin: str | None = None
    chat_template: bool = True
    down: str | None = None
    full: bool = False
    cut: bool = False
    models: tuple[str, ...] = ("embedded",)
    # Each reading of /metrics adds these, as if they had happened since the one before.
    prompt_tokens: int = 200
    generation_tokens: int = 1000
    requests: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    disconnected: threading.Event = field(default_factory=threading.Event)
    readings: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Stub":
        handler = type("StubHandler", (Handler,), {"stub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked(self, path: str) -> list[tuple[dict[str, str], Any]]:
        """(headers, body) of the requests for `path`, preflights left out."""
        return [
            (headers, body) for method, asked, headers, body in self.requests if asked == path and method != "OPTIONS"
        ]

    def metrics(self) -> str:
        """Two engines, as with data parallelism, so that the page has something to sum."""
        if self.kv is None:  # --disable-log-stats
            return ""
        self.readings += 1
        counters = {
            "prompt_tokens_total": self.prompt_tokens * self.readings / 2,
            "generation_tokens_total": self.generation_tokens * self.readings / 2,
            "num_requests_running": self.kv["requests_running"] / 2,
            "num_requests_waiting": self.kv["requests_waiting"] / 2,
            "kv_cache_usage_perc": self.kv["usage"],
        }
        lines = ["# HELP vllm:prompt_tokens_total Number of prefill tokens processed."]
        for engine in (0, 1):
            labels = f'engine="{engine}",model_name="embedded"'
            lines += [f"vllm:{name}{{{labels}}} {value}" for name, value in counters.items()]
            for name, bounds in BOUNDS_S.items():
                # Half of the observations in the second bucket, half in the third.
                counts = [0, 5 * self.readings, *[10 * self.readings] * (len(bounds) - 2)]
                for bound, count in zip([*bounds, "+Inf"], [*counts, 10 * self.readings], strict=True):
                    lines.append(f'vllm:{name}_seconds_bucket{{{labels},le="{bound}"}} {count}')
        return "\n".join(lines) + "\n"


class Handler(BaseHTTPRequestHandler):
    stub: Stub

    def log_message(self, *_: object) -> None:
        pass

    def do_OPTIONS(self) -> None:
        self.note(None)
        self.answer(200 if self.stub.allowed_origin else 400, "", "text/plain")

    def do_GET(self) -> None:
        path = self.note(None)
        stub = self.stub
        if path == "/":
            return self.page()
        if path.startswith("/static/llmdrop/"):
            file = STATIC / path.removeprefix("/static/llmdrop/")
            return self.answer(200, file.read_text(), TYPES[file.suffix])
        if path == "/health":
            status = {"status": "unavailable" if stub.down else "ok", "reason": stub.down}
            return self.json(503 if stub.down else 200, status)
        if not self.admitted():
            return None
        if path == "/metrics" and stub.cut:
            return self.start(200, "text/plain", {"Content-Length": "1000"})  # and the connection ends
        if path == "/metrics":
            return self.answer(200, stub.metrics(), "text/plain")
        if path == "/v1/models":
            return self.json(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in stub.models]})
        if path == "/v1/drop" and stub.drop:
            return self.json(200, stub.drop)
        if path == "/v1/drop/kv" and stub.kv:
            return self.json(200, stub.kv)
        return self.error(404, "Not Found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = self.note(body)
        if not self.admitted():
            return
        if self.stub.full:
            self.error(429, "too many requests", {"Retry-After": "7"})
        elif path == "/v1/chat/completions" and not self.stub.chat_template:
            self.error(400, NO_TEMPLATE)
        else:
            self.stream(path.endswith("/chat/completions"))

    def note(self, body: Any) -> str:
        path = urlsplit(self.path).path
        self.stub.requests.append((self.command, path, dict(self.headers), body))
        return path

    def admitted(self) -> bool:
        if self.stub.api_key is None or self.headers["Authorization"] == f"Bearer {self.stub.api_key}":
            return True
        self.error(401, "Unauthorized")
        return False

    def stream(self, chat: bool) -> None:
        self.start(200, "text/event-stream")
        pieces = self.stub.pieces
        try:
            if chat:
                self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            time.sleep(self.stub.first_s)
            for index, piece in enumerate(pieces):
                time.sleep(self.stub.gap_s if index else 0)
                finish = self.stub.finish if index == len(pieces) - 1 and not self.stub.stream_error else None
                text = {"delta": {"content": piece}} if chat else {"text": piece}
                self.event({"choices": [{"index": 0, **text, "finish_reason": finish}]})
            if self.stub.stream_error:
                error = {"message": self.stub.stream_error, "type": "InternalServerError", "code": 500}
                self.event({"error": error})
            else:
                self.event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": len(pieces)}})
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.stub.disconnected.set()

    def event(self, data: Any) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def page(self) -> None:
        compared = parse_qs(urlsplit(self.path).query).get("compare", [""])[0]
        connect = f"'self' {compared}" if ORIGIN.fullmatch(compared) else "'self'"
        policy = POLICY.replace("connect-src 'self'", f"connect-src {connect}")
        self.answer(200, (STATIC / "index.html").read_text(), "text/html", {"Content-Security-Policy": policy})

    def json(self, status: int, value: Any) -> None:
        self.answer(status, json.dumps(value), "application/json")

    def error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        body = {"error": {"message": message, "type": "Error", "param": None, "code": status}}
        self.answer(status, json.dumps(body), "application/json", headers)

    def answer(self, status: int, text: str, kind: str, headers: dict[str, str] | None = None) -> None:
        body = text.encode()
        self.start(status, kind, {**(headers or {}), "Content-Length": str(len(body))})
        self.wfile.write(body)

    def start(self, status: int, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if self.stub.allowed_origin:
            self.send_header("Access-Control-Allow-Origin", self.stub.allowed_origin)
            self.send_header("Access-Control-Allow-Headers", "authorization, content-type")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()


if __name__ == "__main__":
    stub = Stub(port=int(sys.argv[1]) if len(sys.argv) > 1 else 0, allowed_origin="*").start()
    print(stub.url)
    threading.Event().wait()
