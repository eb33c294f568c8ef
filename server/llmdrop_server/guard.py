"""What stands before every route: the API key, the bounds on a request's body, and the end of the queue."""

import asyncio
import hashlib
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmdrop_server.errors import error_response
from llmdrop_server.health import Ending
from llmdrop_server.limits import Limits, RequestError

# Without a key: probes, and the page's own files, which hold nothing of the model.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
OPEN_PREFIX = "/static/llmdrop/"
BODY_METHODS = frozenset({"POST", "PUT", "PATCH", "DELETE"})
# Times the bound of what is read and thrown away, so that the client learns why.
DRAINED = 4


@dataclass
class Admission:
    """`bound` is vLLM's --max-num-queued-reqs, None for no end. vLLM looks at it before a request is tokenized, so
    requests that come together pass it together, and those that stream then fail after they were told 200.
    """

    bound: int | None = None
    under_way: int = 0

    @contextmanager
    def place(self, answers: int) -> Iterator[None]:
        """Take so many places while in this context. Raises RequestError where that many are not free."""
        if self.bound is not None and answers > self.bound:
            raise RequestError(f"the request asks for {answers} answers; the queue holds {self.bound}")
        if self.bound is not None and self.under_way + answers > self.bound:
            raise RequestError(f"the queue of {self.bound} is full (--max-num-queued-reqs); try again later", 429)
        self.under_way += answers
        try:
            yield
        finally:
            self.under_way -= answers


@dataclass
class Guard:
    """ASGI middleware. vLLM's own asks for the key under some prefixes only, and bounds no body."""

    app: ASGIApp
    keys: Collection[str] = field(repr=False)
    limits: Limits
    ending: Ending
    admission: Admission
    allowed_hosts: frozenset[str] = frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        try:
            if scope["type"] in ("http", "websocket") and not self._is_let_in(scope):
                raise RequestError("the API key is missing or wrong", 401)
            if scope["type"] != "http" or scope["method"] not in BODY_METHODS:
                await self.app(scope, receive, send)
                return
            if self.ending.started:
                raise RequestError("the server is about to end", 503)
            headers = Headers(scope=scope)
            body = await self._read(headers, receive)
            with self.admission.place(self._answers(headers, body)):
                await self.app(scope, _again(body, receive), send)
        except RequestError as error:
            await _refuse(scope, receive, send, error)

    def _is_let_in(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return True
        scheme, _, key = Headers(scope=scope).get("Authorization", "").partition(" ")
        # Every key is compared, each in constant time: how long it takes tells nothing.
        matches = [secrets.compare_digest(_digest(key), _digest(each)) for each in self.keys]
        return not self.keys or (scheme.lower() == "bearer" and any(matches))

    def _answers(self, headers: Headers, body: bytes) -> int:
        kind = headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
        is_json = kind == "application/json" or kind.endswith("+json")  # FastAPI reads both as JSON
        return self.limits.check_body(body, self.allowed_hosts) if is_json else 1

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        bound, seconds = self.limits.body_bytes, self.limits.body_seconds
        said = headers.get("Content-Length", "")
        chunks, size, declared = [], 0, int(said) if said.isdecimal() else 0
        try:
            async with asyncio.timeout(seconds):
                # A client that still sends cannot read: it would see its connection break, and not the refusal.
                while max(size, declared) <= bound * DRAINED:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError("the client went away before its request was complete")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if max(size, declared) <= bound:
                        chunks.append(chunk)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise RequestError(f"the request body took longer than {seconds:g} s (body_seconds)", 408) from None
        if max(size, declared) > bound:
            raise RequestError(f"the request body is over the bound of {bound:,} bytes (body_bytes)", 413)
        return b"".join(chunks)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def _refuse(scope: Scope, receive: Receive, send: Send, error: RequestError) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": error.message})
        return
    await error_response(error.message, error.status, error.param)(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
