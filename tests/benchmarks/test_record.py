"""A result ends in files that belong together and in one line, whatever becomes of the files."""

import json

import pytest

from benchmarks import record
from benchmarks.record import finish
from llmdrop_vllm import InputError

RESULT = {"benchmark": "any", "shape": "smoke", "layers": 4}


def test_a_result_goes_among_the_results_under_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    finish("any-smoke", RESULT, None)
    assert [path.name for path in tmp_path.iterdir()] == ["any-smoke.json"]
    written = json.loads((tmp_path / "any-smoke.json").read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert RESULT.items() <= written.items()
    assert {"command", "versions", "machine"} == written.keys() - RESULT.keys()


def test_table_and_lines_stand_beside_it_each_line_with_where_it_comes_from(tmp_path):
    finish("unused", RESULT, tmp_path / "found.json", lines=[{"n": 1}, {"n": 2}], table="| a |\n")
    assert (tmp_path / "found.md").read_text() == "| a |\n"
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == [1, 2]
    assert all({"shape", "layers", "command", "versions", "machine"} <= line.keys() for line in lines)
    assert json.loads((tmp_path / "found.json").read_text())["lines"] == [{"n": 1}, {"n": 2}]


def test_what_was_measured_is_printed_where_it_cannot_be_written(tmp_path, capsys):
    with pytest.raises(InputError, match="found.json cannot be written"):
        finish("unused", RESULT, tmp_path / "gone" / "found.json")
    assert json.loads(capsys.readouterr().out)["benchmark"] == "any"
