"""The figures of healing: what is asked, how it is told, and that the table is what was measured."""

import json

import pytest

from benchmarks.functions import ASKED, FUNCTIONS, functions
from benchmarks.healing import lambdas, main, table
from benchmarks.healing_ways import DROPPED, WAYS
from benchmarks.own_prompts import beginning, own_prompts
from benchmarks.record import RESULTS
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.tokens import load_tokenizer
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.healing import ridge
from tests.data.files import answer, write_answers

PROSE = json.loads((RESULTS / "healing_prose.json").read_text())["points"]
LINES = json.loads((RESULTS / "healing.json").read_text())["points"]


def test_functions_are_asked_for_in_one_of_two_ways(tmp_path):
    plain, asked = tmp_path / "plain.jsonl", tmp_path / "asked.jsonl"
    functions(plain, in_chat=False)
    functions(asked, in_chat=True)
    one, other = ([json.loads(line) for line in path.read_text().splitlines()] for path in (plain, asked))
    assert len(one) == len(other) == FUNCTIONS
    assert all(each.startswith("def ") and '"""' in each for each in one)
    assert all(each.split("\n")[0] in ASKED for each in other)
    assert not {*one} & {each.split("```python\n")[1].removesuffix("```") for each in other}


def test_only_the_lambdas_that_are_given_are_tried():
    before = ridge.RIDGES
    with lambdas((0.5,)):
        assert ridge.RIDGES == (0.5,)
    with lambdas(None):
        assert before == ridge.RIDGES
    assert before == ridge.RIDGES


def test_the_table_says_how_much_of_the_divergence_was_regained():
    judged = {"answers": {"kl": 0.4, "agreement": 0.7}}
    lines = [
        {"model": "m", "n": 8, "way": DROPPED, "judged": judged, "reasoning": 0.25},
        {"model": "m", "n": 8, "way": "w", "judged": {"answers": {"kl": 0.1, "agreement": 0.9}}, "tokens": 10},
    ]
    assert "| m | 8 | w | 10 |  | 0.1 | 90.0% | 75% |" in table(lines)


def test_names_of_ways_are_used_once():
    for of_model in WAYS.values():
        for ways in of_model.values():
            assert len({way.name for way in ways}) == len(ways)


def test_unknown_models_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["healing.py", "--models", "smollm3"])
    with pytest.raises(SystemExit, match="--models names smollm3; expected smollm2, qwen2.5-coder-1.5b"):
        main()


def test_the_table_stands_beside_what_was_measured():
    assert (RESULTS / "healing.md").read_text() == table(LINES)


def test_of_prompts_that_a_model_wrote_whole_ones_are_taken_once(tmp_path):
    said = [("What is rain?  ", "stop"), ("What is rain?", "stop"), ("Why?", "stop"), ("Tell me of the", "length")]
    answers = [answer(n, [1], [2], text=text, finish_reason=reason) for n, (text, reason) in enumerate(said)]
    own_prompts(write_answers(tmp_path / "written.jsonl", answers), tmp_path / "prompts.jsonl")
    assert (tmp_path / "prompts.jsonl").read_text() == '"What is rain?"\n'


def test_a_chat_is_begun_up_to_where_the_user_speaks(tmp_path):
    checkpoint = Checkpoint.open(MODEL)
    options = beginning(checkpoint, tmp_path / "beginning.jsonl")
    (line,) = (tmp_path / "beginning.jsonl").read_text().splitlines()
    tokenizer = load_tokenizer(checkpoint, "")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat.startswith(begun := tokenizer.decode(json.loads(line)["prompt"]))
    assert chat[len(begun) :].startswith("hello")
    assert options[:2] == ["--prompts", str(tmp_path / "beginning.jsonl")]


@pytest.mark.parametrize(
    ("healed", "least"), [("closed form, prose", 0.75), ("closed form, then training, answers", 0.4)]
)
def test_prose_is_regained(healed, least):
    """Of what dropping adds to the perplexity of held-out pages."""
    assert (PROSE["dropped"] - PROSE[healed]) / (PROSE["dropped"] - PROSE["full"]) > least


def test_what_it_is_healed_on_decides():
    of_eight = [each for each in LINES if (each["model"], each["n"]) == ("smollm2", 8)]
    kl = {each["way"]: each["judged"]["answers"]["kl"] for each in of_eight}
    assert kl["closed form"] < 0.6 * kl["dropped"]
    assert kl["closed form, text"] > 0.9 * kl["dropped"]
    assert kl["closed form, then training"] < kl["closed form"]
