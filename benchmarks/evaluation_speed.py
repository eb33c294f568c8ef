"""lm-eval tasks through vLLM, as `llmdrop evaluate` runs them, against lm-eval's own Transformers backend.

    python benchmarks/evaluation_speed.py [--rounds 3] [--attention 11,7,8,10]

Both evaluate the embedded model under one mask, in turns in one process; engines and models are loaded before the clock
starts. Tokens are those of all requests, prompts and answers, counted once and alike for both.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.record import RESULTS, finish
from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoint import Checkpoint
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.evaluation.engine import EngineSettings, running
from llmdrop_vllm.evaluation.harness import Harness, find_tasks

TASKS = ("llmdrop_docstring", "llmdrop_name")
BATCHES = (1, 32)


def timed(harness: Harness, model: Any, limit: int | None) -> tuple[float, dict[str, float]]:
    """Seconds, and the score of each task."""
    start = time.perf_counter()
    scores, _ = harness.run(model, limit=limit)
    return time.perf_counter() - start, {score.task: score.value for score in scores}


def count_tokens(harness: Harness, limit: int | None) -> int:
    """Of every request's prompt and right answer, by the embedded model's tokenizer."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(MODEL)
    total = 0
    for task in harness.manager.load(list(harness.tasks))["tasks"].values():
        for row in list(task.test_docs())[:limit]:
            answers = task.doc_to_choice(row) if task.OUTPUT_TYPE == "multiple_choice" else [task.doc_to_target(row)]
            total += sum(len(encode(task.doc_to_text(row) + answer)["input_ids"]) for answer in answers)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attention", default="11,7,8,10", help="layers whose attention is dropped")
    parser.add_argument("--limit", type=int, help="rows of each task (all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluation_speed.json")
    args = parser.parse_args()
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    checkpoint = Checkpoint.open(MODEL)
    mask = DropMask(checkpoint.mask.num_hidden_layers, tuple(map(int, args.attention.split(","))))
    harness = find_tasks(TASKS)
    model, tokenizer = hf.load(checkpoint, mask, dtype="float32"), AutoTokenizer.from_pretrained(MODEL)
    tokens = count_tokens(harness, args.limit)
    settings = EngineSettings(dtype="float32", max_model_len=1024)
    with running(checkpoint, mask, settings, harness=True) as engine:
        contenders = {"vLLM": engine.harness}
        for batch in BATCHES:
            contenders[f"hf, batch {batch}"] = HFLM(model, tokenizer=tokenizer, batch_size=batch)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        scores = {}
        for _ in range(args.rounds):
            for name, contender in contenders.items():
                elapsed, scores[name] = timed(harness, contender, args.limit)
                seconds[name].append(elapsed)
    speeds = {name: tokens / median(each) for name, each in seconds.items()}
    differences = [abs(scores[name][task] - value) for name in scores for task, value in scores["vLLM"].items()]
    finish(
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
