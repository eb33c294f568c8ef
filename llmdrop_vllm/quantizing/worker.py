"""What runs in llm-compressor's environment: `python -m llmdrop_vllm.quantizing.worker JOB.json`."""

import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPORT = "llmdrop_quantized.json"
# Routers of mixtures choose by small differences, and are small.
UNTOUCHED = ("lm_head", r"re:.*\.(gate|router|shared_expert_gate)$")
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


@dataclass(frozen=True)
class Job:
    """`preset` is llm-compressor's scheme, `group_size` of its weights where it is not the preset's; `tokens` are
    sequences of token ids to round for, empty for rounding to the nearest.
    """

    model: str
    out: str
    preset: str
    group_size: int | None
    tokens: list[list[int]]


def main(path: Path) -> None:
    """Quantize, and write what came out, with a report beside the job."""
    job = Job(**json.loads(path.read_text()))

    from llmcompressor import oneshot

    from llmdrop_vllm import hf

    model = hf.from_pretrained(job.model, dtype="auto")
    oneshot(model=model, recipe=_recipe(job), **_data(job))
    model.save_pretrained(job.out, save_compressed=True)
    quantized = [name for name, module in model.named_modules() if getattr(module, "quantization_scheme", None)]
    report = {"modules": len(quantized), "versions": {name: version(name) for name in PACKAGES}}
    path.with_name(REPORT).write_text(json.dumps(report))


def _recipe(job: Job) -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    scheme = preset_name_to_scheme(job.preset, ["Linear"])
    if job.group_size is not None:
        scheme.weights.group_size = job.group_size
    modifier = GPTQModifier if job.tokens else QuantizationModifier
    return modifier(config_groups={"group_0": scheme}, ignore=list(UNTOUCHED))


def _data(job: Job) -> dict[str, Any]:
    if not job.tokens:
        return {}
    from datasets import Dataset

    rows = {"input_ids": job.tokens, "attention_mask": [[1] * len(each) for each in job.tokens]}
    sizes = {"num_calibration_samples": len(job.tokens), "max_seq_length": max(map(len, job.tokens))}
    return {"dataset": Dataset.from_dict(rows), **sizes, "shuffle_calibration_samples": False}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
