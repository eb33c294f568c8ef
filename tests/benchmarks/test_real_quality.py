"""The figures of real models: what is read, how it is told, and that the results page tells what was measured."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import real_quality
from benchmarks.real_quality import line, main, prose, table
from llmdrop_vllm import DropMask, InputError
from llmdrop_vllm.artifacts import read_record
from llmdrop_vllm.evaluation.records import Sweep, mask_id
from tests.evaluation.sweeps import DEPTH, point

RESULTS = Path(real_quality.__file__).with_name("results")
POINTS = json.loads((RESULTS / "real_quality.json").read_text())["points"]


def test_prose_is_what_pages_say_and_no_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(real_quality, "HANDBOOK", tmp_path)
    with pytest.raises(InputError, match="apt-get install debian-handbook"):
        prose(tmp_path / "prose.txt")
    page = (
        "<html><head><title>no</title></head><body><p>One&amp;<b>two</b>\n three.</p><pre># rm</pre>four</body></html>"
    )
    (tmp_path / "a.html").write_text(page)
    assert prose(tmp_path / "prose.txt").read_text() == "One&two three.four"


def test_a_line_has_what_was_measured():
    found = line("m", "attention", 1, point(DropMask(DEPTH, (6,))), 7.123, None)
    assert (found["dropped"], found["n"], found["code_perplexity"], found["multiple_choice"]) == (
        "attention",
        1,
        7.12,
        None,
    )
    assert "| m | attention | 1 |" in table([found])


def test_unknown_models_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["real_quality.py", "--models", "smollm3"])
    with pytest.raises(SystemExit, match="--models names smollm3; expected smollm2, qwen2.5-coder-1.5b"):
        main()


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-coder-1.5b"])
def test_the_table_is_of_the_sweeps_that_stand_beside_it(name):
    sweep = read_record(Sweep, RESULTS / "real" / name / "sweep.json")
    on_code = json.loads((RESULTS / "real" / name / "code.json").read_text())
    told = {(each["dropped"], each["n"]): each for each in POINTS if each["model"] == name}
    for series in sweep.series:
        for n, each in sweep.of(series):
            mine = line(name, series.name, n, each, on_code[mask_id(each.quality.mask)], None)
            key = (mine["dropped"], n)
            assert told[key] | {"multiple_choice": None} == mine


def test_the_results_page_says_what_was_measured():
    page = (RESULTS.parents[1] / "docs" / "results.md").read_text()
    rows = re.findall(r"^\| (SmolLM2|Qwen2.5-Coder) \| (\d+) of \d+ \| (.*) \|$", page, flags=re.MULTILINE)
    names = {"SmolLM2": "smollm2", "Qwen2.5-Coder": "qwen2.5-coder-1.5b"}
    assert len(rows) >= 8
    for model, n, cells in rows:
        what = "attention" if int(n) else "nothing"
        each = next(p for p in POINTS if (p["model"], p["dropped"], p["n"]) == (names[model], what, int(n)))
        shares = [each[key] for key in ("agreement", "reasoning", "humaneval", "multiple_choice")]
        told = [f"{each['prose_perplexity']:.1f}", f"{each['code_perplexity']:.1f}"]
        assert cells == " | ".join([*told, *("" if share is None else f"{share:.1%}" for share in shares)])
