"""From the command line to a served model: score, select, apply, then vLLM and Transformers say the same."""

import json

import pytest
import torch

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.cli import main
from llmdrop_vllm.embedded import MODEL, held_out
from tests.engines import engine, greedy

MASKS = {
    "attention": ["--attention", "4"],
    "MLP": ["--mlp", "2"],
    "block": ["--blocks", "2"],
    "joint": ["--joint", "5", "--protect", "0"],
}
LEAST_IMPORTANT = [11, 7]  # benchmarks/results/embedded/scores.json, of more text


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Scores of the embedded model, as a user makes them."""
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    assert (
        main(["score", str(MODEL), "--out", str(path), "--samples", "16", "--seq-len", "256", "--dtype", "float32"])
        == 0
    )
    return path


@pytest.fixture(scope="module")
def prompt():
    """Token ids of a text that the model has not seen."""
    from transformers import AutoTokenizer

    text = next(iter(held_out().values()))
    return AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"][:60]


@pytest.mark.parametrize(("name", "how"), MASKS.items(), ids=MASKS.keys())
def test_served_and_loaded_models_agree_with_each_other(name, how, scores, prompt, tmp_path):
    mask_file, out = tmp_path / "mask.json", tmp_path / "out"
    assert main(["select", str(scores), *how, "--out", str(mask_file)]) == 0
    assert main(["apply", str(MODEL), str(out), "--mask", str(mask_file)]) == 0
    mask = DropMask.from_config(json.loads((out / "config.json").read_text()))
    assert mask.attention == tuple(json.loads(mask_file.read_text())["attention"])

    model = hf.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits.log_softmax(-1)[0]
    with engine(out) as llm:
        tokens, _, logprobs = greedy(llm, prompt, tokens=8)
    assert logprobs == pytest.approx([expected[i, token].item() for i, token in enumerate(prompt[1:])], abs=1e-4)
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert tokens == generated[0, len(prompt) :].tolist()

    # The same mask tried on the untouched checkpoint, as a user would before writing anything.
    with engine(MODEL, hf_overrides=mask.to_config("runtime")) as llm:
        _, _, tried = greedy(llm, prompt, tokens=1)
    assert tried == pytest.approx(logprobs, abs=1e-5)


def test_the_ranking_is_the_one_found_on_other_text(scores, tmp_path):
    assert main(["select", str(scores), "--attention", "4", "--out", str(tmp_path / "mask.json")]) == 0
    found = json.loads((tmp_path / "mask.json").read_text())["attention"]
    assert found[:2] == LEAST_IMPORTANT
