"""What a model answers in full, dropped and healed, as recorded for the page and the report."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Literal, Self

from pydantic import model_validator

from llmdrop_vllm.artifacts import Provenance, Record
from llmdrop_vllm.masks.mask import DropMask


class Said(Record):
    """An answer: `same` is how it begins word for word as the full model's does, `other` all the rest.

    `tokens` counts the one that ends it; `finish_reason` is "stop" or "length".
    """

    same: str
    other: str
    tokens: int
    finish_reason: str

    @classmethod
    def beside(cls, full: str, text: str, tokens: int, finish_reason: str) -> Self:
        """Cut where it parts from the full model's text."""
        pairs = zip(full.split(" "), text.split(" "), strict=False)
        same = text[: sum(len(word) + 1 for word, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))]
        return cls(same=same, other=text[len(same) :], tokens=tokens, finish_reason=finish_reason)


class Form(Record):
    """One form of the model: `fingerprint` is of its weights, `healing` says how these were healed, if they were.

    `weight_bytes` are those that it is served with; `kv_bytes_per_token` is as vLLM stores it, padding included.
    """

    name: Literal["full", "dropped", "healed", "trained"]
    fingerprint: str
    mask: DropMask
    summary: str
    healing: str | None = None
    weight_bytes: int
    kv_bytes_per_token: int
    answers: tuple[Said, ...]


class Comparison(Record):
    """The same questions to each form, the full model first: the most likely tokens, `max_tokens` each at most.

    `prompts` names where the questions come from, `date` the day (UTC); `kv_dtype` is what KV bytes are counted in.
    """

    kind: Literal["llmdrop-comparison"] = "llmdrop-comparison"
    date: str
    prompts: str
    max_tokens: int
    kv_dtype: str
    questions: tuple[str, ...]
    forms: tuple[Form, ...]
    provenance: Provenance

    @model_validator(mode="after")
    def _check_forms(self) -> Self:
        if len(self.forms) < 2 or self.forms[0].name != "full":
            raise ValueError("forms must be the full model and at least another one")
        for form in self.forms:
            if len(form.answers) != len(self.questions):
                raise ValueError(f"{form.name} has {len(form.answers)} answers to {len(self.questions)} questions")
            if form.mask.num_hidden_layers != self.num_hidden_layers:
                raise ValueError(f"{form.name} has another number of layers than the full model")
        return self

    @property
    def num_hidden_layers(self) -> int:
        """Of the model."""
        return self.forms[0].mask.num_hidden_layers

    @property
    def how(self) -> str:
        """For people: what it takes to record it again."""
        said = [f"recorded on {self.date} with the most likely tokens, up to {self.max_tokens} of each answer"]
        said += [f"{each.name}: {each.healing}" for each in self.forms if each.healing]
        return "; ".join([*said, f"weights {', '.join(dict.fromkeys(each.fingerprint for each in self.forms))}"])

    def exchanges(self) -> Iterator[tuple[str, tuple[tuple[Form, Said], ...]]]:
        """Each question with what each form answered."""
        for place, question in enumerate(self.questions):
            yield question, tuple((form, form.answers[place]) for form in self.forms)
