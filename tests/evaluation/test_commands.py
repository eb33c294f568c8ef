"""`llmdrop evaluate | sweep | recommend` as their user meets them, on the embedded model."""

import json
import re
import shutil

import pytest

import tests.engines  # noqa: F401 - sets the environment before vLLM is imported
from llmdrop_vllm import DropMask
from llmdrop_vllm.artifacts import Scores, read_record, write_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.data.answers import read_answers
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.evaluation.records import Evaluation, Sweep
from llmdrop_vllm.mask_file import MaskFile
from tests.evaluation.sweeps import point, sweep
from tests.quantized import quantize
from tests.tiny import TINY_LLAMA, write_checkpoint

QUICK = ["--context", "32", "--windows", "2", "--divergence-tokens", "32"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The directory of a small sweep."""
    directory = tmp_path_factory.mktemp("results")
    assert main(sweeping(directory)) == 0
    return directory


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A small file of answers."""
    directory = tmp_path_factory.mktemp("answered")
    chat = [{"role": "user", "content": "What is os.path.join?"}]
    lines = [{"messages": chat}, "What is json.dumps?", "What is zip?", {"prompt": "def add("}, {"prompt": [5] * 1024}]
    (directory / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert main(answering(directory, directory / "answers.jsonl")) == 0
    return directory


def answering(directory, out, *options):
    """The command that makes it."""
    asked = ["--prompts", f"{directory}/requests.jsonl", "--max-tokens", "8", "--per-prompt", "2", "--held-out", "30%"]
    return ["answers", str(MODEL), str(out), *asked, *options]


def sweeping(directory, *options):
    """The command that makes it, or goes on in it."""
    command = ["sweep", str(MODEL), "--results", str(directory), "--series", "attention", "--counts", "1,4"]
    scoring = ["--samples", "4", "--seq-len", "64"]
    speed = ["--requests", "2", "--prompt-tokens", "16", "--output-tokens", "4"]
    return [*command, *QUICK, *scoring, *speed, "--tasks", "llmdrop_name", "--limit", "8", *options]


def error_of(capsys):
    """The one line that says what is wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmdrop: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_answers_are_written_shown_and_made_only_once(answered, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    assert main(answering(answered, out)) == 0
    captured = capsys.readouterr()
    header, found = read_answers(out)
    assert found == read_answers(answered / "answers.jsonl")[1]
    tokens = sum(len(each.answer) for each in found)
    cut = sum(each.finish_reason == "length" for each in found)
    assert f"8 answers, {tokens} tokens; {cut} cut at 8 tokens" in captured.out
    held_out = [each for each in found if each.held_out]
    assert f"held out for judging: {len(held_out)} of the answers" in captured.out
    assert {each.prompt_number for each in held_out} < {0, 1, 2, 3}
    assert f"written to {out}; next: llmdrop drop {MODEL} OUT --attention 4 --heal {out}" in captured.out
    warning = "left out are 1 of 5 prompts: no room in the context of 1024 tokens (1)"
    assert f"llmdrop: warning: {warning}\n" in captured.err
    assert " INFO " not in captured.out
    assert [*tmp_path.iterdir()] == [out]
    assert main(answering(answered, out)) == 1
    assert "answers.jsonl exists; choose another name" in error_of(capsys)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("answers.json", [], "has the suffix '.json'; expected .jsonl"),
        ("answers.jsonl", ["--prompts", "missing.jsonl"], "missing.jsonl cannot be read: No such file"),
        ("answers.jsonl", ["--samples", "5"], "holds 4 prompts that can be asked; 5 asked"),
        ("answers.jsonl", ["--temperature", "0"], "2 answers to a prompt asked at temperature 0"),
        ("answers.jsonl", ["--engine-args", '{"max_len": 5}'], "max_len, which vLLM's EngineArgs do not have"),
        ("no/answers.jsonl", [], "no is not a directory that can be written to"),
    ],
)
def test_answers_refuses_before_an_engine_starts_and_leaves_nothing(
    name, options, message, answered, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "llmdrop_vllm.evaluation.answering.running", lambda *_, **__: pytest.fail("an engine was started")
    )
    assert main(answering(answered, tmp_path / name, *options)) == 1
    assert message in error_of(capsys)
    assert [*tmp_path.iterdir()] == []


def test_answers_are_the_full_models(tmp_path, capsys):
    dropped = write_checkpoint(tmp_path / "dropped", TINY_LLAMA | {"drop_attn_list": [5, 2], "drop_mlp_list": []})
    assert main(["answers", str(dropped), f"{tmp_path}/answers.jsonl"]) == 1
    assert "dropped: attention dropped in 2 of 8 layers [2,5], MLP in 0; expected the full model" in error_of(capsys)


def test_answers_that_vllm_does_not_start_for_leave_nothing(answered, tmp_path, capsys):
    options = ["--engine-args", '{"max_num_seqs": 0}']
    assert main(answering(answered, tmp_path / "answers.jsonl", *options)) == 1
    assert f"vLLM does not start with {MODEL}" in error_of(capsys)
    assert [*tmp_path.iterdir()] == []


def test_evaluate_compares_next_tokens_on_a_files_held_out_answers(answered, tmp_path):
    out = tmp_path / "dropped.json"
    command = ["evaluate", str(MODEL), "--attention", "11,7", *QUICK, "--out", str(out)]
    assert main([*command, "--divergence-on", f"{answered}/answers.jsonl"]) == 0
    found = read_record(Evaluation, out).quality.divergence
    held_out = [each for each in read_answers(answered / "answers.jsonl")[1] if each.held_out]
    assert found.tokens == sum(len(each.answer) for each in held_out)
    assert (found.on, found.data.sequences) == ("held-out answers", len(held_out))
    assert found.kl.value > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--divergence-on", "anwsers"], "anwsers cannot be read: No such file"),
        (["--divergence-on", "{answered}/requests.jsonl"], "line 1: provenance: Field required"),
        (["--text", "{answered}/answers.jsonl"], "holds answers; expected text"),
    ],
)
def test_evaluate_takes_answers_for_what_they_are(options, message, answered, tmp_path, capsys):
    given = [each.format(answered=answered) for each in options]
    assert main(["evaluate", str(MODEL), *QUICK, *given, "--out", f"{tmp_path}/out.json"]) == 1
    assert message in error_of(capsys)


def test_a_sweep_tells_what_its_next_tokens_were_compared_on(swept, answered, capsys):
    assert main(sweeping(swept, "--divergence-on", f"{answered}/answers.jsonl")) == 1
    assert "divergence_on was own answers and is held-out answers; choose another directory" in error_of(capsys)


def test_evaluate_writes_what_it_shows_with_lm_evals_own_output_beside_it(tmp_path, capsys):
    out = tmp_path / "dropped.json"
    command = ["evaluate", str(MODEL), "--attention", "11,7", "--tasks", "llmdrop_docstring", "--limit", "8"]
    assert main([*command, *QUICK, "--out", str(out)]) == 0
    found = read_record(Evaluation, out)
    assert found.quality.mask == DropMask(12, attention=(11, 7))
    (task,) = found.quality.tasks
    raw = json.loads((tmp_path / "dropped.lm-eval.json").read_text())
    assert raw["results"]["llmdrop_docstring"]["acc_norm,none"] == task.value
    shown = capsys.readouterr().out
    assert f"{found.quality.perplexity.value:.3f}" in shown
    assert f"{task.value:.1%}" in shown
    assert " INFO " not in shown  # vLLM's account of an engine that starts


def test_evaluate_asks_for_no_float32_of_quantized_weights_whose_kernels_know_none(tmp_path):
    model, out = quantize(MODEL, tmp_path / "model", "GPTQ"), tmp_path / "out.json"
    command = ["evaluate", str(model), "--attention", "11,7", *QUICK, "--divergence-tokens", "0", "--out", str(out)]
    assert main(command) == 0
    assert read_record(Evaluation, out).quality.mask == DropMask(12, attention=(11, 7))


def test_evaluate_leaves_no_task_results_beside_measurements_that_have_none(tmp_path, capsys):
    out, details = tmp_path / "full.json", tmp_path / "full.lm-eval.json"
    details.write_text("of another run")
    command = ["evaluate", str(MODEL), *QUICK, "--divergence-tokens", "0", "--out", str(out)]
    assert main(command) == 1
    assert error_of(capsys).startswith(f"llmdrop: error: {details} exists")
    assert main([*command, "--overwrite"]) == 0
    assert out.exists()
    assert not details.exists()


def test_evaluate_skips_a_task_out_of_reach_and_says_so_in_the_file_and_the_exit_status(tmp_path, capsys, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    out = tmp_path / "dropped.json"
    assert main(["evaluate", str(MODEL), "--tasks", "arc_easy", *QUICK, "--out", str(out)]) == 1
    assert "task arc_easy was skipped" in error_of(capsys)
    assert "no route to the hub" in read_record(Evaluation, out).skipped["arc_easy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "llmdrop_nam"], "the nearest are llmdrop_name"),
        (["--context", "2000"], "expected at most 1023"),
        (["--attention", "12,"], "12"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--engine-args", '{"tensor_paralel_size": 2}'], "tensor_paralel_size, which vLLM's EngineArgs do not have"),
    ],
)
def test_evaluate_refuses_before_an_engine_starts(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "llmdrop_vllm.evaluation.evaluate.running", lambda *a, **k: pytest.fail("an engine was started")
    )
    assert main(["evaluate", str(MODEL), *options, "--out", str(tmp_path / "out.json")]) == 1
    assert message in error_of(capsys)
    assert not (tmp_path / "out.json").exists()


@pytest.fixture(scope="module")
def stripped(tmp_path_factory):
    """Two of the same model, each without another attention, and neither with what it lacks."""
    home = tmp_path_factory.mktemp("stripped")
    for layer in (7, 8):
        assert main(["apply", str(MODEL), str(home / str(layer)), "--attention", f"{layer},"]) == 0
    return home


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--divergence-on", "text"], "lacks what it dropped: agreement and KL want the full model, --full MODEL"),
        (["--full", "{}/8"], "is no full model: attention dropped in 1 of 12 layers [8], MLP in 0"),
    ],
)
def test_evaluate_compares_with_nothing_but_the_full_model(options, message, stripped, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "llmdrop_vllm.evaluation.evaluate.running", lambda *a, **k: pytest.fail("an engine was started")
    )
    options = [each.format(stripped) for each in options]
    assert main(["evaluate", str(stripped / "7"), *options, "--out", str(tmp_path / "out.json")]) == 1
    assert message in error_of(capsys)


def test_evaluate_says_that_nothing_was_compared_and_what_was(stripped, tmp_path, capsys):
    alone, beside = tmp_path / "alone.json", tmp_path / "beside.json"
    assert main(["evaluate", str(stripped / "7"), *QUICK, "--out", str(alone)]) == 0
    assert "llmdrop: warning: " in (said := capsys.readouterr().err)
    assert "agreement and KL want the full model" in said
    assert read_record(Evaluation, alone).full is None
    assert read_record(Evaluation, alone).full_perplexity is None
    on = ["--divergence-on", "text", "--full", str(MODEL)]
    assert main(["evaluate", str(stripped / "7"), *QUICK, *on, "--out", str(beside)]) == 0
    captured = capsys.readouterr()
    assert "agreement and KL want" not in captured.err
    found = read_record(Evaluation, beside)
    assert found.full.fingerprint == Checkpoint.open(MODEL).fingerprint
    assert found.quality.divergence.kl.value > 0
    full = tmp_path / "full.json"
    assert main(["evaluate", str(MODEL), *QUICK, "--divergence-tokens", "0", "--out", str(full)]) == 0
    of_full = read_record(Evaluation, full).quality.perplexity
    assert found.full_perplexity == of_full
    assert re.search(rf"of the full model *│ *{of_full.value:.3f} ", captured.out)


def test_evaluate_says_in_one_line_what_vllm_does_not_start_with(tmp_path, capsys):
    options = ["--divergence-tokens", "0", "--engine-args", '{"max_model_len": 5000}', "--out", f"{tmp_path}/out.json"]
    assert main(["evaluate", str(MODEL), *QUICK, *options]) == 1
    assert f"vLLM does not start with {MODEL}" in error_of(capsys)


def test_evaluate_refuses_a_mask_of_another_model(tmp_path, capsys):
    other = sweep().provenance
    mask = MaskFile.of(DropMask(12, (1,)), "by hand", provenance=other)
    write_record(mask, tmp_path / "mask.json")
    command = ["evaluate", str(MODEL), "--mask", str(tmp_path / "mask.json"), "--out", str(tmp_path / "out.json")]
    assert main(command) == 1
    assert "has other weights" in error_of(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--series", "atention"], "series atention is unknown"),
        (["--series", "mlp", "--counts", "13"], "none of 13 can be dropped"),
        (["--prompt-tokens", "1000", "--output-tokens", "25"], "are 1025 together; the model's context is 1024"),
    ],
)
def test_sweep_refuses_before_it_scores_and_leaves_nothing(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llmdrop_vllm.cli.scoring.Scoring.run", lambda *a: pytest.fail("the model was scored"))
    assert main(["sweep", str(MODEL), "--results", str(tmp_path / "results"), *options]) == 1
    assert message in error_of(capsys)
    assert not (tmp_path / "results").exists()


def test_sweep_refuses_a_place_for_its_results_that_is_a_file_before_it_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llmdrop_vllm.cli.scoring.Scoring.run", lambda *a: pytest.fail("the model was scored"))
    (tmp_path / "file").write_text("")
    assert main(sweeping(tmp_path / "file")) == 1
    assert "file cannot be made: File exists" in error_of(capsys)


def test_sweep_does_not_go_on_with_scores_of_other_text_than_it_is_told(swept, capsys):
    assert main(sweeping(swept, "--samples", "8")) == 1
    assert "scores.json was measured otherwise: sequences was 4 and is 8" in error_of(capsys)
    assert main(sweeping(swept, "--after-healing")) == 1
    assert "scores.json was measured otherwise: after_healing was False and is True" in error_of(capsys)


def test_scores_that_a_sweep_refuses_do_not_take_the_place_of_its_own(swept, tmp_path, capsys):
    before, scores = (swept / "scores.json").read_bytes(), read_record(Scores, swept / "scores.json")
    other = scores.similarity.model_copy(update={"attention": scores.similarity.attention[::-1]})
    write_record(scores.model_copy(update={"similarity": other}), tmp_path / "other.json")
    assert main(sweeping(swept, "--scores", str(tmp_path / "other.json"))) == 1
    assert "scores_sha256 was" in error_of(capsys)
    assert (swept / "scores.json").read_bytes() == before


def test_a_finished_sweep_says_where_its_report_comes_from(swept, capsys):
    assert main(sweeping(swept)) == 0
    assert f"next: llmdrop report {MODEL} --results {swept}" in capsys.readouterr().out


def test_sweep_refuses_scores_of_another_model(swept, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "model", TINY_LLAMA)
    (tmp_path / "ids.json").write_text("[[1, 2, 3, 4]]")
    command = ["sweep", str(path), "--results", str(tmp_path / "results"), "--text", str(tmp_path / "ids.json")]
    assert main([*command, "--scores", str(swept / "scores.json")]) == 1
    assert "the scores are of" in error_of(capsys)


def test_sweep_keeps_scores_points_and_lm_evals_output(swept):
    found = read_record(Sweep, swept / "sweep.json")
    assert [len(each.quality.tasks) for each in found.points.values()] == [1, 1, 1]
    assert {path.stem for path in (swept / "lm-eval").iterdir()} == found.points.keys()
    assert (swept / "scores.json").exists()


def test_recommend_writes_a_mask_that_apply_takes(swept, tmp_path, capsys):
    mask_file = tmp_path / "mask.json"
    command = ["recommend", str(MODEL), "--results", str(swept), "--kv-budget", "70%"]
    assert main([*command, "--out", str(mask_file)]) == 0
    assert len(read_record(MaskFile, mask_file).mask.attention) == 4
    assert "recommended for a KV cache of at most 70%: attention dropped in 4 of 12" in capsys.readouterr().out
    assert main(["apply", str(MODEL), str(tmp_path / "out"), "--mask", str(mask_file)]) == 0


def test_recommend_shows_the_nearest_and_fails_where_nothing_meets_the_goal(swept, tmp_path, capsys):
    command = [
        "recommend",
        str(MODEL),
        "--results",
        str(swept),
        "--kv-budget",
        "10%",
        "--out",
        str(tmp_path / "mask.json"),
    ]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "nearest for a KV cache of at most 10%: attention dropped in 4 of 12" in captured.out
    assert "no point of the sweep has a KV cache of at most 10%" in captured.err
    assert not (tmp_path / "mask.json").exists()


def test_recommend_says_where_generation_was_not_measured(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "model", TINY_LLAMA)
    from llmdrop_vllm.checkpoints.checkpoint import Checkpoint

    found = sweep(point(DropMask(8, (1,)), generation=None, kv_share=0.5), full=point(DropMask(8), generation=None))
    request = found.request.model_copy(update={"fingerprint": Checkpoint.open(path).fingerprint})
    write_record(found.model_copy(update={"request": request}), tmp_path / "sweep.json")
    assert main(["recommend", str(path), "--results", str(tmp_path), "--kv-budget", "50%"]) == 0
    assert "measured no generation task" in capsys.readouterr().out


def test_results_of_another_model_and_missing_ones_are_refused(swept, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "other", TINY_LLAMA)
    assert main(["recommend", str(other), "--results", str(swept), "--kv-budget", "50%"]) == 1
    assert "is of the weights" in error_of(capsys)
    assert main(["recommend", str(MODEL), "--results", str(tmp_path), "--kv-budget", "50%"]) == 1
    assert "run `llmdrop sweep" in error_of(capsys)


def test_a_precision_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", str(MODEL), "--dtype", "fp8", "--out", "out.json"])
    assert "choose from 'float32', 'bfloat16', 'float16'" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1", "1.5.2%", "half"])
def test_a_share_without_a_unit_is_refused(value, capsys):
    with pytest.raises(SystemExit):
        main(["recommend", str(MODEL), "--max-loss", value])
    assert "is not a share such as 1% or 0.01" in capsys.readouterr().err


def test_a_healed_point_of_the_sweep_is_drawn_beside_it(swept, tmp_path, capsys):
    results, out, evaluation = tmp_path / "results", tmp_path / "out", tmp_path / "healed.json"
    shutil.copytree(swept, results)
    series = read_record(Sweep, results / "sweep.json").series[0]
    mask = read_record(Sweep, results / "sweep.json").points[series.steps[4]].quality.mask
    dropped = str(tmp_path / "dropped")
    assert main(["apply", str(MODEL), dropped, "--attention", ",".join(map(str, mask.attention))]) == 0
    text = ("--data", "embedded", "--samples", "24", "--seq-len", "64")
    assert main(["heal", dropped, str(out), "--teacher", str(MODEL), *text]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert "healed: 4 layers healed on" in capsys.readouterr().out
    asked = (*QUICK, "--tasks", "llmdrop_name", "--limit", "8")
    assert main(["evaluate", str(out), "--full", str(MODEL), "--out", str(evaluation), *asked]) == 0
    assert read_record(Evaluation, evaluation).healed == "healed"
    assert main(["report", str(MODEL), "--results", str(results), "--healed", str(evaluation)]) == 0
    assert "attention, healed" in (results / "report.html").read_text()
