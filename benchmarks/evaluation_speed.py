"""lm-eval tasks through vLLM, as `llmdrop evaluate` runs them, against lm-eval's own Transformers backend.

    python benchmarks/evaluation_speed.py [--rounds 3]

Both evaluate the embedded model under one mask, in turns in one process; engines and models are loaded before the clock
starts. Tokens are those of all requests, prompts and answers, counted once and alike for both.
"""

import argparse
import time
from statistics import median
from typing import Any

from benchmarks.record import add_out, finish
from benchmarks.servers import MASK
from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli.values import count, layers
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.evaluation.engine import EngineSettings, running
from llmdrop_vllm.evaluation.harness import Harness, find_tasks

TASKS = ("llmdrop_docstring", "llmdrop_name")
BATCHES = (1, 32)


def timed(harness: Harness, model: Any) -> tuple[float, dict[str, float]]:
    """Seconds, and the score of each task."""
    start = time.perf_counter()
    scores, _ = harness.run(model)
    return time.perf_counter() - start, {score.task: score.value for score in scores}


def count_tokens(harness: Harness, tokenizer: Any) -> int:
    """Of every request's prompt and answer."""
    total = 0
    for task in harness.manager.load(list(harness.tasks))["tasks"].values():
        for row in task.test_docs():
            answers = task.doc_to_choice(row) if task.OUTPUT_TYPE == "multiple_choice" else [task.doc_to_target(row)]
            total += sum(len(tokenizer(task.doc_to_text(row) + answer)["input_ids"]) for answer in answers)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=count, default=3)
    add_out(parser)
    args = parser.parse_args()
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    checkpoint = Checkpoint.open(MODEL)
    mask = DropMask(checkpoint.mask.num_hidden_layers, layers(MASK))
    harness = find_tasks(TASKS)
    model, tokenizer = hf.load(checkpoint.under(mask), dtype="float32"), AutoTokenizer.from_pretrained(MODEL)
    tokens = count_tokens(harness, tokenizer)
    settings = EngineSettings(dtype="float32", max_model_len=1024)
    with running(checkpoint, mask, settings, harness=True) as engine:
        contenders = {"vLLM": engine.harness}
        for batch in BATCHES:
            contenders[f"hf, batch {batch}"] = HFLM(model, tokenizer=tokenizer, batch_size=batch)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        scores = {}
        for _ in range(args.rounds):
            for name, contender in contenders.items():
                elapsed, scores[name] = timed(harness, contender)
                seconds[name].append(elapsed)
    speeds = {name: tokens / median(each) for name, each in seconds.items()}
    differences = [abs(scores[name][task] - value) for name in scores for task, value in scores["vLLM"].items()]
    finish(
        "evaluation_speed",
        {
            "benchmark": "evaluation_speed",
            "mask": mask.summary(),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": speeds,
            "speedup_over": {name: speeds["vLLM"] / value for name, value in speeds.items() if name != "vLLM"},
            "scores": scores,
            "largest_score_difference": max(differences),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
