"""The routes beside vLLM's: what is dropped, the KV cache now, health, and the page."""

import json
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope
from vllm.entrypoints.openai.models.api_router import show_available_models

from llmdrop_server.errors import error_response
from llmdrop_server.schemas import KV, Drop, Error, ModelList, Status
from llmdrop_server.statistics import kv_now

STATIC = Path(__file__).with_name("static")
ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?|https?://\[[0-9A-Fa-f:]+\](:\d{1,5})?")
UNAVAILABLE: dict[int | str, dict[str, Any]] = {503: {"model": Status}}

router = APIRouter(tags=["llmdrop"])


@router.get("/v1/drop")
async def drop(request: Request) -> Drop:
    """What the model goes without, and what that saves."""
    found: Drop = request.app.state.llmdrop_report
    return found


@router.get("/v1/drop/kv", responses={404: {"model": Error}}, response_model=KV)
async def drop_kv(request: Request) -> KV | JSONResponse:
    """The KV cache in use, as of the engine's last step."""
    found = kv_now(request.app.state.vllm_config.cache_config)
    return error_response("statistics are off (--disable-log-stats)", 404) if found is None else found


@router.get("/v1/models")
async def models(request: Request) -> ModelList:
    """vLLM's list, with the mask in each card; an adapter goes without what its base model goes without."""
    listed = json.loads((await show_available_models(request)).body)
    found: Drop = request.app.state.llmdrop_report
    cards = [{**card, "drop": found.mask, "drop_summary": found.summary} for card in listed["data"]]
    return ModelList.model_validate({**listed, "data": cards})


@router.get("/health", responses=UNAVAILABLE)
async def health(request: Request, response: Response) -> Status:
    """Whether the engine answers; for liveness probes."""
    return _answer(await request.app.state.llmdrop_probe.health(), response)


@router.get("/ready", responses=UNAVAILABLE)
async def ready(request: Request, response: Response) -> Status:
    """Whether a request would be served now; for readiness probes."""
    return _answer(await request.app.state.llmdrop_probe.readiness(), response)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page(compare: str = "") -> Response:
    """The page. It may connect to the server that `compare` names, if that is an origin, and to nothing else."""
    origin = compare.rstrip("/")
    return FileResponse(STATIC / "index.html", headers=security_headers(origin if ORIGIN.fullmatch(origin) else ""))


class PageFiles(StaticFiles):
    """The page's own files, which a browser asks for again after an upgrade."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """As Starlette's, with the page's headers."""
        response = await super().get_response(path, scope)
        response.headers.update(security_headers())
        return response


def security_headers(compare: str = "") -> dict[str, str]:
    """Nothing but the page's own files runs, shows or is asked; nobody frames it."""
    asked = f"'self' {compare}".rstrip()
    policy = (
        f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src {asked}; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _answer(status: Status, response: Response) -> Status:
    response.status_code = 200 if status.status == "ok" else 503
    return status
