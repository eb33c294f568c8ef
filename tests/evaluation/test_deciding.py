"""Tasks decide between masks: the best mean, of equals the first, and nothing is asked twice."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from llmdrop_vllm.artifacts import ModelIdentity, Provenance
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.errors import OutputError
from llmdrop_vllm.evaluation import deciding
from llmdrop_vllm.evaluation.deciding import check_finals, decide
from llmdrop_vllm.mask_file import Evidence, MaskFile
from llmdrop_vllm.masks.mask import DropMask

FULL, FIRST, SECOND, THIRD = (DropMask(12, gone) for gone in ((), (1,), (2,), (3,)))


class Asked:
    """Engines and a harness in one, that know a score of each mask; `fails` under one of them."""

    tasks, prompting = ("a", "b"), "auto"

    def __init__(self, scores, fails=None, limit=None):
        self.scores, self.fails, self.limit, self.asked = scores, fails, limit, []

    @contextmanager
    def under(self, mask):
        yield SimpleNamespace(harness=mask)

    def run(self, mask, *, bars):
        if mask == self.fails:
            raise KeyboardInterrupt
        self.asked.append(mask)
        return [
            SimpleNamespace(task=task, value=value) for task, value in zip("ab", self.scores[mask], strict=True)
        ], {}


@pytest.fixture
def decided(tmp_path, monkeypatch):
    """By these scores, with what was asked."""
    checkpoint = Checkpoint.open(MODEL)
    plan = SimpleNamespace(checkpoint=checkpoint, settings=SimpleNamespace(dtype="float32"))
    evidence = Evidence(judged=9, tokens=9, held_out_prompts=9, held_out_tokens=9, heal_aware=False, compared=())
    file = MaskFile.of(FIRST, "search", Provenance(model=ModelIdentity.of(checkpoint)), evidence)

    def decided(scores, fails=None, limit=None):
        asked = Asked(dict(zip((FULL, FIRST, SECOND, THIRD), scores, strict=True)), fails, limit)
        monkeypatch.setattr(deciding, "any_engines", lambda _: nullcontext(asked))
        finals = tmp_path / "finals.jsonl"
        check_finals(plan, asked, finals)
        return decide(file, (FIRST, SECOND, THIRD), plan, asked, finals), asked.asked

    return decided


def test_the_best_mean_wins_and_the_full_model_does_not_compete(decided):
    file, asked = decided([(0.9, 0.9), (0.5, 0.1), (0.2, 0.6), (0.3, 0.4)])
    assert file.mask == SECOND
    assert asked == [FULL, FIRST, SECOND, THIRD]
    assert [each.mean for each in file.evidence.finalists] == pytest.approx([0.9, 0.3, 0.4, 0.35])
    assert file.method == "search by KL on answers, and a and b between its 3 best"


def test_of_equals_the_first(decided):
    assert decided([(0.9, 0.9), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25)])[0].mask == FIRST


def test_what_was_asked_before_an_interruption_is_not_asked_again(decided):
    scores = [(0.9, 0.9), (0.5, 0.1), (0.2, 0.5), (0.3, 0.9)]
    with pytest.raises(KeyboardInterrupt):
        decided(scores, fails=SECOND)
    file, asked = decided(scores)
    assert (file.mask, asked) == (THIRD, [SECOND, THIRD])
    with pytest.raises(OutputError, match="was written with another limit"):
        decided(scores, limit=3)
