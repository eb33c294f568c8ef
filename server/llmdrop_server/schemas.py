"""What the routes of a dropped model answer, as it stands in the OpenAPI schema."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmdrop_vllm.data.comparison import Comparison
from llmdrop_vllm.masks.mask import DropMask

# The examples in the schema are of one server, with the embedded model.
MASK = {"num_hidden_layers": 12, "attention": [11, 7, 8, 10], "mlp": [], "windows": []}
SUMMARY = "attention dropped in 4 of 12 layers [7-8,10-11], MLP in 0"
NAMES = {"model": "embedded", "architecture": "LlamaForCausalLM", "family": "llama"}
CACHE = {"kv_dtype": "bfloat16", "kv_layout": "KV cache stored as 8 layers, without padding", "max_model_len": 1024}
HEALING = "4 layers healed on 60,000 tokens of answers, leaving 60% to 80% of each one's error"
BLOCKS = {"blocks": 4096, "blocks_used": 96, "blocks_free": 4000, "block_tokens": 128, "usage": 0.0234}
REQUESTS = {"prefix_hit_rate": 0.61, "requests_running": 8, "requests_waiting": 0, "preemptions": 0}
CARD = {"id": "embedded", "object": "model", "created": 1790000000, "owned_by": "vllm", "max_model_len": 1024}


def _example(**entries: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [entries]})


class Answer(BaseModel):
    """Strict: what is not declared here does not leave the server."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Size(Answer):
    """One form of the model, with the mask or without. None: not known for this architecture.

    `kv_bytes_per_token` is as vLLM stores it, padding included. `kv_tokens` is what the KV cache of this server holds,
    and would hold with the model in full; `sequences` how many requests of `max_model_len` tokens that is.
    """

    parameters: int | None
    attention_layers: int
    kv_bytes_per_token: int | None
    kv_tokens: int
    sequences: float


class Importance(Answer):
    """1 - cosine similarity of the residual stream before and after (arXiv 2406.15786), per layer; None: already gone
    when the model was scored.
    """

    attention: tuple[float | None, ...]
    mlp: tuple[float | None, ...]
    block: tuple[float, ...]


class Scores(Answer):
    """Why these sublayers: `calibration` names the text that the importance was measured on."""

    importance: Importance
    calibration: str | None


class Drop(Answer):
    """What this server's model goes without, what that saves, how what is left was healed, and what `llmdrop compare`
    recorded of its answers.
    """

    model_config = _example(
        **NAMES,
        summary=SUMMARY,
        mask=MASK,
        **CACHE,
        full=dict(zip(Size.model_fields, (5116224, 12, 3072, 349440, 341.25), strict=True)),
        served=dict(zip(Size.model_fields, (4722240, 8, 2048, 524288, 512.0), strict=True)),
        scores=None,
        healing=HEALING,
        comparison=None,
    )

    model: str
    architecture: str
    family: str | None
    summary: str
    mask: DropMask
    kv_dtype: str
    kv_layout: str
    max_model_len: int
    full: Size
    served: Size
    scores: Scores | None
    healing: str | None
    comparison: Comparison | None


class KV(Answer):
    """The KV cache in use. `prefix_hit_rate` is a share of all prompt tokens since the start; None before the first."""

    model_config = _example(**BLOCKS, **REQUESTS)

    blocks: int
    blocks_used: int
    blocks_free: int
    block_tokens: int
    usage: float = Field(ge=0, le=1)
    prefix_hit_rate: float | None
    requests_running: int
    requests_waiting: int
    preemptions: int


class Status(Answer):
    """`reason` says what is wrong where `status` is not ok."""

    model_config = _example(status="ok", reason=None)

    status: Literal["ok", "unavailable"]
    reason: str | None = None


class ModelCard(BaseModel):
    """vLLM's card of a model, with what it goes without."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str = "model"
    drop: DropMask | None
    drop_summary: str


class ModelList(BaseModel):
    """The models of this server, adapters included."""

    model_config = _example(object="list", data=[{**CARD, "drop": MASK, "drop_summary": SUMMARY}])

    object: str = "list"
    data: list[ModelCard]


class ErrorInfo(BaseModel):
    """As OpenAI's clients expect it."""

    message: str
    type: str
    param: str | None = None
    code: int


class Error(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorInfo
