"""Answers that are errors, in the form of OpenAI and vLLM."""

from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import JSONResponse

from llmdrop_server.schemas import Error, ErrorInfo

# Where OpenAI's name is not HTTP's.
KINDS = {401: "AuthenticationError", 413: "RequestTooLargeError", 429: "RateLimitError"}
RETRY_AFTER_S = 2
# What was not read of a body would be taken for the connection's next request.
HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},
    413: {"Connection": "close"},
    429: {"Retry-After": str(RETRY_AFTER_S)},
    503: {"Connection": "close", "Retry-After": str(RETRY_AFTER_S)},
}


def error_response(
    message: str, status: int, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An answer with the name and the headers that its status calls for."""
    kind = KINDS.get(status) or HTTPStatus(status).phrase.replace(" ", "") + "Error"
    error = Error(error=ErrorInfo(message=message, type=kind, param=param, code=status))
    return JSONResponse(error.model_dump(), status, {**HEADERS.get(status, {}), **(headers or {})})
