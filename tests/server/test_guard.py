"""The guard before every route: keys, body bounds, and the end of the server."""

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from llmdrop_server.guard import Admission, Guard
from llmdrop_server.health import Ending
from llmdrop_server.limits import Limits

KEY = {"Authorization": "Bearer sesam"}
OPEN = ["/", "/health", "/ready", "/static/llmdrop/app.js"]
GUARDED = ["/v1/drop", "/metrics", "/docs", "/invocations", "/static/other", "/health/x", "/healthy"]


async def echo(request):
    return JSONResponse({"path": request.url.path, "body": (await request.body()).decode()})


async def socket(websocket):
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


def client(keys=("sesam", "other"), ending=None, admission=None, **limits):
    routes = [WebSocketRoute("/v1/realtime", socket), Route("/{path:path}", echo, methods=["GET", "POST", "OPTIONS"])]
    app = Starlette(routes=routes)
    stands = {"limits": Limits(**limits), "ending": ending or Ending(), "admission": admission or Admission()}
    app.add_middleware(Guard, keys=keys, **stands)
    return TestClient(app)


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_every_route_wants_the_key(path, method):
    answer = client().request(method, path)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "AuthenticationError"
    assert client().request(method, path, headers=KEY).status_code == 200


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_the_pages_files_want_none(path):
    assert client().get(path).status_code == 200


@pytest.mark.parametrize(
    "header",
    ["sesam", "Bearer", "Bearer ", "Bearer sesa", "Bearer sesamx", "Basic sesam", "Bearer sesam other", "Bearer é"],
)
def test_a_wrong_key_is_no_key(header):
    assert client().get("/v1/drop", headers={"Authorization": header.encode()}).status_code == 401


@pytest.mark.parametrize("header", ["Bearer sesam", "bearer sesam", "Bearer other"])
def test_any_of_the_keys_will_do(header):
    assert client().get("/v1/drop", headers={"Authorization": header}).status_code == 200


def test_without_keys_all_routes_are_open():
    assert client(keys=()).get("/metrics").status_code == 200


def test_a_websocket_wants_the_key_too():
    with pytest.raises(WebSocketDisconnect) as refused, client().websocket_connect("/v1/realtime"):
        pass
    assert refused.value.code == 1008
    with client().websocket_connect("/v1/realtime", headers=KEY) as websocket:
        assert websocket.receive_text() == "hello"


def test_the_route_gets_the_body_that_was_checked():
    body = json.dumps({"prompt": "ä" * 1000})
    assert client().post("/v1/completions", content=body, headers=KEY).json()["body"] == body


def test_a_body_over_the_bound_is_refused():
    answer = client(body_bytes=100).post("/v1/completions", content=b"x" * 101, headers=KEY)
    assert answer.status_code == 413
    assert answer.headers["Connection"] == "close"
    assert "100 bytes (body_bytes)" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("declared", "read"), [(150, 15), (400, 40), (401, 0), (10**12, 0), (None, 41)])
def test_what_is_too_large_is_read_to_its_end_only_if_that_is_near(declared, read):
    """A client that cannot send all of its body sees a broken connection instead of the refusal."""
    chunks = 0

    async def receive():
        nonlocal chunks
        chunks += 1
        return {"type": "http.request", "body": b"x" * 10, "more_body": declared is None or chunks * 10 < declared}

    headers = [] if declared is None else [(b"content-length", str(declared).encode())]
    assert asyncio.run(answer_of(receive, Limits(body_bytes=100), headers)) == 413
    assert chunks == read


def test_a_body_that_does_not_say_its_size_is_counted():
    answer = client(body_bytes=100).post("/v1/completions", content=(b"x" * 60 for _ in range(2)), headers=KEY)
    assert answer.status_code == 413


def test_a_request_over_a_bound_is_refused_with_its_entry():
    answer = client(n=2).post("/v1/completions", json={"n": 3}, headers=KEY)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"])
def test_whatever_is_read_as_json_is_checked(kind):
    answer = client(n=2).post("/v1/completions", content=b'{"n": 3}', headers=KEY | {"Content-Type": kind})
    assert answer.status_code == 400


def test_what_is_not_json_is_left_to_the_route():
    headers = KEY | {"Content-Type": "text/plain"}
    assert client().post("/v1/completions", content=b"{", headers=headers).status_code == 200


def test_while_the_server_ends_new_requests_are_told_to_come_again():
    answer = client(ending=Ending(started=True)).post("/v1/completions", json={}, headers=KEY)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert client(ending=Ending(started=True)).get("/metrics", headers=KEY).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"), [({}, 200), ({"n": 2}, 200), ({"n": 3}, 429), ({"prompt": ["a"] * 4}, 429), ({"n": 6}, 400)]
)
def test_a_request_takes_as_many_places_in_the_queue_as_it_wants_answers(body, status):
    admission = Admission(bound=5, under_way=3)
    answer = client(admission=admission).post("/v1/completions", json=body, headers=KEY)
    assert answer.status_code == status
    assert ("Retry-After" in answer.headers) == (status == 429)
    assert admission.under_way == 3


def test_a_place_is_free_again_when_the_route_fails():
    admission = Admission(bound=1)
    with pytest.raises(ZeroDivisionError), admission.place(1):
        1 / 0  # noqa: B018 - raises
    assert admission.under_way == 0


async def answer_of(receive, limits, headers=()):
    """The status that a guarded app answers with, given what the client sends."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [*headers], "query_string": b""}
    await Guard(PlainTextResponse("ok"), (), limits, Ending(), Admission())(scope, receive, send)
    return sent[0]["status"]


def test_a_body_that_does_not_come_is_not_waited_for():
    async def receive():
        await asyncio.sleep(60)

    assert asyncio.run(answer_of(receive, Limits(body_seconds=0.01))) == 408


def test_a_client_that_goes_away_while_sending_reaches_no_route():
    async def receive():
        return {"type": "http.disconnect"}

    assert asyncio.run(answer_of(receive, Limits())) == 400
