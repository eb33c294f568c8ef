"""What healing regains of real models: findings that a later measurement must not lose unnoticed."""

import json

import pytest

from benchmarks.healing import table
from benchmarks.record import RESULTS

PROSE = json.loads((RESULTS / "healing_prose.json").read_text())["points"]
LINES = json.loads((RESULTS / "healing.json").read_text())["points"]


@pytest.mark.parametrize(
    ("healed", "least"), [("closed form, prose", 0.75), ("closed form, then training, answers", 0.4)]
)
def test_prose_is_regained(healed, least):
    """Of what dropping adds to the perplexity of held-out pages."""
    assert (PROSE["dropped"] - PROSE[healed]) / (PROSE["dropped"] - PROSE["full"]) > least


def test_what_it_is_healed_on_decides():
    kl = {
        each["way"]: each["judged"]["answers"]["kl"] for each in LINES if (each["model"], each["n"]) == ("smollm2", 8)
    }
    assert kl["closed form"] < 0.6 * kl["dropped"]
    assert kl["closed form, text"] > 0.9 * kl["dropped"]
    assert kl["closed form, then training"] < kl["closed form"]


def test_the_page_has_the_table():
    assert (RESULTS / "healing.md").read_text().strip() == table(LINES).strip()
