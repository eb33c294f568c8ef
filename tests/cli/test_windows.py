"""Windows from the command line, beside what is dropped."""

import json

from llmdrop_vllm import DropMask
from llmdrop_vllm.artifacts import Scores, read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.mask_file import MaskFile
from tests.tiny import TINY_LLAMA, write_checkpoint


def test_windows_come_on_top_and_go_with_what_is_given_instead(tmp_path):
    model, windows = write_checkpoint(tmp_path / "model", TINY_LLAMA), ["--window-attention", "3,1", "--window", "64"]
    for out, given in {"by hand": ["--mlp", "2,"], "more": []}.items():
        assert main(["apply", str(model), f"{tmp_path}/{out}", *windows, *given]) == 0
    found = Checkpoint.open(tmp_path / "by hand")
    assert found.mask == DropMask(8, mlp=(2,), windows=((1, 64), (3, 64)))
    # The weights of windows alone are whole, and under names that nothing else loads.
    assert [path.name for path in (tmp_path / "more").glob("*.safetensors")] == ["model.dropped.safetensors"]
    assert main(["convert", f"{tmp_path}/more", f"{tmp_path}/said", "--dialect", "transformers"]) == 0
    said = Checkpoint.open(tmp_path / "said")
    assert said.mask.windows == found.mask.windows
    assert said.config["architectures"] == ["DroppedLlamaForCausalLM"]
    assert main(["apply", f"{tmp_path}/more", f"{tmp_path}/other", "--attention", "5,"]) == 0
    assert Checkpoint.open(tmp_path / "other").mask == DropMask(8, attention=(5,))


def test_windows_stand_beside_what_is_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, windows = write_checkpoint(tmp_path / "model", TINY_LLAMA), ["--window-attention", "3,1", "--window", "64"]
    (tmp_path / "ids.json").write_text(json.dumps([[5 + place % 240 for place in range(500)]]))
    asked = [str(model), *windows, "--data", "ids.json"]
    assert main(["score", *asked, "--out", "scores.json"]) == 0
    assert main(["select", "scores.json", "--attention", "2", "--out", "mask.json"]) == 0
    mask = read_record(MaskFile, tmp_path / "mask.json").mask
    assert mask.windows == tuple((layer, 64) for layer in (1, 3) if layer not in mask.attention)
    assert main(["drop", *asked[:1], "out", *asked[1:], "--mlp", "1"]) == 0
    assert Checkpoint.open(tmp_path / "out").mask.windows == ((1, 64), (3, 64))
    assert main(["score", str(model), "--data", "ids.json", "--out", "plain.json"]) == 0
    plain, windowed = (read_record(Scores, tmp_path / f"{name}.json") for name in ("plain", "scores"))
    assert plain.similarity.attention[:2] != windowed.similarity.attention[:2]
    assert main(["score", *asked[:1], "--window-attention", "3", "--out", "other.json"]) == 1
