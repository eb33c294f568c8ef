"""What is left of a run that did not reach its end."""

import json

import pytest

from benchmarks import throughput
from benchmarks.contenders import ContenderError
from benchmarks.record import RESULTS


def test_what_was_measured_before_a_contender_died_is_written_and_the_rest_is_named(monkeypatch, tmp_path, capsys):
    measured = json.loads((RESULTS / "throughput-cpu-small.json").read_bytes())["lines"][:3]

    def dying(plan, lineup):
        yield from measured
        raise ContenderError("vLLM no-op has ended: out of memory")

    monkeypatch.setattr(throughput, "measure", dying)
    monkeypatch.setattr(throughput, "write_random", lambda *_: tmp_path)
    out = tmp_path / "found.json"
    with pytest.raises(SystemExit, match="throughput: error: vLLM no-op has ended: out of memory"):
        throughput.main(["--workloads", "chats,paper", "--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_bytes())
    assert found["lines"] == measured
    assert found["not_measured"] == ["paper, 8 x (64 + 64)", "paper, 32 x (64 + 64)", "chats, 64 x (32 + 8), 16 shared"]
    assert found["worst_speedup_over"].keys() == {"vLLM no-op"}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["not_measured"] == found["not_measured"]
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 3
    assert out.with_suffix(".md").exists()
