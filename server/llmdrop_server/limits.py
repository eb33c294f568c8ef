"""Bounds on what a request may ask for, where vLLM has none; each refusal names the bound."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmdrop_server import LIMITS_ENVIRONMENT
from llmdrop_vllm.errors import InputError

# Where a request says how to sample: at its top, or in /inference/v1/generate in here.
SAMPLING = "sampling_params"
# Keys under which requests name what the server should fetch.
FETCHED = frozenset(
    {"url", "image_url", "audio_url", "video_url", "file_url", "server_url", "images", "audio", "videos"}
)
MANY = ("n", "best_of")
BATCHES = ("prompt", "messages", "input")
SURROGATE = re.compile(rb"\\u[dD][89abAB-F]")


class RequestError(Exception):
    """A request that is over a bound or not JSON; `status` is the HTTP status, `param` the entry at fault."""

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param


class Limits(BaseModel):
    """The bounds. Tokens, `max_tokens` and log-probabilities have vLLM's own: --max-model-len and --max-logprobs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: int = Field(4 * 2**20, gt=0, description="request body")
    body_seconds: float = Field(30, gt=0, description="time to send the request body")
    depth: int = Field(64, gt=0, description="nesting of the request's JSON")
    n: int = Field(16, gt=0, description="answers per request: n, best_of, beams")
    prompts: int = Field(128, gt=0, description="prompts, conversations or items in one request")
    messages: int = Field(4096, gt=0, description="messages in one conversation")
    stop: int = Field(16, gt=0, description="stop strings, stop tokens or bad words")
    grammar_bytes: int = Field(16384, gt=0, description="regular expression or grammar")
    schema_bytes: int = Field(65536, gt=0, description="JSON schema, choices or structural tag")
    tools: int = Field(128, gt=0, description="tools in one request")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From a JSON object. Raises InputError naming a bound that does not exist or a bad value."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or LIMITS_ENVIRONMENT
            raise InputError(f"limit {where}: {first['msg']}; limits are {', '.join(cls.model_fields)}") from None

    def check_body(self, body: bytes, allowed_hosts: frozenset[str] = frozenset()) -> int:
        """How many answers a JSON body asks for. Raises RequestError where it is not JSON or over a bound."""
        request = self._parse(body) if body else None
        if not isinstance(request, dict):
            return 1  # no request of vLLM's is anything else: its own validation says so
        for entries in (request, request.get(SAMPLING)):
            if isinstance(entries, dict):
                self._check_sampling(entries)
        self._check_counts(request)
        self._check_structure(request)
        _check_fetched(request, allowed_hosts)
        return _answers(request)

    def _parse(self, body: bytes) -> Any:
        try:
            request = json.loads(body, parse_constant=_refuse_constant)
            if SURROGATE.search(body):
                json.dumps(request, ensure_ascii=False).encode()  # half a character cannot be tokenized or answered
        except RecursionError:
            raise RequestError(f"the JSON is nested too deeply; the bound is {self.depth} (depth)") from None
        except UnicodeEncodeError:
            raise RequestError("the JSON has half of a surrogate pair, which is no character") from None
        except ValueError as error:
            raise RequestError(f"the body is not JSON: {error}") from None
        if _deeper(request, self.depth):
            raise RequestError(f"the JSON is nested too deeply; the bound is {self.depth} (depth)")
        return request

    def _check_sampling(self, entries: Mapping[str, Any]) -> None:
        for key in (*MANY, "beam_width"):
            if (value := _number(entries.get(key))) > self.n:
                raise RequestError(f"{key} is {value:g}; the bound is {self.n} (n)", param=key)
        self._check_lengths(entries, "stop", "stop", "stop_sequences", "stop_token_ids", "bad_words")

    def _check_counts(self, request: Mapping[str, Any]) -> None:
        self._check_lengths(request, "tools", "tools")
        batches = (key for key in BATCHES if _is_batch(request.get(key)))
        self._check_lengths(request, "prompts", "items", "questions", "request_ids", *batches)
        messages = request.get("messages")
        for each in (messages, *messages) if isinstance(messages, list) else ():
            if isinstance(each, list) and len(each) > self.messages:
                told = f"a conversation has {len(each)} messages; the bound is {self.messages} (messages)"
                raise RequestError(told, param="messages")

    def _check_structure(self, request: Mapping[str, Any]) -> None:
        for key, value in _structures(request):
            name = "grammar_bytes" if key.endswith((".regex", ".grammar")) else "schema_bytes"
            size = len((value if isinstance(value, str) else json.dumps(value)).encode())
            if size > (bound := getattr(self, name)):
                raise RequestError(f"{key} has {size:,} bytes; the bound is {bound:,} ({name})", param=key)

    def _check_lengths(self, entries: Mapping[str, Any], name: str, *keys: str) -> None:
        """Of what stands under keys, by the bound of a name."""
        bound = getattr(self, name)
        for key in keys:
            value = entries.get(key)
            if isinstance(value, list | dict) and len(value) > bound:
                raise RequestError(f"{key} has {len(value):,} entries; the bound is {bound} ({name})", param=key)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _deeper(value: Any, depth: int) -> bool:
    """Whether JSON is nested more deeply; level by level, for recursion is what this protects from."""
    level = [value]
    for _ in range(depth):
        parents = [each for each in level if isinstance(each, dict | list)]
        level = [child for each in parents for child in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _is_batch(value: Any) -> bool:
    """Several prompts or conversations; a prompt may also be one list of token ids, a conversation one of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | list)


def _answers(request: Mapping[str, Any]) -> int:
    prompts = [len(value) for key in BATCHES if isinstance(value := request.get(key), list) and _is_batch(value)]
    return max(prompts, default=1) * max(1, *(int(_number(request.get(key))) for key in MANY))


def _number(value: Any) -> float:
    """A number, or text that vLLM's validation would take for one; 0 for anything else."""
    try:
        number = float(value) if isinstance(value, int | float | str) else 0.0
    except OverflowError:
        return math.inf
    except ValueError:
        return 0.0
    return 0.0 if math.isnan(number) else number


def _structures(request: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that an engine would compile into an automaton."""
    for entries in (request, request.get(SAMPLING)):
        if isinstance(entries, dict) and isinstance(structures := entries.get("structured_outputs"), dict):
            yield from ((f"structured_outputs.{key}", value) for key, value in structures.items() if value)
    for key in ("response_format", "text", "tools"):
        if value := request.get(key):
            yield key, value


def _check_fetched(request: Any, allowed_hosts: frozenset[str]) -> None:
    for key, url in _fetched(request):
        host = _host(url)
        if not url.startswith("data:") and host not in allowed_hosts:
            raise RequestError(
                f"{key} names {host or 'no host'}, and this server fetches nothing from there; send the content as a "
                "data: URL, or start the server with --allowed-media-domains",
                param=key,
            )


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # half an IPv6 address
        return None


def _fetched(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        if key in FETCHED and "://" in value:
            yield key, value
    elif isinstance(value, list):
        for each in value:
            yield from _fetched(each, key)
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _fetched(each, name)
