"""The vLLM endpoint plugin `llmdrop`: it adds our routes and bounds to vLLM's own server, in `vllm serve` too."""

import asyncio
import os
from argparse import Namespace
from typing import ClassVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from llmdrop_server import LIMITS_ENVIRONMENT, routes, statistics
from llmdrop_server.errors import error_response
from llmdrop_server.guard import OPEN_PREFIX, Admission, Guard
from llmdrop_server.health import Ending, Probe
from llmdrop_server.limits import Limits
from llmdrop_server.report import report

logger = init_logger("vllm.llmdrop")


class LlmdropEndpoints:
    """See vLLM's EndpointPlugin."""

    name = "llmdrop"
    required_tasks = ("generate",)
    ending: ClassVar[Ending] = Ending()

    def attach_router(self, app: FastAPI) -> None:
        """Add routes, middleware and error handlers; vLLM's own come after them and do not replace them."""
        args = app.state.args
        app.include_router(routes.router)
        app.mount(OPEN_PREFIX.rstrip("/"), routes.PageFiles(directory=routes.STATIC), name="llmdrop")
        app.add_middleware(
            Guard,
            keys=[key for key in (args.api_key or [envs.VLLM_API_KEY]) if key],
            limits=Limits.parse(os.environ.get(LIMITS_ENVIRONMENT, "{}")),
            ending=self.ending,
            admission=Admission(getattr(args, "max_num_queued_reqs", None)),
            allowed_hosts=frozenset(getattr(args, "allowed_media_domains", None) or ()),
        )
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(EngineDeadError, _engine_dead)
        for overflow in (QueueOverflowError, MaxQueuedTokensError):
            app.add_exception_handler(overflow, _queue_full)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Called once the engine has started. Counting a large model's parameters takes a second or two."""
        assert engine_client is not None, "vLLM starts no engine for a task that this plugin is not for"
        self.ending.watch(engine_client)
        state.llmdrop_follower = asyncio.create_task(self.ending.follow(engine_client, state))
        state.llmdrop_probe = Probe(engine_client, self.ending)
        state.llmdrop_report = await asyncio.to_thread(report, engine_client.vllm_config)
        statistics.publish(state.llmdrop_report)
        logger.info("llmdrop: page at /, mask at /v1/drop; %s", state.llmdrop_report.summary)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What no route answers, in the form that OpenAI's clients read."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(message, error.status_code, headers=error.headers)


async def _engine_dead(_request: Request, _error: Exception) -> JSONResponse:
    """vLLM would answer 500 and end at once; within the seconds until its watchdog looks, clients are told to go on."""
    return error_response("the engine has died; the server is about to end", 503)


async def _queue_full(_request: Request, _error: Exception) -> JSONResponse:
    """vLLM would answer 503, which clients take for a failure of the server."""
    return error_response("the queue is full (--max-num-queued-reqs); try again later", 429)
