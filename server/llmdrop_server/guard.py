"""What stands before every route: the API key, and the bounds on a request's body."""

import asyncio
import hashlib
import secrets
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmdrop_server.admission import Admission
from llmdrop_server.ending import Ending
from llmdrop_server.errors import error_response
from llmdrop_server.limits import Limits, RequestError

# Without a key: probes, and the page's own files, which hold nothing of the model.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
OPEN_PREFIX = "/static/llmdrop/"
BODY_METHODS = frozenset({"POST", "PUT", "PATCH", "DELETE"})
# Times the bound of what is read and thrown away, so that the client learns why.
DRAINED = 4


class Guard:
    """ASGI middleware. vLLM's own asks for the key under some prefixes only, and bounds no body."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str],
        limits: Limits,
        ending: Ending,
        admission: Admission,
        allowed_hosts: frozenset[str] = frozenset(),
    ) -> None:
        self.app = app
        self.digests = [_digest(key) for key in keys]
        self.limits = limits
        self.ending = ending
        self.admission = admission
        self.allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not (path in OPEN_PATHS or path.startswith(OPEN_PREFIX) or self._has_key(headers)):
            await _refuse(scope, receive, send, RequestError("the API key is missing or wrong", 401))
            return
        if scope["type"] == "websocket" or scope["method"] not in BODY_METHODS:
            await self.app(scope, receive, send)
            return
        try:
            if self.ending.started:
                raise RequestError("the server is about to end", 503)
            body = await self._read(headers, receive)
            with self.admission.place(self._answers(headers, body)):
                await self.app(scope, _again(body, receive), send)
        except RequestError as error:
            await _refuse(scope, receive, send, error)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        given = _digest(key)
        # Every key is compared, each in constant time: how long it takes tells nothing.
        matches = [secrets.compare_digest(given, digest) for digest in self.digests]
        return not self.digests or (scheme.lower() == "bearer" and any(matches))

    def _answers(self, headers: Headers, body: bytes) -> int:
        kind = headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
        is_json = kind == "application/json" or kind.endswith("+json")  # FastAPI reads both as JSON
        return self.limits.check_body(body, self.allowed_hosts) if is_json else 1

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        bound = self.limits.body_bytes
        declared = headers.get("Content-Length", "0")
        chunks, size, end = [], 0, bound * DRAINED
        too_large = declared.isdecimal() and int(declared) > bound
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                # A client that still sends cannot read: it would see its connection break, and not the refusal.
                while size <= end and not (too_large and int(declared) > end):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError("the client went away before its request was complete")
                    size += len(message.get("body", b""))
                    too_large = too_large or size > bound
                    if not too_large:
                        chunks.append(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            seconds = self.limits.body_seconds
            raise RequestError(f"the request body took longer than {seconds:g} s (body_seconds)", 408) from None
        if too_large:
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
