"""Time and memory of scoring, against three plain passes over the same model and data.

    python benchmarks/scoring.py [--repeats 3]

The contender is written as the method reads (arXiv 2406.15786): the whole model in memory, one pass for attention, one
for MLPs and one for blocks, each keeping every layer's hidden states to compare them at the end. It exists twice:
`three passes` compares each block with its own input only, `three passes, all gaps` compares all pairs of depths, as
choosing a run of blocks needs; `llmdrop score` always does (on a sample of tokens), and measures the diagnostics too.
Every measurement is a process of its own, contenders in turn; peak memory is the process's resident set.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.memory import kernel_bytes
from benchmarks.record import add_out, finish
from benchmarks.shapes import Shape, find
from benchmarks.weights import write_random, write_tokens
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli.values import count
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.scoring.scoring import score

CONTENDERS = ("llmdrop", "three passes", "three passes, all gaps")
WIDTH = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
VOCAB_SIZE, SPEED_LAYERS, SPEED_SAMPLES, SPEED_SEQ_LEN = 8192, 12, 12, 1024


def make_model(directory: Path, num_layers: int) -> Path:
    """A random bf16 Llama: speed and memory do not depend on the values."""
    sizes = WIDTH | {"head_dim": 64, "num_hidden_layers": num_layers, "vocab_size": VOCAB_SIZE}
    return write_random(directory, Shape("scoring", {**find("smoke").config, **sizes}), "bfloat16")


def three_passes(model_path: Path, data: Path, *, all_gaps: bool) -> dict[str, list[float]]:
    """Mean cosine similarities per layer, of attention, MLPs and blocks."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto").eval()
    sequences = torch.tensor(json.loads(data.read_text()))
    layers = model.model.layers
    return {
        "attention": sublayer_pass(model, sequences, [(layer.input_layernorm, layer.self_attn) for layer in layers]),
        "mlp": sublayer_pass(model, sequences, [(layer.post_attention_layernorm, layer.mlp) for layer in layers]),
        **block_pass(model, sequences, len(layers) if all_gaps else 1),
    }


def sublayer_pass(
    model: nn.Module, sequences: torch.Tensor, sublayers: list[tuple[nn.Module, nn.Module]]
) -> list[float]:
    inputs, outputs = defaultdict(list), defaultdict(list)
    handles = []
    for index, (norm, module) in enumerate(sublayers):
        handles.append(norm.register_forward_pre_hook(lambda _m, args, i=index: inputs[i].append(args[0])))
        handles.append(
            module.register_forward_hook(
                lambda _m, _a, out, i=index: outputs[i].append(out[0] if isinstance(out, tuple) else out)
            )
        )
    forward_all(model, sequences, handles)
    found = []
    for index in range(len(sublayers)):
        x, out = torch.cat(inputs.pop(index)), torch.cat(outputs.pop(index))
        found.append(similarity(x, x + out))
    return found


def block_pass(model: nn.Module, sequences: torch.Tensor, max_gap: int) -> dict[str, list[float]]:
    layers = model.model.layers
    states = defaultdict(list)
    handles = [
        layer.register_forward_pre_hook(lambda _m, args, i=index: states[i].append(args[0]))
        for index, layer in enumerate(layers)
    ]
    handles.append(layers[-1].register_forward_hook(lambda _m, _a, out: states[len(layers)].append(out)))
    forward_all(model, sequences, handles)
    depths = [torch.cat(states.pop(depth)) for depth in range(len(layers) + 1)]
    return {
        f"gap {gap}": [similarity(depths[i], depths[i + gap]) for i in range(len(layers) - gap + 1)]
        for gap in range(1, max_gap + 1)
    }


@torch.no_grad()
def forward_all(model: nn.Module, sequences: torch.Tensor, handles: list) -> None:
    for sequence in sequences:
        model(sequence[None], use_cache=False)
    for handle in handles:
        handle.remove()


def similarity(x: torch.Tensor, y: torch.Tensor) -> float:
    return torch.cosine_similarity(x.float(), y.float(), dim=-1).mean().item()


def measure(contender: str, model: Path, data: Path) -> dict:
    """Run in this process; seconds do not count the imports, which are the same."""
    start = time.perf_counter()
    if contender == "llmdrop":
        checkpoint = Checkpoint.open(model)
        scores = score(checkpoint, load_calibration(checkpoint, str(data)))
        attention = list(scores.similarity.attention)
    else:
        attention = three_passes(model, data, all_gaps="gaps" in contender)["attention"]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_rss_bytes": kernel_bytes("VmHWM"), "attention": attention}


def in_process(contender: str, model: Path, data: Path) -> dict:
    command = [sys.executable, __file__, "--measure", contender, str(model), str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def speed(directory: Path, repeats: int) -> dict:
    model = make_model(directory / "speed", SPEED_LAYERS)
    data = write_tokens(directory / "speed.json", VOCAB_SIZE, SPEED_SAMPLES, SPEED_SEQ_LEN)
    runs = defaultdict(list)
    for _ in range(repeats):
        for contender in CONTENDERS:
            runs[contender].append(in_process(contender, model, data))
            print(f"{contender:24} {runs[contender][-1]['seconds']:7.2f} s", flush=True)
    seconds = {name: statistics.median(run["seconds"] for run in results) for name, results in runs.items()}
    ours, theirs = runs["llmdrop"][0]["attention"], runs["three passes"][0]["attention"]
    return {
        "model": WIDTH | {"num_hidden_layers": SPEED_LAYERS, "vocab_size": VOCAB_SIZE, "dtype": "bfloat16"},
        "samples": SPEED_SAMPLES,
        "seq_len": SPEED_SEQ_LEN,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "speedup": {name: round(seconds[name] / seconds["llmdrop"], 2) for name in CONTENDERS[1:]},
        "peak_rss_mib": {name: results[0]["peak_rss_bytes"] >> 20 for name, results in runs.items()},
        "max_similarity_difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
    }


def memory(directory: Path) -> dict:
    """Peak resident set in MiB; the contender keeps what grows."""
    models = {layers: make_model(directory / f"depth-{layers}", layers) for layers in (8, 16, 32)}
    data = {
        samples: write_tokens(directory / f"samples-{samples}.json", VOCAB_SIZE, samples, 128)
        for samples in (16, 64, 256)
    }

    def peaks(layers: int, samples: int) -> dict[str, int]:
        found = {c: in_process(c, models[layers], data[samples])["peak_rss_bytes"] >> 20 for c in CONTENDERS[:2]}
        print(layers, "layers,", samples, "samples", found, flush=True)
        return found

    return {
        "by_samples": {samples: peaks(8, samples) for samples in data},
        "by_depth": {layers: peaks(layers, 16) for layers in models},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=count, default=3)
    add_out(parser)
    parser.add_argument("--measure", nargs=3, metavar=("CONTENDER", "MODEL", "DATA"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        contender, model, data = args.measure
        print(json.dumps(measure(contender, Path(model), Path(data))))
        return
    with tempfile.TemporaryDirectory() as directory:
        result = {"speed": speed(Path(directory), args.repeats), "peak_rss_mib": memory(Path(directory))}
    finish("scoring", result, args.out)


if __name__ == "__main__":
    main()
