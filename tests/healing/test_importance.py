"""Importance after healing is what a healing of that sublayer alone leaves."""

import json

import pytest

from llmdrop_vllm import DropMask
from llmdrop_vllm.artifacts import Scores
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.healing import importance
from llmdrop_vllm.healing.heal import healed
from llmdrop_vllm.healing.importance import after_healing
from llmdrop_vllm.scoring import scoring
from tests.architectures.cases import CASES, LAYERS
from tests.healing.interruptions import interrupted_once
from tests.healing.test_families import data

FULL = DropMask(LAYERS)


def measured(checkpoint, mask=FULL, **options):
    scores = Scores.unmeasured(checkpoint).model_copy(update={"dropped": mask})
    return after_healing(scores, checkpoint, data(), dtype="float32", **options)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "PhiForCausalLM", "Gemma2ForCausalLM"])
def test_it_is_what_healing_of_that_sublayer_alone_leaves(name, tmp_path):
    checkpoint = Checkpoint.open(CASES[name].write(tmp_path))
    found = measured(checkpoint)
    assert found.importance == "left after healing"
    for kind in ("attention", "mlp"):
        mask = DropMask(LAYERS, **{kind: (2,)})
        with healed(checkpoint.under(mask), checkpoint.under(FULL), data(), dtype="float32") as result:
            expected = result.record.layers[0]
        assert expected.lost == (f"{kind} 2",)
        left = 1 - getattr(found.similarity, kind)[2]
        assert left == pytest.approx(expected.error_after, rel=1e-3)
        assert 0 < left < expected.error_before


def test_what_is_gone_already_has_none_and_leaves_its_neighbour_unmended(tmp_path):
    checkpoint = Checkpoint.open(CASES["LlamaForCausalLM"].write(tmp_path))
    found = measured(checkpoint, DropMask(LAYERS, attention=(2,)))
    assert found.similarity.attention[2] is None
    assert found.similarity.mlp[2] < measured(checkpoint).similarity.mlp[2]


def test_an_interrupted_run_goes_on_and_ends_alike(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(CASES["LlamaForCausalLM"].write(tmp_path / "model"))
    expected = measured(checkpoint)
    begun = interrupted_once(monkeypatch, importance._Run, "_layer", at=3)
    with pytest.raises(KeyboardInterrupt):
        measured(checkpoint, scratch=tmp_path / "scratch")
    assert measured(checkpoint, scratch=tmp_path / "scratch").similarity == expected.similarity
    assert begun == [0, 1, 2, 3, 3, 4]
    assert not (tmp_path / "scratch").exists()


def test_one_text_is_refused_before_anything_is_scored(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "score", lambda *_, **__: pytest.fail("it was scored"))
    text = ("--samples", "1", "--seq-len", "64", "--after-healing")
    assert main(["score", str(MODEL), "--out", str(tmp_path / "scores.json"), *text]) == 1
    assert "1 prompt or text; healing needs one to learn, one to judge" in capsys.readouterr().err


def test_masks_are_chosen_by_it(tmp_path, capsys):
    scores, mask, out = tmp_path / "scores.json", tmp_path / "mask.json", tmp_path / "out"
    text = ("--samples", "8", "--seq-len", "64", "--after-healing")
    assert main(["score", str(MODEL), "--out", str(scores), *text]) == 0
    assert "importance (left after healing)" in capsys.readouterr().out
    assert main(["select", str(scores), "--attention", "3", "--out", str(mask)]) == 0
    assert main(["drop", str(MODEL), str(out), "--attention", "3", *text]) == 0
    chosen = [json.loads(path.read_text())["attention"] for path in (mask, out / "llmdrop_mask.json")]
    left = json.loads(scores.read_text())["similarity"]["attention"]
    assert chosen[0] == chosen[1] == sorted(range(12), key=lambda each: -left[each])[:3]
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json", "mask.json", "out"}


def test_an_interrupted_command_does_not_score_again(tmp_path, monkeypatch):
    command = ["score", str(MODEL), "--out", str(tmp_path / "scores.json"), "--samples", "8", "--seq-len", "64"]
    command.append("--after-healing")
    interrupted_once(monkeypatch, importance._Run, "_layer", at=3)
    assert main(command) == 130
    monkeypatch.setattr(scoring, "score", lambda *_, **__: pytest.fail("it was scored"))
    assert main(command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
