"""Healing on more answers than an hour of two cores gives: on a GPU, by training on millions of tokens.

    python benchmarks/healing_gpu.py prepare [--model qwen2.5-coder-1.5b]           after healing.py, where vLLM is
    python benchmarks/healing_gpu.py sample [--model qwen2.5-coder-1.5b]            on the GPU
    python benchmarks/healing_gpu.py train --run '{"name": "8", "attention": [2, 4], "train": {"rank": 64}}' ...
    python benchmarks/healing_gpu.py merge --figures FILE --keep DIR                where there is vLLM

`prepare` writes prompts: ours, and Python functions of all packages that are installed. `sample` has the model answer
them through Transformers, and prompts that it writes itself. `train` heals a mask on all of that and judges it on the
held-out answers of `healing.py`, to whose prompts none of these are. With `--keep` its adapters travel, and `merge`
makes a checkpoint of them and measures it as `healing.py` does.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.functions import more_functions
from benchmarks.healing import evaluated, figures
from benchmarks.healing_subject import Subject
from benchmarks.healing_ways import CODER, DATA
from benchmarks.own_prompts import LONGEST, beginning, like, own_prompts
from benchmarks.record import RESULTS, finish
from benchmarks.sampling import Sampler
from benchmarks.table import rows
from llmdrop_vllm import DropMask
from llmdrop_vllm.artifacts import HEAL_FILE, write_atomically
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.shards import stored_tensors
from llmdrop_vllm.data.answers import read_answers
from llmdrop_vllm.data.tokens import load_tokenizer
from llmdrop_vllm.healing.distill import TrainOptions
from llmdrop_vllm.healing.heal import healed
from llmdrop_vllm.healing.run import HealOptions
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint

CODE = {"more functions": 192, "more asked functions": 256}  # tokens of an answer
OURS, OWN, LIKE = "more answers", "many own prompts", "prompts like ours"
LONGEST_LIKE = 128
TOKENS, TEMPERATURE = 256, 0.8
FILE_BYTES = 15 * 2**20
OF_PEFT, SCALE = "model.base_model.model.", 2.0  # of what adapters add, as `distill` sets them up


@dataclass(frozen=True)
class Run:
    """A mask's healing on `tokens` of each source, all where there is no number, and its closed form on fewer."""

    name: str
    attention: tuple[int, ...]
    closed_form: int | None = None
    tokens: int | None = None
    train: dict[str, Any] | None = None

    @property
    def stages(self) -> Iterator[tuple[int | None, HealOptions, TrainOptions | None]]:
        """Tokens of each source, and how."""
        if self.closed_form:
            yield self.closed_form, HealOptions(), None
        if self.train is not None:
            yield self.tokens, HealOptions(closed_form=False), TrainOptions(**self.train)


def sources(name: str) -> tuple[str, ...]:
    """What a model learns from here."""
    return (OURS, OWN, LIKE, *(CODE if name == CODER else ()))


def prepare(subject: Subject, count: int) -> None:
    """Write the prompts that need no model: ours that are not held out, and functions that nothing is judged by."""
    known = {kind: read_answers(subject.answers(kind))[1] for kind in DATA[subject.name]}
    ours = [json.dumps({"prompt": each.prompt}) + "\n" for each in known["answers"] if not each.held_out]
    write_atomically(_prompts(subject, OURS), "".join(ours))
    like(subject.checkpoint, subject.answers("answers"), subject.directory / "wishes.jsonl")
    tokenizer = load_tokenizer(subject.checkpoint, "its model's belongs there")
    shown = [tokenizer.decode(each.prompt) for answers in known.values() for each in answers]
    for source in CODE if subject.name == CODER else ():
        more_functions(_prompts(subject, source), count, shown, in_chat="asked" in source)


def sample(subject: Subject, batch: int, own: int, per_prompt: int) -> None:
    """Have the model answer them, and prompts that it writes itself."""
    sampler = Sampler(subject.checkpoint, batch)

    def ask(source: str, prompts: Path, **options: Any) -> Path:
        out = subject.directory / f"{source.replace(' ', '-')}.jsonl"
        sampler.answers(prompts, out, **{"max_tokens": TOKENS, "temperature": TEMPERATURE, **options})
        return out

    begin = subject.directory / "beginning.jsonl"
    beginning(subject.checkpoint, begin)
    written = ask("written", begin, max_tokens=LONGEST, temperature=1.0, per_prompt=own)
    own_prompts(written, _prompts(subject, OWN), own)
    ask(OWN, _prompts(subject, OWN))
    ask(OURS, _prompts(subject, OURS), per_prompt=per_prompt)
    wishes = subject.directory / "wishes.jsonl"
    written = ask("written like ours", wishes, max_tokens=LONGEST_LIKE, temperature=1.0, per_prompt=2 * per_prompt)
    own_prompts(written, _prompts(subject, LIKE), own)
    ask(LIKE, _prompts(subject, LIKE))
    for source, tokens in CODE.items() if subject.name == CODER else ():
        ask(source, _prompts(subject, source), max_tokens=tokens)


def train(subject: Subject, run: Run, keep: Path | None) -> dict[str, Any]:
    """Heal a mask; figures, and what it was trained to under `keep`."""
    checkpoint, mask = subject.checkpoint, DropMask(subject.checkpoint.mask.num_hidden_layers, run.attention)
    teacher, scratch = checkpoint.under(checkpoint.mask), subject.directory / f".{run.name}.scratch"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    told: dict[str, Any] = {"model": subject.name, "device": device, "run": asdict(run), "stages": {}}
    told["dropped"] = subject.judged(checkpoint, mask)
    for tokens, options, training in run.stages:
        out, start = subject.directory / f"{run.name}-{'trained' if training else 'closed-form'}", time.monotonic()
        data = subject.learnt_from(sources(subject.name), tokens)
        student, how = checkpoint.under(mask), {"train": training, "dtype": "bfloat16", "scratch": scratch}
        with healed(student, teacher, data, options, **how, progress=True) as found:
            if keep is not None and training is not None:
                _keep(scratch, keep)
            plan = plan_surgery(checkpoint, mask).healed(found.tensors)
            write_checkpoint(plan, out, records={HEAL_FILE: found.record})
        checkpoint, seconds = Checkpoint.open(out), round(time.monotonic() - start)
        trained = found.record.training
        told["stages"][out.name] = {
            "tokens": found.record.tokens,
            "seconds": seconds,
            "judged": subject.judged(checkpoint, mask),
            "training": trained and trained.model_dump(mode="json", exclude={"tensors"}),
        }
    return told


def merge(subject: Subject, run: Run, keep: Path) -> dict[str, Any]:
    """Make a checkpoint of adapters or weights that were kept; what `healing.py` measures of it."""
    out, mask = subject.directory / run.name, DropMask(subject.checkpoint.mask.num_hidden_layers, run.attention)
    measured = (subject.results / "healed" / f"{run.name}.json").exists()
    if not (measured or out.exists()):
        adapters = {
            name: tensor for path in sorted(keep.glob("*.safetensors")) for name, tensor in load_file(path).items()
        }
        merged = {name.removeprefix("model."): each for name, each in adapters.items() if ".lora_" not in name}
        for name, down in adapters.items():
            owner, found, _ = name.removeprefix(OF_PEFT).partition(".lora_A.")
            if found:
                up = adapters[name.replace(".lora_A.", ".lora_B.")]
                with safe_open(subject.checkpoint.tensors[f"{owner}.weight"].path, "pt") as shard:
                    weight = shard.get_tensor(f"{owner}.weight")
                merged[f"{owner}.weight"] = (weight.float() + SCALE * up.float() @ down.float()).to(weight.dtype)
        with tempfile.TemporaryDirectory() as directory:
            save_file(merged, path := Path(directory) / "merged.safetensors")
            stored = {tensor.name: tensor for tensor in stored_tensors(path)}
            write_checkpoint(plan_surgery(subject.checkpoint, mask).healed(stored), out)
    return figures(evaluated(subject, out, run.name).quality)


def table(runs: list[dict[str, Any]]) -> str:
    """For people."""
    head = ("model", "without attention in", "", "tokens", "s")
    head += ("KL, held-out answers", "KL, functions", "KL, asked functions", "reasoning", "HumanEval")
    found = []
    for run in runs:
        gone = " ".join(map(str, sorted(run["run"]["attention"])))
        stages = {"dropped": {"judged": run["dropped"]}, **run["stages"]}
        for name, stage in stages.items():
            training = stage.get("training")
            what = f"{training['method']}, {training['epochs']:g} epochs" if training else name
            kl = (stage["judged"][kind]["kl"] if kind in stage["judged"] else "" for kind in DATA[CODER])
            tasks = (run["measured"][task] if name == [*stages][-1] else "" for task in ("reasoning", "humaneval"))
            shares = (f"{each:.1%}" if each else "" for each in tasks)
            found.append((run["model"], gone, what, stage.get("tokens", ""), stage.get("seconds", ""), *kl, *shares))
    return f"# Healing on a GPU\n\n{rows(head, found)}"


def _keep(scratch: Path, out: Path) -> None:
    """The trained weights of the best check, in bfloat16 and in small files."""
    (training,) = scratch.glob("training-*")
    state = json.loads((Path(get_last_checkpoint(training)) / "trainer_state.json").read_text())
    trained = load_file(Path(state["best_model_checkpoint"]) / "model.safetensors")
    out.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict({name: each.bfloat16() for name, each in trained.items()}, out, max_shard_size=FILE_BYTES)


def _prompts(subject: Subject, source: str) -> Path:
    return subject.directory / f"{source.replace(' ', '-')}-prompts.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "sample", "train", "merge"))
    parser.add_argument("--model", default=CODER)
    parser.add_argument("--directory", type=Path, default=Path("healing"), metavar="DIR", help="that of healing.py")
    parser.add_argument(
        "--prompts", type=int, default=3000, metavar="N", help="functions of each kind; prompts of its own"
    )
    parser.add_argument("--per-prompt", type=int, default=4, metavar="N", help="answers to each of our prompts")
    parser.add_argument("--batch", type=int, default=1024, metavar="N", help="answers at once")
    parser.add_argument("--run", type=json.loads, metavar="JSON", help="name, attention, closed_form, tokens, train")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="what was trained, to merge elsewhere")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="of `train`, which `merge` adds to the results")
    args = parser.parse_args()
    subject = Subject(args.model, args.directory / args.model, RESULTS / "real" / args.model)
    if args.step == "prepare":
        prepare(subject, args.prompts)
    elif args.step == "sample":
        sample(subject, args.batch, args.prompts, args.per_prompt)
    elif args.step == "merge":
        out = RESULTS / "healing_gpu.json"
        runs = json.loads(out.read_text())["runs"] if out.exists() else []
        told = json.loads(args.figures.read_text())
        runs.append(told | {"measured": merge(subject, Run(**told["run"]), args.keep)})
        finish("healing_gpu", {"runs": runs}, out, table=table(runs))
    else:
        told = train(subject, Run(**args.run), args.keep)
        write_atomically(args.figures, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
