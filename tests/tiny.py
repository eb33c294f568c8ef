"""Tiny checkpoints that any machine rebuilds bit for bit, and the golden cases that were computed on them."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from llmdrop_vllm import DropMask

GOLDEN = Path(__file__).parent / "golden"
PARITY_CASES = ("llama_attn_ints", "llama_first_layer", "mistral_joint_bools")

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def golden(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{case}.json").read_text())


def tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The generator that the golden cases were computed with: seeded by the tensor's name."""
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if name.endswith("norm.weight"):
        values = 1 + 0.1 * values
    elif "embed_tokens" not in name:
        values = values / math.sqrt(shape[-1])
    return values.astype(np.float32)


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of an undropped Llama or Mistral checkpoint."""
    hidden, vocab, intermediate = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    found = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    for index in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return found


def write_checkpoint(
    directory: Path, config: dict[str, Any], *, seed: int = 0, strip: bool = False, without: tuple[str, ...] = ()
) -> Path:
    """Write config.json and model.safetensors; `strip` leaves out what the config's mask drops, `without` by prefix."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    gone = list(without)
    if strip:
        mask = DropMask.from_config(config)
        for indices, modules in (
            (mask.attention, ("self_attn", "input_layernorm")),
            (mask.mlp, ("mlp", "post_attention_layernorm")),
        ):
            gone += [f"model.layers.{index}.{module}." for index in indices for module in modules]
    names = {name: shape for name, shape in shapes(config).items() if not name.startswith(tuple(gone))}
    tensors = {name: tensor(name, shape, seed) for name, shape in names.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
