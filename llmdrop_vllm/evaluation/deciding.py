"""Which of a search's best masks does best at tasks: KL likes some that take what mathematics needs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from llmdrop_vllm.artifacts import Provenance
from llmdrop_vllm.data.growing import Header, appended
from llmdrop_vllm.evaluation.harness import Harness
from llmdrop_vllm.evaluation.masked_engines import Plan, any_engines
from llmdrop_vllm.evaluation.records import Prompting
from llmdrop_vllm.mask_file import Finalist, MaskFile
from llmdrop_vllm.masks.mask import DropMask


class FinalsHeader(Header):
    """What finalists answer, whichever they are."""

    kind: str = "llmdrop-finals"
    tasks: tuple[str, ...]
    limit: int | None
    prompting: Prompting | str
    start: DropMask  # what even the full model goes without


def check_finals(plan: Plan, harness: Harness, finals: Path) -> None:
    """Raise OutputError for a file of finals that were asked otherwise."""
    if finals.exists():
        with appended(finals, _header(plan, harness), Finalist):
            pass


def decide(
    file: MaskFile, masks: Sequence[DropMask], plan: Plan, harness: Harness, finals: Path, *, progress: bool = False
) -> MaskFile:
    """The file with that of these masks that has the best mean score, of equals the first; beside them the full model.

    Each is asked through one engine in which masks are switched, and kept in the file of `finals` at once.
    """
    assert file.evidence is not None, "a search gives evidence"
    base = plan.checkpoint.mask
    with appended(finals, _header(plan, harness), Finalist) as kept:
        known = {each.dropped: each for each in kept.found}
        missing = [mask for mask in (base, *masks) if mask.dropped not in known]
        if missing:
            with any_engines(plan) as engines:
                for mask in tqdm(missing, unit="mask", disable=not progress):
                    with engines.under(mask) as engine:
                        scores, _ = harness.run(engine.harness, bars=False)
                    by_task = {each.task: each.value for each in scores}
                    known[mask.dropped] = Finalist(attention=mask.attention, mlp=mask.mlp, scores=by_task)
                    kept.append([known[mask.dropped]])
    full, *finalists = (known[mask.dropped] for mask in (base, *masks))
    best = max(finalists, key=lambda each: each.mean)
    method = f"search by KL on answers, and {' and '.join(harness.tasks)} between its {len(masks)} best"
    evidence = file.evidence.model_copy(update={"finalists": (full, *finalists)})
    return MaskFile.of(replace(file.mask, attention=best.attention, mlp=best.mlp), method, file.provenance, evidence)


def _header(plan: Plan, harness: Harness) -> FinalsHeader:
    start, provenance = plan.checkpoint.mask, Provenance.of(plan.checkpoint, dtype=plan.settings.dtype)
    return FinalsHeader(
        tasks=harness.tasks, limit=harness.limit, prompting=harness.prompting, start=start, provenance=provenance
    )
