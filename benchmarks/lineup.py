"""Which contenders there are for a shape and masks, what memory they need, and who is measured beside whom."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.contenders import OF_REAL_WEIGHTS, Contender, Process, Settings, check_agreement, running
from benchmarks.limit import Model
from benchmarks.shapes import Shape
from benchmarks.weights import with_mask
from llmdrop_vllm import DropMask, InputError

STOCK, OURS, NO_OP, TRANSFORMERS = "vLLM", "llmdrop", "vLLM no-op", "Transformers"
# Interpreter, libraries and activations of one process.
OVERHEAD_BYTES = 3 << 29
CHECK_PROMPT_TOKENS, CHECK_TOKENS = 64, 8
TEXT = Path(__file__).parents[1] / "LICENSE"


def contenders(shape: Shape, masks: Mapping[str, DropMask]) -> list[Contender]:
    """Stock vLLM in full comes first, as the baseline; the last mask meets everyone else who can serve it."""
    full = Contender("vllm", STOCK, DropMask(shape.num_layers), "full")
    ours = [Contender("vllm", OURS, mask, label) for label, mask in masks.items()]
    label, mask = [*masks.items()][-1]
    others = [("vllm", NO_OP), ("transformers", TRANSFORMERS)]
    return [full, *ours, *(Contender(engine, variant, mask, label) for engine, variant in others)]


@dataclass
class Lineup:
    """The checkpoints, and what is known of the contenders; `skipped` tells why someone is not measured."""

    shape: Shape
    settings: Settings
    full: Path
    skipped: dict[str, str] = field(default_factory=dict)
    references: dict[DropMask, Mapping[str, list]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)

    def need_bytes(self, contender: Contender) -> int:
        """Memory for weights, KV cache and the process."""
        weights = Model.of(self.shape, contender.mask, self.settings.dtype).weight_bytes
        return weights + self.settings.kv_bytes + OVERHEAD_BYTES

    @cached_property
    def check_prompt(self) -> list[int]:
        """What all must agree on. A real model's is text: of tokens at random it says what rounding decides."""
        if self.shape.real is None:
            return [*range(3, 3 + CHECK_PROMPT_TOKENS)]
        ids: list[int] = AutoTokenizer.from_pretrained(self.shape.real.directory)(TEXT.read_text()).input_ids
        return ids[:CHECK_PROMPT_TOKENS]

    def sittings(self, line: Sequence[Contender], available_bytes: int) -> list[list[Contender]]:
        """The baseline with as many others as fit beside it, as often as it takes; who never fits is skipped."""
        baseline, *others = line
        free = available_bytes - self.need_bytes(baseline)
        if free < 0:
            raise InputError(
                f"the baseline needs {self.need_bytes(baseline) / 2**30:.1f} GiB of memory, and "
                f"{available_bytes / 2**30:.1f} GiB are free: use --layers or a smaller shape"
            )
        found: list[list[Contender]] = []
        room = -1
        for each in others:
            need = self.need_bytes(each)
            if need > free:
                self.skipped[each.name] = (
                    f"needs {need / 2**30:.1f} GiB beside the baseline, {free / 2**30:.1f} are free"
                )
                continue
            if need > room:
                found.append([baseline])
                room = free
            found[-1].append(each)
            room -= need
        return found

    def options(self, contender: Contender) -> dict[str, Any]:
        """What the contender loads, and how. Raises MaskError where it cannot serve the mask."""
        dialect = "nemotron-nas" if contender.variant == NO_OP else "llm-drop"
        place = self.full.with_name(f"{dialect} {contender.label}")
        options = self.settings.options(contender.engine, with_mask(self.full, place, contender.mask, dialect))
        # The remote code is the config class that our own export brings along.
        return options | ({"trust_remote_code": True} if contender.variant == NO_OP else {})

    def make_references(self, masks: Iterable[DropMask], line: Sequence[Contender], available_bytes: int) -> None:
        """What Transformers answers for each mask, the full model included; where it fits."""
        by_mask = {each.mask: each for each in line}
        with running("reference", self.full.parent, plugin=True, device=self.settings.device) as process:
            for mask in masks:
                each = by_mask[mask]
                reference = Contender("transformers", TRANSFORMERS, mask, each.label)
                if self.need_bytes(reference) > available_bytes:
                    continue
                process.load("transformers", self.options(reference))
                self.references[mask] = process.ask("answer", prompt=self.check_prompt, tokens=CHECK_TOKENS)

    @contextmanager
    def seated(self, sitting: Sequence[Contender]) -> Iterator[dict[Contender, Process]]:
        """The sitting's processes, loaded and checked; those that fail to load are skipped, but not the baseline."""
        with ExitStack() as stack:
            found = {}
            for contender in (each for each in sitting if each.name not in self.skipped):
                plugin, device = contender.variant in (OURS, TRANSFORMERS), self.settings.device
                try:
                    options = self.options(contender)
                    process = stack.enter_context(
                        running(contender.name, self.full.parent, plugin=plugin, device=device)
                    )
                    process.load(contender.engine, options)
                except InputError as error:
                    if contender is sitting[0]:
                        raise
                    self.skipped[contender.name] = str(error)
                    continue
                self.check(contender, process)
                found[contender] = process
            yield found

    def check(self, contender: Contender, process: Process) -> None:
        """Hold a contender to the reference for its mask, or to the first answer there was. Raises ContenderError."""
        answer = process.ask("answer", prompt=self.check_prompt, tokens=CHECK_TOKENS)
        reference = self.references.setdefault(contender.mask, answer)
        if reference is not answer:
            times = 1 if self.shape.real is None else OF_REAL_WEIGHTS
            dtype = self.settings.dtype
            self.differences[contender.name] = check_agreement(contender.name, reference, answer, dtype, times)
