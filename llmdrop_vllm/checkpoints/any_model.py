"""ModelOpt's exports of models whose layers may differ ("AnyModel", from Puzzle), as the models that they were made of.

vLLM 0.32 builds none with layers of different widths. Where what is left is of one width, they are masks.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from llmdrop_vllm.errors import CheckpointError

ARCHITECTURE, BASE = "AnyModel", "base_architecture"
# What a mask says of each kind of subblock.
PARTS = {"attention": "attention", "mla": "attention", "mamba": "attention", "ffn": "ffn", "moe": "ffn"}
# Widths of a subblock, and the config's entry for all layers.
WIDTHS = {
    "num_query_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "num_key_value_heads": ("num_key_value_heads",),
    "intermediate_size": ("intermediate_size",),
    "expert_intermediate_size": ("moe_intermediate_size", "intermediate_size"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok",),
}


def as_base(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries under the base architecture, its mask in the dialect nemotron-nas; any other config's as they are.

    Raises CheckpointError for layers of different widths, naming the first that is found.
    """
    if entries.get("architectures") != [ARCHITECTURE]:
        return entries
    if not isinstance(base := entries.get(BASE), str):
        raise CheckpointError(f"{BASE} is {base!r}; expected the architecture that {ARCHITECTURE} was made of")
    renamed = {key: value for key, value in entries.items() if key != BASE} | {"architectures": [base]}
    if (blocks := entries.get("block_configs")) is None:
        return renamed
    masked: list[dict[str, Any]] = []
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for layer, block in enumerate(blocks):
        gone = set()
        for where, settings in _subblocks(block, f"block_configs[{layer}]"):
            if settings.get("no_op"):
                gone.add(PARTS[settings["kind"]])
                continue
            _check_width(where, settings, entries)
            kept_where, kept = first.setdefault(settings["kind"], (where, settings))
            if key := min((key for key in settings if settings[key] != kept.get(key)), default=None):
                raise CheckpointError(
                    f"{where}.{key} is {settings[key]!r}, {kept_where}.{key} is {kept.get(key)!r}; "
                    f"layers that differ are not built by vLLM as {base}"
                )
        masked.append({part: {"no_op": part in gone} for part in ("attention", "ffn")})
    return renamed | {"block_configs": masked}


def _subblocks(block: Any, where: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """Each with its place, in both forms that exports have had."""
    if not isinstance(block, Mapping):
        raise CheckpointError(f"{where} is {block!r}; expected an object")
    if (listed := block.get("subblock_configs")) is None:
        listed = [{"kind": part, **(block.get(part) or {})} for part in ("attention", "ffn")]
    for number, settings in enumerate(listed):
        kind = settings.get("kind") if isinstance(settings, Mapping) else settings
        if kind not in PARTS:
            raise CheckpointError(f"{where} has a subblock of kind {kind!r}; expected one of {', '.join(PARTS)}")
        yield f"{where}.subblock_configs[{number}]", dict(settings)


def _check_width(where: str, settings: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    for key, names in WIDTHS.items():
        said = next((entries[name] for name in names if entries.get(name) is not None), None)
        if None not in (found := settings.get(key), said) and found != said:
            raise CheckpointError(f"{where}.{key} is {found!r}, the config's is {said!r}; vLLM builds one width only")
