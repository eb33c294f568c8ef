"""Every script in seconds: structure, not speed."""

import json

import pytest

from benchmarks import kv_capacity, load, plots, record, throughput
from benchmarks.lineup import NO_OP, OURS, STOCK, TRANSFORMERS

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Where the benchmarks have written what they found: beside what was measured in earnest, not over it."""
    directory = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "RESULTS", directory)
        for script in (throughput, kv_capacity, load):
            script.main(["--smoke"])
    return directory


def test_throughput_measures_four_contenders_that_agree(results):
    result = json.loads((results / "throughput-smoke.json").read_bytes())
    assert result["skipped"] == {}
    assert [line["variant"] for line in result["lines"]] == [STOCK, OURS, NO_OP, TRANSFORMERS]
    assert all(line["max_logprob_difference"] < 1e-4 for line in result["lines"])
    full, ours, no_op, theirs = result["lines"]
    assert ours["kv_tokens"] == no_op["kv_tokens"] == 2 * full["kv_tokens"]
    assert theirs["kv_tokens"] is None
    for line in result["lines"]:
        for part in ("total", "prefill", "decode"):
            assert line[part]["ratio"] == pytest.approx(line[part]["speedup"] / line[part]["predicted_speedup"])
    assert {"command", "versions", "machine", "ceilings", "worst_speedup_over"} <= result.keys()


def test_json_lines_have_provenance_and_the_table_a_row_for_each(results):
    lines = [json.loads(line) for line in (results / "throughput-smoke.jsonl").read_text().splitlines()]
    assert [line["shape"] for line in lines] == ["smoke"] * 4
    assert all({"command", "versions", "machine"} <= line.keys() for line in lines)
    table = (results / "throughput-smoke.md").read_text()
    assert all(f"| {line['label']} | {line['contender']} |" in table for line in lines)


def test_kv_capacity_is_as_predicted_and_requests_wait_where_it_is_short(results):
    result = json.loads((results / "kv_capacity-smoke.json").read_bytes())
    assert result["all_exact"]
    full, half = (each for each in result["capacity"] if "gain_measured" in each)
    assert half["gain_measured"] == pytest.approx(2, rel=1e-3)
    stock, ours = result["when_short"]["lines"]
    assert stock["running"] == 4
    assert ours["running"] > 4
    assert (results / "kv_capacity-smoke.md").read_text().count("| cpu-small |") == len(result["capacity"])


def test_under_load_nothing_fails_and_the_full_model_has_room_for_half_as_many_requests(results):
    result = json.loads((results / "load-smoke.json").read_bytes())
    assert result["failures"] == 0
    assert result["requests_that_fit"] == {"vLLM, full": 2, "llmdrop, attention 2": 5}
    *_, full, ours = result["lines"]
    assert [line["variant"] for line in result["lines"]] == [STOCK, OURS] * 2
    assert (full["rate_per_s"], full["rate_of_saturation"]) == (None, None)
    assert full["queue_s"] > 0
    for line in (full, ours):
        assert len(line["runs"]) == result["repeats"] == 2
        assert line["output_tokens_per_s"] == pytest.approx(8 * line["requests_per_s"], rel=0.05)
        assert 0 < line["ttft_s"]["median"] <= line["ttft_s"]["p95"] <= line["e2e_s"]["p95"]
    assert len((results / "load-smoke.jsonl").read_text().splitlines()) == 4
    assert (results / "load-smoke.md").read_text().count("| all at once |") == 2


def test_pictures_are_drawn_from_whatever_is_there(results, capsys):
    plots.main(["--results", str(results), "--out", str(results)])
    assert "no speedup picture: it needs a run with --table paper" in capsys.readouterr().out
    for name in ("kv_capacity-smoke-fits.svg", "load-smoke-ttft.svg"):
        assert b"<svg" in (results / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shape llama-9", "unknown shape 'llama-9'"),
        ("--attention 8", "attention 8 does not fit cpu-small: expected 1 to 7 of 8"),
        ("--workloads nap", "unknown workload 'nap'"),
        ("--scale 1", "a request of long-context, 4 x .* has 16640 tokens, and the full model holds 4369"),
        ("--mask nowhere.json", "nowhere.json cannot be read"),
        ("--layers 4 --mask {mask}", "is for 8 layers; cpu-small has 4"),
    ],
)
def test_bad_input_ends_with_one_line_before_anything_slow(options, message, tmp_path):
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps({"num_hidden_layers": 8, "attention": [3], "method": "by hand"}))
    with pytest.raises(SystemExit, match=f"throughput: error: .*{message}"):
        throughput.main(["--device", "cpu", *options.format(mask=mask).split()])
