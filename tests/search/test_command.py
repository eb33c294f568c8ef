"""`llmdrop search` from one end to the other, on the embedded model."""

import json
import re
from shutil import copy
from unittest.mock import Mock

import numpy as np
import pytest

from llmdrop_vllm.artifacts import EVALUATION_FILE, ModelIdentity, Provenance, Scores, read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.evaluation.goals import Sizes
from llmdrop_vllm.evaluation.records import Evaluation
from llmdrop_vllm.healing.records import Healing
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.judge import Judge
from tests.data.files import answer, write_answers
from tests.engines import quick
from tests.quantized import quantize
from tests.search.conftest import SMALL


def found(tmp_path):
    return read_record(MaskFile, tmp_path / "mask.json")


def test_a_mask_is_found_that_every_command_takes_and_cosines_is_never_better(command, tmp_path, capsys):
    assert main([*command, "--attention", "3", "--mlp", "1", "--masks", "220"]) == 0
    printed = capsys.readouterr().out
    file = found(tmp_path)
    by_name = {each.name: each for each in file.evidence.compared}
    assert (len(file.attention), len(file.mlp)) == (3, 1)
    assert next(iter(by_name)) == "cosine"
    ways = "least lost alone", "greedy backward from these", "greedy backward from cosine's", "greedy forward"
    assert {*ways} <= by_name.keys()
    best = min(by_name.values(), key=lambda each: each.held_out_kl)
    assert (best.attention, best.mlp) == (file.attention, file.mlp)
    assert best.held_out_interval[0] < best.held_out_kl < best.held_out_interval[1]
    assert f"KL {by_name['cosine'].held_out_kl:.4f}" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.json", "mask.trials.jsonl"]

    assert main(["apply", str(MODEL), str(tmp_path / "out"), "--mask", str(tmp_path / "mask.json")]) == 0
    assert Checkpoint.open(tmp_path / "out").mask == file.mask


def test_an_interrupted_search_goes_on_and_finds_the_same(command, tmp_path, monkeypatch, capsys):
    whole = [*command, "--attention", "2"]
    whole[whole.index("--out") + 1] = str(tmp_path / "whole.json")
    assert main(whole) == 0

    judge, calls, killed = Judge.divergences, [], []

    def interrupted(self, mask, chunks=None):
        calls.append(mask.dropped)
        if len(calls) == 20 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        return judge(self, mask, chunks)

    monkeypatch.setattr(Judge, "divergences", interrupted)
    assert main([*command, "--attention", "2"]) == 130
    printed = capsys.readouterr()
    assert re.search(r"best so far, of \d+ masks: attention dropped in 2 of 12 layers", printed.out + printed.err)
    before = len(calls)
    assert main([*command, "--attention", "2"]) == 0
    expected = read_record(MaskFile, tmp_path / "whole.json")
    assert (found(tmp_path).mask, found(tmp_path).evidence) == (expected.mask, expected.evidence)
    trials = (tmp_path / "whole.trials.jsonl").read_text().splitlines()
    assert len(calls) - before == len(trials) - before  # of the second run, what the first had not judged

    # And for another number of sublayers: what is known of smaller masks is not asked again.
    del calls[:]
    assert main([*command, "--attention", "3", "--overwrite"]) == 0
    assert all(len(attention) != 1 for attention, _ in calls)


def test_of_quantized_weights_a_mask_is_found_and_none_that_healing_would_mend(tmp_path, capsys):
    model = quantize(MODEL, tmp_path / "model", "W4A16")
    rng = np.random.default_rng(0)
    said = [answer(number, [5], rng.integers(5, 500, 20).tolist(), held_out=number % 2 == 0) for number in range(8)]
    provenance = Provenance(model=ModelIdentity.of(Checkpoint.open(model)))
    answers = write_answers(tmp_path / "answers.jsonl", said, provenance=provenance)
    asked = ["search", str(model), "--answers", str(answers), "--out", str(tmp_path / "mask.json"), "--attention", "2"]
    sizes = ["--masks", "3", "--tokens", "60", "--held-out-tokens", "60"]
    assert main([*asked, *sizes, "--heal-aware", "60"]) == 1
    assert "is quantized; heal in plain weights" in capsys.readouterr().err
    assert main([*asked, *sizes]) == 0
    assert len(found(tmp_path).attention) == 2


def test_each_step_can_be_judged_on_what_healing_mended(command, tmp_path, capsys):
    assert main([*command, "--attention", "2", "--heal-aware", "200"]) == 0
    file = found(tmp_path)
    assert file.evidence.heal_aware
    assert [each.name for each in file.evidence.compared] == ["cosine", "greedy forward, healed at each step"]
    trials = (tmp_path / "mask.trials.jsonl").read_text()
    assert '"mended":null' in trials
    assert f'"mended":{{"num_hidden_layers":12,"attention":{json.dumps(file.attention[:1])}' in trials.replace(" ", "")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--attention", "12"), "12 attention sublayers asked; 11 can go"),
        (("--attention", "4", "--protect", "0,1,2,3,4,5,6,7,8"), "4 attention sublayers asked; 3 can go"),
        ((), "nothing is left to search"),
        (("--attention", "2", "--beam", "2", "--heal-aware"), "--beam and --heal-aware exclude each other"),
        (("--attention", "2", "--seed", "-1"), "--seed is -1"),
        (("--kv-budget", "99%", "--fixed", "1,2"), "is met by attention dropped in 2 of 12 layers"),
        (("--attention", "2", "--answers", __file__), "does not hold answers"),
        (("--attention", "2", "--scores", "none.json"), "none.json cannot be read"),
    ],
)
def test_what_cannot_be_searched_for_is_refused_at_once(asked, message, command, tmp_path, capsys):
    assert main([*command, *asked]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_answers_and_scores_of_other_weights_are_refused(answers, tmp_path, capsys):
    other = write_answers(tmp_path / "other.jsonl")
    command = ["search", str(MODEL), "--attention", "2", "--out", str(tmp_path / "mask.json")]
    assert main([*command, "--answers", str(other)]) == 1
    assert "holds answers of /models/tiny (weights f00d)" in capsys.readouterr().err
    scores = Scores.unmeasured(Checkpoint.open(MODEL))
    model = scores.provenance.model.model_copy(update={"fingerprint": "beef"})
    provenance = scores.provenance.model_copy(update={"model": model})
    path = tmp_path / "scores.json"
    path.write_text(scores.model_copy(update={"provenance": provenance}).model_dump_json())
    assert main([*command, "--answers", str(answers), "--scores", str(path)]) == 1
    assert "the scores are of beef" in capsys.readouterr().err


def test_trials_of_a_search_on_other_answers_are_not_gone_on_with(command, tmp_path, capsys):
    assert main([*command, "--attention", "1"]) == 0
    before = (tmp_path / "mask.trials.jsonl").read_bytes()
    assert main([*command, "--attention", "1", "--overwrite", "--tokens", "100"]) == 1
    assert "was written with another answers" in capsys.readouterr().err
    assert (tmp_path / "mask.trials.jsonl").read_bytes() == before
    assert found(tmp_path).evidence is not None


def test_dropping_can_search_and_heal_at_once(answers, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["drop", str(MODEL), str(out), "--attention", "2", "--search", "--heal", str(answers), *SMALL]
    assert main(command) == 0
    assert "masks judged on" in capsys.readouterr().out
    file, scores = read_record(MaskFile, out / "llmdrop_mask.json"), read_record(Scores, out / "llmdrop_scores.json")
    assert file.evidence.judged > 20
    assert Checkpoint.open(out).mask == file.mask
    assert (out / "llmdrop_heal.json").exists()
    # Sublayers are compared on what healing mends, unless other data is named.
    assert scores.provenance.data.source == str(answers)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_dropping_can_end_with_what_it_cost(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["drop", str(MODEL), str(out), "--attention", "2", "--samples", "4", "--seq-len", "64", "--evaluate"]
    with quick():
        assert main(command) == 0
    found = read_record(Evaluation, out / EVALUATION_FILE)
    assert found.quality.divergence.kl.value > 0
    assert "KL, nats" in capsys.readouterr().out
    # What is made of it has other answers.
    assert main(["convert", str(out), str(tmp_path / "other"), "--dialect", "llm-drop"]) == 0
    assert not (tmp_path / "other" / EVALUATION_FILE).exists()


def test_what_cannot_be_measured_is_refused_before_anything_is_scored(tmp_path, capsys, monkeypatch):
    mute = tmp_path / "mute"
    mute.mkdir()
    for file in MODEL.iterdir():
        if file.is_file() and "token" not in file.name and file.suffix != ".jinja":
            copy(file, mute)
    scoring = Mock(side_effect=AssertionError("scored"))
    monkeypatch.setattr("llmdrop_vllm.cli.scoring.Scoring.kept", scoring)
    assert main(["drop", str(mute), str(tmp_path / "out"), "--attention", "2", "--evaluate"]) == 1
    assert "tokenizer" in capsys.readouterr().err


def test_what_is_healed_on_is_what_was_named(answers, tmp_path, monkeypatch):
    """Not what masks are searched for on."""
    monkeypatch.setattr("llmdrop_vllm.cli.healing_commands.ask", lambda checkpoint, path, args: copy(answers, path))
    command = ["drop", str(MODEL), str(tmp_path / "out"), "--attention", "2", "--search", "--heal", "embedded", *SMALL]
    assert main([*command, "--samples", "8", "--seq-len", "64"]) == 0
    record = read_record(Healing, tmp_path / "out" / "llmdrop_heal.json")
    assert record.provenance.data.source == "embedded"


def test_all_that_may_go_can_go(command, tmp_path):
    assert main([*command, "--attention", "3", "--protect", "0,1,2,3,4,5,6,7,8"]) == 0
    assert {*found(tmp_path).attention} == {9, 10, 11}


def test_options_of_a_search_without_one_are_refused(tmp_path, capsys):
    command = ["drop", str(MODEL), str(tmp_path / "out"), "--attention", "2", "--heal-aware", "--masks", "9"]
    assert main(command) == 1
    assert "--masks, --heal-aware belong to --search" in capsys.readouterr().err


def test_what_a_search_does_not_choose_is_refused(tmp_path, capsys):
    command = ["drop", str(MODEL), str(tmp_path / "out"), "--search", "--attention", "2", "--consecutive", "2"]
    assert main(command) == 1
    assert "--consecutive cannot be searched for" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dropped_checkpoint_is_searched_for_what_more_may_go(tmp_path):
    """It is its own full model: what it lacks stays away."""
    assert main(["apply", str(MODEL), str(tmp_path / "dropped"), "--attention", "7,11"]) == 0
    dropped = Checkpoint.open(tmp_path / "dropped")
    rng = np.random.default_rng(0)
    said = [
        answer(n, rng.integers(5, 500, 6).tolist(), rng.integers(5, 500, 26).tolist(), held_out=n < 4)
        for n in range(12)
    ]
    path = write_answers(tmp_path / "answers.jsonl", said, provenance=Provenance(model=ModelIdentity.of(dropped)))
    command = ["search", str(dropped.directory), "--answers", str(path), "--out", str(tmp_path / "mask.json"), *SMALL]
    assert main([*command, "--attention", "1"]) == 0
    assert found(tmp_path).attention[:2] == (7, 11)
    assert len(found(tmp_path).attention) == 3
    assert all(each.attention[:2] == (7, 11) for each in found(tmp_path).evidence.compared)


@pytest.mark.parametrize(
    ("goal", "gone"),
    [
        (("--kv-budget", "75%"), 3),
        # 11 MiB of float32 weights at most, and 16 x 16 tokens x 2 x values of 12 layers for a request.
        (("--requests", "700", "--memory", "48MiB", "--context", "64"), None),
        (("--decode-speedup", "1.05", "--batch", "4", "--context", "256"), None),
    ],
)
def test_a_goal_tells_how_many_go(goal, gone, command, tmp_path):
    assert main([*command, *goal]) == 0
    file, checkpoint = found(tmp_path), Checkpoint.open(MODEL)
    sizes = Sizes(checkpoint, 64 if "--requests" in goal else 256)
    value = {
        "--kv-budget": lambda mask: -sizes.kv_share(mask),
        "--requests": lambda mask: sizes.requests(mask, 48 * 2**20),
        "--decode-speedup": lambda mask: sizes.step_bytes(checkpoint.mask, 4) / sizes.step_bytes(mask, 4),
    }[goal[0]]
    least = {"--kv-budget": -0.75, "--requests": 700, "--decode-speedup": 1.05}[goal[0]]
    assert value(file.mask) >= least
    fewer = DropMask(12, file.attention[:-1], file.mlp)
    assert value(fewer) < least
    assert gone in (None, len(file.attention))
    # The numbers of attentions and MLPs are those by which cosine's mask loses least.
    by_cosine = [each for each in file.evidence.compared if each.name.startswith("cosine")]
    assert all(value(DropMask(12, each.attention, each.mlp)) >= least for each in by_cosine)
    best = min(by_cosine, key=lambda each: each.kl)
    assert (len(file.attention), len(file.mlp)) == (len(best.attention), len(best.mlp))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--kv-budget", "1%"), "at best the KV cache is 8% of the full one, with"),
        (("--kv-budget", "50%", "--attention", "3"), "--attention is how many go, which --kv-budget"),
        (("--kv-budget", "50%", "--requests", "3"), "exclude each other"),
        (("--decode-speedup", "99"), "at best decoding 8 requests of 1,024 tokens is"),
        (("--requests", "9", "--context", "4096"), "requests of 4096 tokens asked; expected 1 to 1024"),
    ],
)
def test_goals_that_cannot_be_met_are_refused_at_once(asked, message, command, tmp_path, capsys):
    assert main([*command, *asked]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_goes_in_any_case_is_in_every_mask(command, tmp_path, capsys):
    assert main([*command, "--attention", "3", "--fixed", "2,0"]) == 0
    assert all(each.attention[:2] == (2, 0) for each in found(tmp_path).evidence.compared)
    assert len(found(tmp_path).attention) == 3
    # The trials are those of any search on these answers.
    assert main([*command, "--attention", "1", "--overwrite"]) == 0
    assert main([*command, "--attention", "1", "--fixed", "2,0", "--overwrite"]) == 1
    assert "--attention is 1, and 2 go in any case (--fixed)" in capsys.readouterr().err
    assert main([*command, "--attention", "3", "--fixed", "2,0", "--protect", "0", "--overwrite"]) == 1
    assert "layers [0] are in --protect and in --fixed" in capsys.readouterr().err


def test_each_pipeline_stage_keeps_an_attention(command, tmp_path, capsys):
    assert main([*command, "--attention", "9", "--pipeline-parallel-size", "4"]) == 1
    assert "9 attention sublayers asked; 8 can go (12 layers; pipeline stages: 4)" in capsys.readouterr().err
    assert main([*command, "--kv-budget", "20%", "--pipeline-parallel-size", "4"]) == 1
    assert "at best the KV cache is 33% of the full one" in capsys.readouterr().err
    assert main([*command, "--attention", "8", "--pipeline-parallel-size", "4", "--masks", "20"]) == 0
    assert len(found(tmp_path).attention) == 8


def test_dropping_finds_out_how_many_a_budget_takes(answers, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["drop", str(MODEL), str(out), "--kv-budget", "75%", "--search", "--heal", str(answers), *SMALL]
    assert main([*command, "--attention", "2"]) == 1
    assert "--search takes --attention or --kv-budget" in capsys.readouterr().err
    assert main(command) == 0
    assert len(Checkpoint.open(out).mask.attention) == 3


def test_recommend_searches_where_answers_are_given(answers, tmp_path, capsys, monkeypatch):
    command = ["recommend", str(MODEL), "--answers", str(answers), "--kv-budget", "50%"]
    assert main(command) == 1
    assert "--answers needs --out" in capsys.readouterr().err
    monkeypatch.setattr("llmdrop_vllm.cli.search_commands.TOKENS", 300)
    assert main([*command, "--max-loss", "1%", "--out", str(tmp_path / "mask.json")]) == 1
    assert "--max-loss is of what a sweep measures" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "mask.json")]) == 0
    assert len(found(tmp_path).attention) == 6
    assert found(tmp_path).evidence is not None


@pytest.fixture(scope="module")
def engines():
    with quick():
        yield


def test_tasks_decide_between_the_best_by_kl(command, tmp_path, capsys, engines, monkeypatch):
    asked = [*command, "--attention", "3", "--tasks", "llmdrop_name", "--limit", "8", "--finalists", "3"]
    assert main(asked) == 0
    file = found(tmp_path)
    full, *finalists = file.evidence.finalists
    assert (full.dropped, len(finalists)) == ((frozenset(), frozenset()), 3)
    assert all(len(each.attention) == 3 for each in finalists)
    best = max(each.scores["llmdrop_name"] for each in finalists)
    chosen = next(each for each in finalists if each.dropped == file.mask.dropped)
    assert chosen.scores["llmdrop_name"] == best
    assert "llmdrop_name between its 3 best" in capsys.readouterr().out

    # What was asked is not asked again, and a search that asks for less of it goes on in no file of another one.
    monkeypatch.setattr("llmdrop_vllm.evaluation.deciding.any_engines", None)
    assert main([*asked, "--overwrite"]) == 0
    assert found(tmp_path) == file.model_copy(update={"provenance": found(tmp_path).provenance})
    assert main([*asked, "--overwrite", "--limit", "4"]) == 1
    assert "mask.finals.jsonl was written with another limit" in capsys.readouterr().err
    assert main([*asked, "--overwrite", "--heal-aware"]) == 1
    assert "--tasks and --heal-aware exclude each other" in capsys.readouterr().err
    assert main([*asked, "--overwrite", "--tasks", "llmdrop_nam"]) == 1
    assert "unknown task llmdrop_nam" in capsys.readouterr().err
    assert main([*asked, "--overwrite", "--tasks", "llmdrop_humaneval"]) == 1
    assert "llmdrop_humaneval was skipped: it would run code" in capsys.readouterr().err
