"""Figures from and for Prometheus: what vLLM counts, read back, and what is dropped, as gauges beside it."""

from collections import defaultdict

from prometheus_client import Gauge
from vllm.config import CacheConfig
from vllm.v1.metrics.prometheus import get_prometheus_registry

from llmdrop_server.schemas import KV, Drop

USAGE, RUNNING, WAITING = "vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting"
QUERIES, HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
PREEMPTIONS = "vllm:num_preemptions_total"


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"llmdrop_{name}", text, labels, multiprocess_mode="mostrecent")


DROPPED = _gauge("dropped_sublayers", "Sublayers that the model goes without.", "kind")
PARAMETERS = _gauge("parameters", "Parameters of the model, in full and as served.", "form")
KV_BYTES = _gauge("kv_bytes_per_token", "Bytes of KV cache that one token takes, padding included.", "form")
KV_TOKENS = _gauge("kv_tokens", "Tokens that this server's KV cache holds, in full and as served.", "form")
# Always 1: what a dashboard joins to any other figure of the same server, to tell masks apart.
MASK = _gauge("mask_info", "The model as vLLM's own figures name it, and its mask in words.", "model_name", "mask")


def publish(drop: Drop) -> None:
    """Set the `llmdrop_*` gauges."""
    MASK.labels(drop.model, drop.mask.summary()).set(1)
    for kind in ("attention", "mlp"):
        DROPPED.labels(kind).set(len(getattr(drop.mask, kind)))
    for form, size in (("full", drop.full), ("served", drop.served)):
        figures = ((PARAMETERS, size.parameters), (KV_BYTES, size.kv_bytes_per_token), (KV_TOKENS, size.kv_tokens))
        for gauge, figure in figures:
            if figure is not None:
                gauge.labels(form).set(figure)


def kv_now(cache: CacheConfig) -> KV | None:
    """The KV cache in use, as of the engine's last step; None where vLLM keeps no statistics."""
    found = _samples()
    if not found[USAGE]:
        return None
    # One value per engine replica; vLLM counts the blocks of all of them, and keeps one of each for itself.
    usage = sum(found[USAGE]) / len(found[USAGE])
    blocks = (cache.num_gpu_blocks or 0) - len(found[USAGE])
    used = round(usage * blocks)
    queries = sum(found[QUERIES])
    return KV(
        blocks=blocks,
        blocks_used=used,
        blocks_free=blocks - used,
        block_tokens=cache.block_size,
        usage=usage,
        prefix_hit_rate=sum(found[HITS]) / queries if queries else None,
        requests_running=int(sum(found[RUNNING])),
        requests_waiting=int(sum(found[WAITING])),
        preemptions=int(sum(found[PREEMPTIONS])),
    )


def _samples() -> dict[str, list[float]]:
    found = defaultdict[str, list[float]](list)
    for metric in get_prometheus_registry().collect():
        for sample in metric.samples:
            found[sample.name].append(sample.value)
    return found
