"""A wrapper through the commands: looked at, scored, dropped, said in another dialect, and measured by text."""

import json

import numpy as np
import pytest
import torch

import tests.engines  # noqa: F401 - sets the environment before vLLM is imported
from llmdrop_server.report import report
from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.architectures.names import layer_in
from llmdrop_vllm.artifacts import ModelIdentity, Provenance, read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.evaluation.engine import EngineSettings, running
from llmdrop_vllm.evaluation.evaluate import Measures, evaluate_checkpoint, load_text
from llmdrop_vllm.evaluation.inspection import inspect_checkpoint
from llmdrop_vllm.evaluation.records import Sweep
from llmdrop_vllm.evaluation.sweep import SWEEP_FILE
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint
from tests.architectures.cases import LAYERS
from tests.architectures.wrapper_cases import WRAPPER_CASES
from tests.data.files import answer, write_answers
from tests.words import tokenizer

pytest.importorskip("torchvision", reason="vLLM's multimodal models import it")
MASK = DropMask(LAYERS, attention=(3, 1), mlp=(2,))
CONTEXT = 32
SETTINGS = EngineSettings(dtype="float32", max_model_len=CONTEXT + 1)


@pytest.fixture(scope="module", params=["LlavaForConditionalGeneration-llama", "Qwen3VLForConditionalGeneration"])
def home(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("home")
    tokenizer().save_pretrained(WRAPPER_CASES[request.param].write(directory / "model"))
    (directory / "ids.json").write_text(json.dumps(np.random.default_rng(0).integers(3, 256, (4, CONTEXT)).tolist()))
    return directory


def test_the_commands_take_it_as_they_take_a_text_model(home, tmp_path, capsys):
    model, out, data = f"{home}/model", str(tmp_path / "out"), ["--data", f"{home}/ids.json"]
    assert main(["drop", model, out, "--attention", "2", "--mlp", "1", *data]) == 0
    dropped = Checkpoint.open(out)
    assert (len(dropped.mask.attention), len(dropped.mask.mlp), dropped.is_stripped) == (2, 1, True)
    assert main(["convert", out, f"{out}-2", "--dialect", "transformers"]) == 0
    assert Checkpoint.open(f"{out}-2").mask.effect == dropped.mask.effect
    assert "per_layer_config" in json.loads((tmp_path / "out-2" / "config.json").read_text())["text_config"]
    capsys.readouterr()
    assert main(["inspect", out]) == 0
    assert "attention dropped in 2 of 5 layers" in capsys.readouterr().out


def test_a_sweep_of_it_and_its_report(home, tmp_path):
    directory, text = str(tmp_path / "sweep"), f"{home}/ids.json"
    asked = [
        "--series",
        "attention,blocks",
        "--counts",
        "1,2",
        "--no-speed",
        "--context",
        str(CONTEXT),
        "--windows",
        "2",
    ]
    asked += ["--divergence-tokens", str(CONTEXT), "--text", text, "--data", text, "--dtype", "float32"]
    assert main(["sweep", f"{home}/model", "--results", directory, *asked]) == 0
    assert main(["report", f"{home}/model", "--results", directory]) == 0
    found = read_record(Sweep, tmp_path / "sweep" / SWEEP_FILE)
    assert len(found.points) == 5
    assert all(point.quality.divergence.kl.value > 0 for name, point in found.points.items() if name != found.base)
    assert (tmp_path / "sweep" / "report.html").exists()


def bytes_of(tensor):
    return tensor.path.read_bytes()[tensor.start : tensor.stop]


@pytest.mark.parametrize("name", ["Qwen3VLForConditionalGeneration", "Qwen3_5ForConditionalGeneration"])
def test_search_and_training_go_through_its_tower(name, tmp_path):
    full = WRAPPER_CASES[name].write(tmp_path / "full")
    rng = np.random.default_rng(0)
    made = [
        answer(number, rng.integers(5, 256, 6).tolist(), rng.integers(5, 256, 26).tolist(), held_out=number % 4 == 0)
        for number in range(12)
    ]
    said = Provenance(model=ModelIdentity.of(Checkpoint.open(full)))
    answers = str(write_answers(tmp_path / "answers.jsonl", made, provenance=said))
    mask, dropped, mended = (str(tmp_path / part) for part in ("mask.json", "dropped", "mended"))
    small = ["--tokens", "200", "--held-out-tokens", "60", "--masks", "12"]
    assert main(["search", str(full), "--answers", answers, "--attention", "2", "--out", mask, *small]) == 0
    assert main(["apply", str(full), dropped, "--mask", mask]) == 0
    training = ["--data", answers, "--train-only", "--epochs", "4", "--learning-rate", "1e-3", "--dtype", "float32"]
    assert main(["heal", dropped, mended, "--teacher", str(full), *training]) == 0
    before, after = (Checkpoint.open(path).tensors for path in (dropped, mended))
    outside = [key for key in before if layer_in(key) is None]
    assert all(bytes_of(before[key]) == bytes_of(after[key]) for key in outside)
    # Random weights learn these answers and nothing that would help with those held out.
    history = inspect_checkpoint(Checkpoint.open(mended), memory_bytes=1 << 30).healing.training.history
    learnt = [row["loss"] for row in history if "loss" in row]
    assert learnt[-1] < 0.8 * learnt[0]


def test_quality_is_that_of_its_text(home):
    checkpoint = Checkpoint.open(home / "model")
    text, _ = load_text(checkpoint, f"{home}/ids.json", context=CONTEXT, windows=4)
    found, _ = evaluate_checkpoint(checkpoint, MASK, Measures(text, CONTEXT, divergence_tokens=CONTEXT), SETTINGS)
    windows = torch.from_numpy(np.stack(text.sequences))
    with torch.inference_mode():
        logprobs = hf.load(checkpoint.under(MASK), dtype="float32")(input_ids=windows).logits.log_softmax(-1)
    nll = -logprobs[:, :-1].gather(-1, windows[:, 1:, None]).mean()
    assert found.quality.perplexity.value == pytest.approx(nll.exp().item(), rel=1e-4)
    assert found.quality.divergence.kl.value > 0


def test_the_page_tells_what_the_inspection_tells(home, tmp_path):
    write_checkpoint(plan_surgery(home / "model", MASK), tmp_path / "dropped")
    checkpoint = Checkpoint.open(tmp_path / "dropped")
    with running(checkpoint, MASK, SETTINGS, harness=False) as engine:
        found = report(engine.llm.llm_engine.vllm_config)
    inspected = inspect_checkpoint(checkpoint, memory_bytes=1 << 30)
    assert (found.mask.attention, found.mask.mlp) == (MASK.attention, MASK.mlp)
    for mine, its in ((found.full, inspected.full), (found.served, inspected.dropped)):
        assert (mine.parameters, mine.attention_layers) == (its.parameters, its.attention_layers)
        assert mine.kv_bytes_per_token == its.kv_bytes_per_token
