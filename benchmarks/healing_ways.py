"""Ways to heal real models that `healing.py` compares."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmdrop_vllm.healing.distill import TrainOptions
from llmdrop_vllm.healing.run import HealOptions

DROPPED, OWN_PROMPTS = "dropped", "own prompts"


@dataclass(frozen=True)
class Way:
    """One way to heal: on what, on how many tokens of each source at most, and how. `evaluated`: measured in full.

    `after` names the way whose checkpoint is trained on, without a closed form of its own.

    `chosen` is a way to choose the mask; None is the sweep's, cosine importance on text. `heals`: not only dropped.
    """

    name: str
    data: tuple[str, ...] = ("answers",)
    tokens: int | None = None
    options: HealOptions = HealOptions()
    ridges: tuple[float, ...] | None = None
    train: TrainOptions | None = None
    dtype: str | None = None
    evaluated: bool = False
    chosen: str | None = None
    heals: bool = True
    after: str | None = None


ON_ANSWERS, AFTER_HEALING = "chosen by cosine on answers", "chosen by what healing leaves"
BY_SEARCH = "chosen by search"


def _then(before: Way, how: str, train: TrainOptions, *, evaluated: bool = False) -> Way:
    """Training that goes on with a closed form's checkpoint."""
    name = before.name.replace("closed form", f"closed form, then {how}")
    options = HealOptions(closed_form=False)
    return replace(before, name=name, options=options, train=train, after=before.name, evaluated=evaluated)


def _chosen() -> Iterator[Way]:
    for chosen in (ON_ANSWERS, AFTER_HEALING, BY_SEARCH):
        evaluated = chosen == BY_SEARCH
        yield Way(f"{DROPPED}, {chosen}", chosen=chosen, heals=False, evaluated=evaluated)
        yield Way(f"closed form, {chosen}", chosen=chosen, evaluated=evaluated)


def _trained_by_search(train: TrainOptions, data: tuple[str, ...]) -> Iterator[Way]:
    yield _then(Way(f"closed form, {BY_SEARCH}", chosen=BY_SEARCH), "training", TRAINED, evaluated=True)
    name = f"closed form, then training, answers to its own prompts too, {BY_SEARCH}"
    yield Way(name, data, train=train, chosen=BY_SEARCH, evaluated=True)


def _of_the_coder(chosen: str | None) -> Iterator[Way]:
    how = f", {chosen}" if chosen else ""
    if chosen:
        yield Way(f"{DROPPED}{how}", chosen=chosen, heals=False, evaluated=True)
    before = Way(f"closed form{how}", DATA[CODER], 25_000, dtype="bfloat16", evaluated=True, chosen=chosen)
    yield before
    # 2048 tokens a step take over 20 GiB.
    train = TrainOptions(rank=32, epochs=1, learning_rate=5e-4, step_tokens=1024)
    yield _then(before, "LoRA of rank 32", train, evaluated=True)


UNHEALED = Way(DROPPED, heals=False)
TRAINED = TrainOptions()
CODER = "qwen2.5-coder-1.5b"
# By model, what it is healed on and what its masks are searched for by; by number gone, in which ways.
DATA = {"smollm2": ("answers",), CODER: ("answers", "functions", "asked functions")}
SEARCHED_ON = {"smollm2": "answers", CODER: "asked functions"}
WAYS: dict[str, dict[int, tuple[Way, ...]]] = {
    "smollm2": {
        8: (
            UNHEALED,
            Way("closed form", evaluated=True),
            Way("closed form, 10k tokens", tokens=10_000),
            Way("closed form, 25k tokens", tokens=25_000),
            Way("closed form, text", ("text",), evaluated=True),
            Way("closed form, answers and text", ("answers", "text")),
            Way("closed form, answers to its own prompts too", ("answers", OWN_PROMPTS)),
            Way("closed form, nothing refitted behind", options=HealOptions(later="nothing")),
            Way("closed form, tokens weighted equally", options=HealOptions(weighting="equal")),
            Way("closed form, streams in float32", dtype="float32"),
            *(Way(f"closed form, lambda {value:g}", ridges=(value,)) for value in (0.001, 0.03, 1.0)),
            _then(Way("closed form"), "training", TRAINED, evaluated=True),
            Way(
                "closed form, then training, answers to its own prompts too",
                ("answers", OWN_PROMPTS),
                train=replace(TRAINED, epochs=2),
                evaluated=True,
            ),
            _then(Way("closed form"), "LoRA of rank 32", replace(TRAINED, rank=32, learning_rate=5e-4)),
            *_chosen(),
            *_trained_by_search(replace(TRAINED, epochs=2), ("answers", OWN_PROMPTS)),
        ),
        4: (
            UNHEALED,
            Way("closed form", evaluated=True),
            _then(Way("closed form"), "training", TRAINED, evaluated=True),
            *_chosen(),
            *_trained_by_search(replace(TRAINED, epochs=2), ("answers", OWN_PROMPTS)),
        ),
    },
    CODER: {count: (UNHEALED, *_of_the_coder(None), *_of_the_coder(BY_SEARCH)) for count in (8, 4)},
}
