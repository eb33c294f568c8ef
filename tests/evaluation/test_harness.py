"""lm-eval's runner on our tasks, through vLLM: scores are those of its own Transformers backend."""

import json
import shutil

import pytest

import tests.engines  # noqa: F401 - sets the environment before vLLM is imported
from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.embedded import MODEL, held_out
from llmdrop_vllm.errors import DataError
from llmdrop_vllm.evaluation import harness as harness_module
from llmdrop_vllm.evaluation.engine import EngineSettings, running
from llmdrop_vllm.evaluation.harness import OWN_TASKS, Harness, find_tasks, write_results
from tests.embedded.make_rows import choice_rows, functions

TASKS = ("llmdrop_docstring", "llmdrop_name")
MASK = DropMask(12, attention=(11, 7, 8, 10))
ROWS = 40


@pytest.fixture(scope="module")
def harness():
    return find_tasks(TASKS, limit=ROWS)


@pytest.fixture(scope="module")
def scores(harness):
    """By mask, each task's score; and lm-eval's own results of the full model."""
    checkpoint, found = Checkpoint.open(MODEL), {}
    for mask in (DropMask(12), MASK):
        with running(checkpoint, mask, EngineSettings(dtype="float32", max_model_len=1024), harness=True) as engine:
            found[mask], raw = harness.run(engine.harness)
    return found, raw


def test_the_embedded_model_is_clearly_above_chance(scores):
    choice, name = scores[0][DropMask(12)]
    assert (choice.task, choice.kind, choice.chance, choice.samples) == (TASKS[0], "multiple choice", 0.25, ROWS)
    assert choice.value - 4 * choice.stderr > 0.25
    assert (name.task, name.kind, name.metric, name.chance) == (TASKS[1], "generation", "exact_match", None)
    assert name.value > 0.5


def test_scores_are_those_of_the_transformers_backend(scores, harness):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    model = hf.load(Checkpoint.open(MODEL).under(MASK), dtype="float32")
    backend = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(MODEL), batch_size=16)
    theirs, _ = harness.run(backend)
    assert [score.value for score in theirs] == pytest.approx([score.value for score in scores[0][MASK]], abs=1e-3)


def test_a_mask_moves_the_scores(scores):
    assert [each.value for each in scores[0][MASK]] != [each.value for each in scores[0][DropMask(12)]]


def test_results_are_written_as_lm_eval_has_them(scores, tmp_path):
    write_results(scores[1], tmp_path / "results.json")
    written = json.loads((tmp_path / "results.json").read_text())
    assert set(TASKS) == written["results"].keys()
    assert written["configs"]["llmdrop_name"]["output_type"] == "generate_until"


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(DataError, match="unknown task llmdrop_names; the nearest are .*llmdrop_name"):
        find_tasks(["llmdrop_names"])


def test_a_task_whose_data_is_out_of_reach_is_skipped_with_the_reason(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    found = find_tasks(["arc_easy", "llmdrop_name"])
    assert found.tasks == ("llmdrop_name",)
    assert "no route to the hub" in found.skipped["arc_easy"]


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """lm-eval's index of our tasks with a tag, a group that is summed up, and one that is not."""
    from lm_eval.tasks import TaskManager

    shutil.copytree(OWN_TASKS, tmp_path / "tasks")
    for path in (tmp_path / "tasks" / f"{name}.yaml" for name in TASKS):
        path.write_text(f"tag: tagged\n{path.read_text()}")
    members = "task:\n  - llmdrop_docstring\n  - llmdrop_name\n"
    (tmp_path / "tasks" / "both.yaml").write_text(f"group: both\n{members}")
    metric = "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    (tmp_path / "tasks" / "summed.yaml").write_text(f"group: summed\ntask:\n  - llmdrop_docstring\n{metric}")
    found = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    monkeypatch.setattr(harness_module, "_manager", lambda *, include_defaults: found)
    return found


@pytest.mark.parametrize(("name", "scored"), [("tagged", list(TASKS)), ("both", list(TASKS)), ("summed", ["summed"])])
def test_a_tag_and_a_group_that_is_not_summed_up_give_the_scores_of_their_tasks(manager, name, scored):
    from lm_eval.models.dummy import DummyLM

    scores, _ = Harness(manager, (name,), limit=4).run(DummyLM())
    assert [each.task for each in scores] == scored
    assert [each.samples for each in scores] == [4] * len(scored)


def test_a_task_that_two_groups_hold_is_refused(manager):
    with pytest.raises(DataError, match="task llmdrop_docstring is in both and in summed"):
        find_tasks(["both", "summed", "both"])


def test_a_task_that_runs_what_the_model_writes_is_skipped(manager, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    found = find_tasks(["llmdrop_name"])
    reason = "it would run code that the model writes; --run-generated-code lets it, confined"
    assert (found.tasks, found.skipped) == ((), {"llmdrop_name": reason})
    assert find_tasks(["llmdrop_name"], runs_code=True).tasks == ("llmdrop_name",)


@pytest.mark.parametrize("metric", ["bleu", "ter"])
def test_a_task_without_a_score_between_0_and_1_is_skipped(manager, tmp_path, metric):
    path = tmp_path / "tasks" / "llmdrop_name.yaml"
    path.write_text(path.read_text().replace("exact_match", metric))
    found = find_tasks(["llmdrop_name", "llmdrop_docstring"])
    assert found.tasks == ("llmdrop_docstring",)
    assert found.skipped == {"llmdrop_name": "none of its metrics is a score between 0 and 1"}


def test_the_rows_are_what_the_script_makes_of_the_held_out_text():
    rows = functions()
    assert [json.loads(line) for line in (OWN_TASKS / "choice.jsonl").read_text().splitlines()] == [*choice_rows(rows)]
    names = [json.loads(line) for line in (OWN_TASKS / "name.jsonl").read_text().splitlines()]
    assert names == [{"subject": row["subject"], "name": row["name"]} for row in rows]
    assert {row["subject"] for row in rows} <= held_out().keys()


def test_every_row_has_its_sentence_among_four_different_ones():
    for row, source in zip(choice_rows(functions()), functions(), strict=True):
        assert row["choices"][row["label"]] == source["sentence"]
        assert len(set(row["choices"])) == 4
