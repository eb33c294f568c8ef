"""A real model whose attention can be told to look back a window only, and the long texts that it is judged on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from benchmarks.real_quality import prose
from benchmarks.windowed_attention import NAME, Weighed, Window
from llmdrop_vllm import hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.fetching.fetch import fetch

LENGTH, MEASURED, FITTED = 8192, 3, 2
HEAD_ROWS = 1024
DEPTHS = tuple(0.05 + 0.1 * place for place in range(10))
OWN_AFTER, OWN_TOKENS = (2000, 4000, 7000), 256


@dataclass(frozen=True)
class Saying:
    """What a needle says and asks; {} is its number."""

    said: str
    asked: str


MEASURED_SAYING = Saying(
    "\nThe special number of Lisbon is {}. Remember it.\n",
    "\nQuestion: What is the special number of Lisbon?\nAnswer: The special number of Lisbon is",
)
# To choose layers by; what is measured was never seen.
FITTED_SAYING = Saying("\nNote: the red door opens with the code {}.\n", "\nThe code that opens the red door is")


@dataclass(frozen=True)
class Needles:
    """Texts of one length with a number in each, at several depths; token ids [texts, tokens], whose last tokens are
    the answers [texts, answer tokens]."""

    ids: torch.Tensor
    answer_tokens: int

    @property
    def answers(self) -> torch.Tensor:
        return self.ids[:, -self.answer_tokens :]


@dataclass(frozen=True)
class Subject:
    """A real model, and documents to fit and to measure with."""

    name: str
    directory: Path

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(fetch(self.name))

    @cached_property
    def model(self) -> Any:
        found = hf.load(self.checkpoint.under(self.checkpoint.mask), dtype=torch.bfloat16, attn_implementation=NAME)
        return found.to(self.device).eval()

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.checkpoint.directory)

    @cached_property
    def layers(self) -> list[nn.Module]:
        return list(hf.decoder_layers(self.model, self.depth))

    @cached_property
    def attentions(self) -> list[Any]:
        return [layer.self_attn for layer in self.layers]

    @property
    def depth(self) -> int:
        return self.checkpoint.mask.num_hidden_layers

    @cached_property
    def documents(self) -> tuple[torch.Tensor, ...]:
        """Of a handbook, [1, tokens] each; the first are to fit with."""
        path = self.directory / "prose.txt"
        ids = self.ids((path if path.exists() else prose(path)).read_text())
        spread = len(ids) // (FITTED + MEASURED)
        return tuple(self._tensor(ids[spread * n : spread * n + LENGTH]) for n in range(FITTED + MEASURED))

    @contextmanager
    def windowed(self, windows: Mapping[int, Window]) -> Iterator[None]:
        """Within this context these layers see their windows only."""
        try:
            for layer, window in windows.items():
                self.attentions[layer].window = window
            yield
        finally:
            for layer in windows:
                self.attentions[layer].window = None

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head reads: [texts, tokens] in, [texts, tokens, hidden] out."""
        found: torch.Tensor = self.model.get_decoder()(ids, use_cache=False).last_hidden_state
        return found

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] in, [..., vocabulary] out."""
        found: torch.Tensor = self.model.get_output_embeddings()(hidden).float().log_softmax(-1)
        return found

    @cached_property
    def full(self) -> list[torch.Tensor]:
        """The full model's hidden states of each document."""
        with torch.inference_mode():
            return [self.hidden(ids)[0] for ids in self.documents]

    @cached_property
    def own(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The full model's own words after long texts, [texts, tokens], and its hidden states of these words."""
        config = GenerationConfig(
            max_new_tokens=OWN_TOKENS,
            min_new_tokens=OWN_TOKENS,
            do_sample=True,
            temperature=0.8,
            top_k=0,
            pad_token_id=0,
        )
        found = []
        torch.manual_seed(0)
        with torch.inference_mode():
            for tokens in OWN_AFTER:
                begun = torch.cat([ids[:, :tokens] for ids in self.documents[FITTED:]])
                ids = self.model.generate(begun, attention_mask=torch.ones_like(begun), generation_config=config)
                found.append((ids, self.hidden(ids)[:, -OWN_TOKENS - 1 : -1]))
        return found

    @torch.inference_mode()
    def losses(self, windows: Mapping[int, Window], numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood of each next token, and KL to the full model, both [documents, tokens - 1]."""
        whole_model, found = self.full, []  # before anything is windowed
        with self.windowed(windows):
            for number in numbers:
                ids, hidden, full = self.documents[number], self.hidden(self.documents[number])[0], whole_model[number]
                for start in range(0, LENGTH - 1, HEAD_ROWS):
                    span = slice(start, min(start + HEAD_ROWS, LENGTH - 1))
                    own, whole = (self.log_probabilities(each[span]) for each in (hidden, full))
                    nll = -own.gather(-1, ids[0, span.start + 1 : span.stop + 1, None])[:, 0]
                    found.append(torch.stack([nll, (whole.exp() * (whole - own)).sum(-1)]).cpu())
        both = torch.cat(found, 1).view(2, len(numbers), -1)
        return both[0], both[1]

    @torch.inference_mode()
    def kl_of_own(self, windows: Mapping[int, Window]) -> dict[int, float]:
        """Mean KL to the full model on its own words, by how many tokens stand before them."""
        own, found = self.own, {}
        with self.windowed(windows):
            for tokens, (ids, whole) in zip(OWN_AFTER, own, strict=True):
                said, whole_said = (
                    self.log_probabilities(each) for each in (self.hidden(ids)[:, -OWN_TOKENS - 1 : -1], whole)
                )
                found[tokens] = (whole_said.exp() * (whole_said - said)).sum(-1).mean().item()
        return found

    @torch.inference_mode()
    def weighed(self, length: int, first: int) -> list[Weighed]:
        """By layer, what the first tokens weigh once they have left a window of such a length."""
        stats = [Weighed(length, first) for _ in self.attentions]
        for attention, each in zip(self.attentions, stats, strict=True):
            attention.weighed = each
        for ids in self.documents[:FITTED]:
            self.hidden(ids)
        for attention in self.attentions:
            del attention.weighed
        return stats

    @torch.inference_mode()
    def found(self, needles: Needles, windows: Mapping[int, Window]) -> float:
        """The share of the needles whose number is told, each of its tokens the likeliest one."""
        with self.windowed(windows):
            right = [
                self.log_probabilities(self.hidden(ids[None])[0, -needles.answer_tokens - 1 : -1]).argmax(-1)
                for ids in needles.ids
            ]
        return (torch.stack(right) == needles.answers).all(1).float().mean().item()

    def needles(self, length: int, saying: Saying, hay: Sequence[int], depths: Sequence[float] = DEPTHS) -> Needles:
        """One text for each depth, all of the same length, with numbers of four digits."""
        rows, answer_tokens = [], 0
        for place, depth in enumerate(depths):
            number = str((7919 * (place + 2) + 31 * length) % 9000 + 1000)
            said, asked, answer = (self.ids(each) for each in (saying.said.format(number), saying.asked, f" {number}"))
            room, answer_tokens = length - len(said) - len(asked) - len(answer), len(answer)
            cut = int(room * depth)
            rows.append([*hay[:cut], *said, *hay[cut:room], *asked, *answer])
        return Needles(torch.tensor(rows, device=self.device), answer_tokens)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self.device)
