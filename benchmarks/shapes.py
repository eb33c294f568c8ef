"""Named shapes: config.json entries of well-known models, the masks published for them, and all their tensors.

Real models are those that `llmdrop fetch` has a short name for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from llmdrop_vllm import DropMask, InputError, MaskError
from llmdrop_vllm.architectures.families import family_of
from llmdrop_vllm.architectures.family import Family
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.fetching.fetch import fetch
from llmdrop_vllm.fetching.wheels import MODELS
from llmdrop_vllm.kv_cache.kinds import layer_kinds
from llmdrop_vllm.kv_cache.layout import KVLayout, kv_layout

Kind = Literal["attention", "mlp", "block"]


@dataclass(frozen=True)
class Shape:
    """A model, with its checkpoint if it is a `real` one.

    `published` holds rank-ordered layers per kind of sublayer, the first n drop n.
    """

    name: str
    config: Mapping[str, Any]
    published: Mapping[Kind, tuple[int, ...]] = field(default_factory=dict)
    real: Checkpoint | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def family(self) -> Family:
        """The row of the family table."""
        family = family_of(self.config["architectures"][0])
        assert family is not None, f"{self.name} has an architecture without a row in the family table"
        return family

    def layout(self, mask: DropMask) -> KVLayout:
        """How vLLM stores the KV cache of the attention that a mask keeps."""
        kinds = layer_kinds(self.config)
        return kv_layout([kinds[layer] for layer in mask.kept_attention])

    def with_layers(self, num_layers: int) -> "Shape":
        """The same layers at another depth, for which no masks are published."""
        if num_layers < 1:
            raise InputError(f"--layers {num_layers}: expected a positive number of layers")
        config = {**self.config, "num_hidden_layers": num_layers}
        if kinds := config.get("layer_types"):
            config["layer_types"] = [kinds[layer % len(kinds)] for layer in range(num_layers)]
        return replace(self, config=config, published={})

    def mask(self, kind: Kind, count: int) -> DropMask:
        """Drop `count` attention sublayers, MLPs or blocks: as published, then from the last layer but one upwards."""
        if not 0 < count < self.num_layers:
            raise MaskError(
                f"{kind} {count} does not fit {self.name}: expected 1 to {self.num_layers - 1} of {self.num_layers}"
            )
        ranked = list(self.published.get(kind, ()))
        deepest_first = [*range(self.num_layers - 2, -1, -1), self.num_layers - 1]
        layers = tuple((ranked + [layer for layer in deepest_first if layer not in ranked])[:count])
        return DropMask(
            self.num_layers,
            attention=() if kind == "mlp" else layers,
            mlp=() if kind == "attention" else layers,
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the checkpoint's tensors."""
        if self.real is not None:
            return {name: each.shape for name, each in self.real.tensors.items()}
        hidden, vocab = self.config["hidden_size"], self.config["vocab_size"]
        found = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
        if not self.config["tie_word_embeddings"]:
            found["lm_head.weight"] = (vocab, hidden)
        layer = _layer_tensors(self.config, self.family)
        return found | {
            f"model.layers.{index}.{name}.weight": shape
            for index in range(self.num_layers)
            for name, shape in layer.items()
        }

    @property
    def num_parameters(self) -> int:
        """As model cards count them."""
        return sum(math.prod(shape) for shape in self.tensors().values())


def _layer_tensors(config: Mapping[str, Any], family: Family) -> dict[str, tuple[int, ...]]:
    hidden, head_dim, wide = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    found = dict.fromkeys((*family.attention.norms, *family.mlp.norms), (hidden,))
    attention = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)}
    if config["model_type"] == "qwen3":
        attention |= {"q_norm": (head_dim,), "k_norm": (head_dim,)}
    found |= {f"{family.attention.module}.{name}": shape for name, shape in attention.items()}
    gate_up_down = ((wide, hidden), (wide, hidden), (hidden, wide))
    if experts := config.get("num_local_experts"):
        found[f"{family.mlp.module}.gate"] = (experts, hidden)
        for expert in range(experts):
            names = (f"{family.mlp.module}.experts.{expert}.{name}" for name in ("w1", "w3", "w2"))
            found |= dict(zip(names, gate_up_down, strict=True))
        return found
    names = (f"{family.mlp.module}.{name}_proj" for name in ("gate", "up", "down"))
    return found | dict(zip(names, gate_up_down, strict=True))


def _config(
    model: str,
    layers: int,
    hidden: int,
    wide: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    head_dim: int = 0,
    **more: Any,
) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "architectures": [f"{model}ForCausalLM"],
            "model_type": model.lower(),
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": wide,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim or hidden // heads,
            "vocab_size": vocab,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            # Longer than what some were trained for: every workload fits, and random weights forget nothing.
            "max_position_embeddings": 32768,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | more
    )


_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "layer_types": ["sliding_attention", "full_attention"] * 21,
}

SHAPES = {
    shape.name: shape
    for shape in (
        # Fast enough for 2 cores, and too large for their caches: 226 MB of float32 weights in the layers.
        Shape("cpu-small", _config("Llama", 8, 768, 2048, 12, 12, 4096)),
        Shape("smoke", _config("Llama", 4, 64, 256, 2, 2, 256)),
        Shape("llama-2-7b", _config("Llama", 32, 4096, 11008, 32, 32, 32000)),
        Shape(
            "llama-2-13b",
            _config("Llama", 40, 5120, 13824, 40, 40, 32000),
            {
                "attention": (33, 32, 35, 30, 34, 31, 29, 27),
                "mlp": (31, 33, 32, 34, 30, 29, 35, 28),
                "block": (33, 32, 31, 34, 30, 35, 29, 28),
            },
        ),
        Shape(
            "llama-2-70b",
            _config("Llama", 80, 8192, 28672, 64, 8, 32000),
            # Published without an order.
            {"attention": (22, 30, 32, 36, 43, *range(45, 80))},
        ),
        Shape("llama-3-8b", _config("Llama", 32, 4096, 14336, 32, 8, 128256, rope_theta=500000.0)),
        Shape(
            "llama-3-70b",
            _config("Llama", 80, 8192, 28672, 64, 8, 128256, rope_theta=500000.0),
            # Those of Nemotron-Super-49B, which was cut from this model.
            {"attention": (6, 7, 11, *range(42, 52), *range(53, 71))},
        ),
        Shape(
            "mistral-7b",
            # The window of v0.1 is left out, as v0.2 did: no workload here would tell.
            _config("Mistral", 32, 4096, 14336, 32, 8, 32000, sliding_window=None),
            {
                "attention": (25, 26, 24, 22, 27, 28, 23, 21),
                "mlp": (26, 27, 25, 24, 23, 22, 29, 28),
                "block": (26, 25, 24, 27, 23, 22, 28, 21),
            },
        ),
        Shape("qwen3-8b", _config("Qwen3", 36, 4096, 12288, 32, 8, 151936, 128)),
        Shape("qwen3-32b", _config("Qwen3", 64, 5120, 25600, 64, 8, 151936, 128)),
        Shape("gemma-2-9b", _config("Gemma2", 42, 3584, 14336, 16, 8, 256000, 256, **_GEMMA)),
        Shape(
            "mixtral-8x7b",
            _config("Mixtral", 32, 4096, 14336, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2),
        ),
    )
}


def find(name: str, num_layers: int | None = None) -> Shape:
    """The shape of that name, at another depth where one is given; a real model is fetched, and has its own depth.

    Raises InputError for what does not exist.
    """
    if name in MODELS and num_layers is None:
        return _real(name)
    if name not in SHAPES:
        raise InputError(f"unknown shape {name!r}; known: {', '.join([*SHAPES, *MODELS])}")
    shape = SHAPES[name]
    return shape if num_layers in (None, shape.num_layers) else shape.with_layers(num_layers)


def _real(name: str) -> Shape:
    checkpoint = Checkpoint.open(fetch(name))
    config = checkpoint.config
    heads = config["num_attention_heads"]
    told = {"head_dim": config["hidden_size"] // heads, "num_key_value_heads": heads} | config
    return Shape(name, told, real=checkpoint)
