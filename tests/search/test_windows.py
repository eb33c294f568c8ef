"""Layers chosen for windows: by what they lose, as many as are asked for or as it takes, and what cannot be."""

import json

import numpy as np
import pytest
import torch

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.artifacts import read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.search.judge import Judge
from tests.tiny import TINY_LLAMA, write_checkpoint

TINY = TINY_LLAMA | {"max_position_embeddings": 1024}
SEEN = 384  # tokens, under windows of 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), TINY)


def command(model, texts, out, *options):
    return [
        "windows",
        str(model),
        "--window",
        "64",
        "--data",
        str(texts),
        "--samples",
        "4",
        "--out",
        str(out),
        *options,
    ]


def kl_past_what_all_see(model, texts, layers, numbers):
    """Of Transformers' model, over tokens that do not see everything."""
    checkpoint = Checkpoint.open(model)
    whole = hf.load(checkpoint.under(checkpoint.mask), dtype=torch.float32)
    ids = torch.tensor(json.loads(texts.read_text()))[numbers]
    full = whole(ids).logits[:, SEEN:-1].log_softmax(-1)
    with hf.dropped(whole, checkpoint.family, DropMask(8, windows=[(layer, 64) for layer in layers])):
        said = whole(ids).logits[:, SEEN:-1].log_softmax(-1)
    return (full.exp() * (full - said)).sum(-1).mean().item()


def test_those_that_lose_least_alone(model, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llmdrop_vllm.healing.targets.TOP_K", 255)  # of 256 tokens, which are all alike here
    out = tmp_path / "mask.json"
    assert main(command(model, texts, out, "--count", "3", "--dtype", "float32")) == 0
    found = read_record(MaskFile, out)
    alone = [kl_past_what_all_see(model, texts, [layer], [0, 1]) for layer in range(8)]
    chosen = sorted(np.argsort(alone)[:3].tolist())
    evenly, least = found.evidence.compared
    assert [*least.windows] == chosen
    assert least.kl == pytest.approx(kl_past_what_all_see(model, texts, chosen, [0, 1]), rel=0.02)
    assert least.held_out_kl == pytest.approx(kl_past_what_all_see(model, texts, chosen, [2, 3]), rel=0.02)
    assert (evenly.windows, found.evidence.held_out_tokens) == ((2, 4, 5), 2 * (600 - SEEN - 1))
    best = min(found.evidence.compared, key=lambda each: each.held_out_kl)
    assert found.mask == DropMask(8, windows=[(layer, 64) for layer in best.windows])
    shown = capsys.readouterr()
    assert f"windows in {','.join(map(str, chosen))}" in shown.out
    out_of_sight = 2 * (600 - SEEN - 1)
    assert f"10 masks, nearly all on {out_of_sight:,} tokens of 2 texts" in shown.out
    assert f"{out_of_sight:,} tokens of 2 texts are few to compare by; 1,000 would do better" in shown.err


def test_an_interrupted_choice_goes_on(model, texts, tmp_path, monkeypatch):
    stock, calls = Judge.divergences, []

    def divergences(self, mask, chunks=None):
        calls.append(mask.windows)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return stock(self, mask, chunks)

    monkeypatch.setattr(Judge, "divergences", divergences)
    asked = command(model, texts, tmp_path / "mask.json", "--count", "2")
    assert main(asked) == 130
    assert not (tmp_path / "mask.json").exists()
    assert main(asked) == 0
    assert len(calls) == 1 + 8 + 4  # what was cut off, each layer alone, and both ways on both parts
    # For another number what was judged stands.
    assert main([*asked[:-1], "3", "--overwrite"]) == 0
    assert len(calls) == 13 + 4


def test_beside_what_is_dropped_and_windowed_already(texts, tmp_path):
    own = DropMask(8, attention=(2,), windows=((5, 200),))
    model = write_checkpoint(tmp_path / "model", TINY | own.to_config())
    assert main(command(model, texts, tmp_path / "mask.json", "--count", "6")) == 0
    windows = [(layer, 200 if layer == 5 else 64) for layer in (0, 1, 3, 4, 5, 6, 7)]
    assert read_record(MaskFile, tmp_path / "mask.json").mask == DropMask(8, attention=(2,), windows=windows)


def test_as_many_as_it_takes(model, texts, tmp_path):
    asked = ["--decode-speedup", "1.2", "--batch", "64", "--context", "1000"]
    assert main(command(model, texts, tmp_path / "mask.json", *asked)) == 0
    found = read_record(MaskFile, tmp_path / "mask.json").mask.windows
    assert 0 < len(found) < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --count, or one of --kv-budget, --requests and --decode-speedup"),
        (["--count", "9"], "windows in all 8 layers that take one are not enough"),
        (["--count", "2", "--kv-budget", "50%"], "give --count, or one of"),
        (["--kv-budget", "50%"], "windows in all 8 layers that take one are not enough"),
        (["--count", "2", "--window", "500"], "texts of 600 tokens see everything under windows of 500"),
        (["--count", "2", "--window", "1000"], "a window of 1000 tokens in layer 7 changes nothing"),
        (["--count", "2", "--samples", "1"], "one text was given"),
    ],
)
def test_what_cannot_be_is_refused(options, message, model, texts, tmp_path, capsys):
    assert main(command(model, texts, tmp_path / "mask.json", *options)) == 1
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
