"""Answers through Transformers, in a file as `llmdrop answers` writes it through vLLM: for GPUs without it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from llmdrop_vllm import hf
from llmdrop_vllm.artifacts import Provenance, sha256
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.answers import Answer, AnswersHeader
from llmdrop_vllm.data.growing import growing
from llmdrop_vllm.data.prompts import read_prompts
from llmdrop_vllm.data.tokens import load_tokenizer


class Sampler:
    """A checkpoint in bfloat16 on the GPU where there is one; `batch` prompts are answered at once."""

    def __init__(self, checkpoint: Checkpoint, batch: int) -> None:
        self.checkpoint, self.batch = checkpoint, batch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = hf.load(checkpoint.under(checkpoint.mask), dtype=torch.bfloat16).to(self.device).eval()
        self.tokenizer = load_tokenizer(checkpoint, "its model's belongs there")
        ends = GenerationConfig.from_pretrained(checkpoint.directory).eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def answers(self, prompts: Path, out: Path, *, max_tokens: int, temperature: float, per_prompt: int = 1) -> None:
        """To all prompts of a file; made once. None is held out."""
        if out.exists():
            return
        asked = [tuple(each.token_ids(self.tokenizer)) for each in read_prompts(prompts)]
        header = AnswersHeader(
            prompts=str(prompts),
            prompts_sha256=sha256(enumerate(asked)),
            num_prompts=len(asked),
            per_prompt=per_prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=0,
            held_out=0,
            provenance=Provenance.of(self.checkpoint, dtype="bfloat16", device=self.device),
        )
        torch.manual_seed(0)
        # Prompts of like lengths together; whole passes over them are in the file whenever it is cut off.
        order = sorted(range(len(asked)), key=lambda number: -len(asked[number])) * per_prompt
        with growing(out, header, Answer) as file, tqdm(total=len(order), unit="answer", initial=file.count) as bar:
            for start in range(file.count, len(order), self.batch):
                numbers = order[start : start + self.batch]
                found = self._answered([asked[number] for number in numbers], max_tokens, temperature)
                file.append(
                    [
                        Answer(
                            prompt_number=number,
                            finish_reason=reason,
                            prompt=asked[number],
                            answer=answer,
                            text=self.tokenizer.decode(answer, skip_special_tokens=True),
                        )
                        for number, (answer, reason) in zip(numbers, found, strict=True)
                    ]
                )
                bar.update(len(numbers))

    def _answered(
        self, prompts: Sequence[tuple[int, ...]], max_tokens: int, temperature: float
    ) -> Iterator[tuple[tuple[int, ...], str]]:
        """Each answer and why it ends."""
        longest, pad = max(map(len, prompts)), min(self.ends)
        token_ids = torch.tensor([[pad] * (longest - len(each)) + list(each) for each in prompts], device=self.device)
        seen = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts], device=self.device)
        drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=max_tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=pad,
            **(drawn if temperature else {"do_sample": False}),
        )
        with torch.inference_mode():
            found = self.model.generate(token_ids, attention_mask=seen, generation_config=config)
        for row in found[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in self.ends), None)
            yield (tuple(row), "length") if end is None else (tuple(row[: end + 1]), "stop")
