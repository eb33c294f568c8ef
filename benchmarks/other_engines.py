"""The forms that engines without this package read, as GGUF in llama.cpp: does it compute what the masked model does?

    pip install llama-cpp-python      # built from source: 20 minutes on two cores
    python benchmarks/other_engines.py --converter llama.cpp/convert_hf_to_gguf.py     # in its sdist: vendor/llama.cpp

Its converter takes Nemotron-NAS checkpoints with the vocabulary of Llama 3 only, by its size; SmolLM2's is written here
as that of any other model with such a tokenizer.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.fetching.fetch import resolve
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint

TEXT = (
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\n"
    "The capital of France is Paris, and the capital of Italy is Rome."
)
WITH_ANY_VOCABULARY = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion.deci import DeciModel
DeciModel.set_vocab = lambda self: self._set_vocab_gpt2()
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Form:
    """A way to write a mask, and the options that it takes."""

    name: str
    mask: DropMask
    options: dict[str, Any]


# llama.cpp ignores the attention of layers without an MLP, so in the second form no MLP goes alone.
FORMS = (
    Form("--portable", DropMask(30, (7, 6, 29, 12), (12, 28)), {"portable": True}),
    Form("--dialect nemotron-nas", DropMask(30, (7, 6, 29, 12), (12,)), {"dialect": "nemotron-nas"}),
    Form("--renumber", DropMask(30, (28, 12), (12, 28)), {"renumber": True}),
)


def converted(model: Path, out: Path, converter: Path) -> Path:
    """The checkpoint as GGUF in float32."""
    command = [sys.executable, "-c", WITH_ANY_VOCABULARY, str(converter.parent), str(converter)]
    environment = os.environ | {"PYTHONPATH": str(converter.parent / "gguf-py")}
    subprocess.run([*command, str(model), "--outfile", str(out), "--outtype", "f32"], check=True, env=environment)
    return out


def compare(
    form: Form, checkpoint: Checkpoint, token_ids: list[int], converter: Path, directory: Path
) -> dict[str, Any]:
    """How far llama.cpp's log-probabilities are from those of the masked model in Transformers."""
    import torch
    from llama_cpp import Llama

    from llmdrop_vllm import hf

    model = hf.load(checkpoint.under(form.mask), dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    write_checkpoint(plan_surgery(checkpoint, form.mask, **form.options), directory / "model")
    file = converted(directory / "model", directory / "model.gguf", converter)
    engine = Llama(str(file), n_ctx=512, logits_all=True, type_k=0, type_v=0, verbose=False)
    engine.eval(token_ids)
    found = torch.tensor(engine.scores[: len(token_ids)]).log_softmax(-1)
    return {
        "form": form.name,
        "mask": form.mask.summary(),
        "tokens": len(token_ids),
        "max_logprob_difference": (found - expected).abs().max().item(),
        "same_next_token": (found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        "bytes": file.stat().st_size,
    }


def main(argv: list[str] | None = None) -> None:
    """Compare each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--converter", type=Path, required=True, metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py"
    )
    record.add_out(parser)
    args = parser.parse_args(argv)
    if not args.converter.is_file():
        parser.error(f"{args.converter} is not a file")
    import llama_cpp
    from tokenizers import Tokenizer

    checkpoint = Checkpoint.open(resolve("smollm2"))
    token_ids = Tokenizer.from_file(str(checkpoint.directory / "tokenizer.json")).encode(TEXT).ids
    lines = []
    for form in FORMS:
        with tempfile.TemporaryDirectory() as directory:
            lines.append(compare(form, checkpoint, token_ids, args.converter.resolve(), Path(directory)))
    found = {"model": "smollm2", "llama_cpp_python": llama_cpp.__version__, "forms": lines}
    record.finish("other_engines", found, args.out)


if __name__ == "__main__":
    main()
