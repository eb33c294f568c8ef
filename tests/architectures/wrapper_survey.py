"""Which of vLLM's wrappers a mask can drop from, and why not the rest: the second table in docs/families.md, generated.

python -m tests.architectures.wrapper_survey            # print it
python -m tests.architectures.wrapper_survey --write    # put it into docs/families.md
"""

from collections import defaultdict
from collections.abc import Iterable

from vllm.model_executor.models import registry

from llmdrop_vllm.architectures.refused import REFUSED
from llmdrop_vllm.architectures.wrappers import NAMED, WRAPPERS
from tests.architectures import survey
from tests.architectures.bare_wrappers import BARE
from tests.architectures.wrapper_cases import WRAPPER_CASES

VERIFIED = frozenset({case.architecture for case in WRAPPER_CASES.values()} | BARE.keys())
OWN_LAYERS = "decoder layers of its own, not looked at yet"
# Read in vLLM's source, where no sign of the survey of text models says it.
REASONS = {
    **{name: REFUSED[name] for name in REFUSED if name in registry._MULTIMODAL_MODELS},
    "CohereAsrForConditionalGeneration": "an encoder and a decoder that attends to it",
    "NemotronParseForConditionalGeneration": "an encoder and a decoder that attends to it",
    "WhisperForConditionalGeneration": "an encoder and a decoder that attends to it",
    "DiffusionGemmaForBlockDiffusion": "Gemma 4's layers, which see a block in both directions",
    "InternS2MobiusForConditionalGeneration": "Qwen3.5's layers with mixtures that several of them share",
}


def wrappers() -> dict[str, tuple[str, str]]:
    """vLLM's multimodal architectures with their module and class."""
    return dict(registry._MULTIMODAL_MODELS)


def reason(architecture: str) -> str:
    """Why it has no tower in the table of wrappers."""
    if architecture in REASONS:
        return REASONS[architecture]
    facts = survey.facts_about(*wrappers()[architecture])
    signs = (text for sign, text in survey.SIGNS.items() if sign in facts and sign != "SupportsMultiModal")
    return next(signs, OWN_LAYERS)


def table() -> str:
    """Wrappers by the architecture of their towers, then those without one by reason."""
    towers: dict[str, list[str]] = defaultdict(list)
    for name, tower in WRAPPERS.items():
        towers[tower].append(name)
    rows = []
    for tower, names in sorted(towers.items(), key=lambda item: (item[0] != NAMED, item[0])):
        cells = (_names(name for name in names if (name in VERIFIED) == verified) for verified in (True, False))
        rows.append((f"`{tower}`" if tower != NAMED else "as the tower's config says", *cells))
    reasons: dict[str, list[str]] = defaultdict(list)
    for name in sorted(wrappers().keys() - WRAPPERS.keys()):
        reasons[reason(name)].append(name)
    without = [(text, _names(names)) for text, names in sorted(reasons.items())]
    total, supported, verified = len(wrappers()), len(WRAPPERS), len(VERIFIED)
    return "\n".join(
        (
            f"Of the {total} wrappers of vLLM {survey.VERSION}, {verified} are verified, {supported - verified} are "
            f"supported but not verified, {total - supported} are not supported.\n",
            survey.markdown(("layers of the tower", "verified", "supported, not verified"), rows),
            survey.markdown(("not supported, because", "wrappers"), without),
        )
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


if __name__ == "__main__":
    survey.main("wrappers", table())
