"""A GGUF file as an ordinary checkpoint in bfloat16: read and de-quantized by Transformers."""

from pathlib import Path
from typing import Any

import torch

from llmdrop_vllm.errors import CheckpointError, refusing

MAGIC = b"GGUF"
ADD_BOS, TOKENIZER = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.model"


def check_gguf(path: Path) -> None:
    """Raise CheckpointError for what is no GGUF file."""
    with refusing(f"{path} cannot be read", CheckpointError), path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise CheckpointError(f"{path} begins with {magic!r}; a GGUF file begins with {MAGIC!r}")


def convert(path: Path, out: Path) -> None:
    """Write config, weights, generation config, tokenizer and chat template into the directory `out`.

    Raises CheckpointError for a file that Transformers cannot read.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        fields = GGUFReader(path).fields
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        plain = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(path.parent, **plain, **source)
    except Exception as error:  # whatever its reader makes of an unknown architecture or a file that ends early
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be converted: {reason}") from error
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if _begins_with_bos(fields) and tokenizer.bos_token is not None and not adds_bos:
        # Transformers does not take it over from the file; Gemma 3 without it repeats one word.
        tokenizer.add_bos_token = True
    model.config._name_or_path = ""  # else the general.name of the file
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.glob("*.safetensors"):  # the library lets nobody else read what it writes
        path.chmod(0o644)


def _begins_with_bos(fields: dict[str, Any]) -> bool:
    """Whether the model has seen a token for the beginning before every text; SentencePiece's do unless they say."""
    if (said := fields.get(ADD_BOS)) is not None:
        return bool(said.contents())
    return TOKENIZER in fields and fields[TOKENIZER].contents() == "llama"
