"""What is measured through vLLM and Transformers, against plain Transformers on the embedded model."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tests.engines  # noqa: F401 - sets the environment before vLLM is imported
from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.errors import CheckpointError, DataError, InputError
from llmdrop_vllm.evaluation.divergence import Reference, Window
from llmdrop_vllm.evaluation.engine import EngineSettings, running, speeds_in_turns
from llmdrop_vllm.evaluation.evaluate import Measures, evaluate_checkpoint, load_text
from llmdrop_vllm.evaluation.records import SpeedWorkload
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint
from tests.tiny import TINY_LLAMA
from tests.tiny import write_checkpoint as write_tiny

MASK = DropMask(12, attention=(7, 11), mlp=(3,))
CONTEXT = 64
SETTINGS = EngineSettings(dtype="float32", max_model_len=CONTEXT + 1)


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.open(MODEL)


@pytest.fixture(scope="module")
def text(checkpoint):
    return load_text(checkpoint, "held-out", context=CONTEXT, windows=4)[0]


@pytest.fixture(scope="module")
def logprobs(checkpoint, text):
    """[window, token, vocabulary], of the full model by Transformers itself and of the masked one by `hf`."""
    windows = torch.from_numpy(np.stack(text.sequences))
    models = (
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        hf.load(checkpoint.under(MASK), dtype="float32"),
    )
    with torch.inference_mode():
        return [model(windows, use_cache=False).logits.log_softmax(-1) for model in models]


def naive_nll(logprobs, text):
    targets = torch.from_numpy(np.stack(text.sequences))[:, 1:, None]
    return -logprobs[:, :-1].gather(-1, targets)[..., 0].mean(-1)


def test_divergence_is_that_of_two_models_side_by_side(checkpoint, text, logprobs):
    full, masked = logprobs
    found = Reference(checkpoint, checkpoint.mask, map(Window, text.sequences), dtype="float32").under(MASK)
    assert found.kl.value == pytest.approx((full.exp() * (full - masked)).sum(-1).mean().item(), rel=1e-4)
    assert found.agreement.value == pytest.approx((full.argmax(-1) == masked.argmax(-1)).float().mean().item())
    assert found.tokens == 4 * CONTEXT
    assert 0.2 < found.agreement.value < 0.95
    assert found.kl.value > 0.05


def test_a_mask_leaves_the_full_model_as_it_was(checkpoint, text):
    reference = Reference(checkpoint, checkpoint.mask, map(Window, text.sequences), dtype="float32")
    before = {name: id(module) for name, module in reference.model.named_modules()}
    reference.under(MASK)
    assert {name: id(module) for name, module in reference.model.named_modules()} == before
    nothing = reference.under(DropMask(12))
    assert (nothing.kl.value, nothing.agreement.value) == (0.0, 1.0)


def test_an_error_under_a_mask_leaves_the_model_as_it_was(checkpoint):
    model = hf.load(checkpoint.under(checkpoint.mask), dtype="float32")
    before = dict(model.named_modules())
    with pytest.raises(DataError), hf.dropped(model, checkpoint.family, MASK):
        load_text(checkpoint, "held-out", context=1 << 20, windows=1)
    assert dict(model.named_modules()) == before
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(12))


def test_evaluation_holds_together(checkpoint, text, logprobs):
    found, raw = evaluate_checkpoint(checkpoint, MASK, Measures(text, CONTEXT, divergence_tokens=2 * CONTEXT), SETTINGS)
    assert raw is None
    assert found.quality.perplexity.value == pytest.approx(naive_nll(logprobs[1], text).mean().exp().item(), rel=1e-4)
    assert found.quality.perplexity.tokens == 4 * (CONTEXT - 1)
    assert found.quality.divergence.tokens == 2 * CONTEXT
    assert found.quality.mask == MASK
    assert found.provenance.data == text.identity


def test_a_stripped_checkpoint_is_compared_with_the_full_one(checkpoint, text, tmp_path):
    write_checkpoint(plan_surgery(checkpoint, MASK), tmp_path / "stripped")
    stripped, measures = Checkpoint.open(tmp_path / "stripped"), Measures(text, CONTEXT, divergence_tokens=CONTEXT)
    assert stripped.is_stripped
    found, _ = evaluate_checkpoint(stripped, stripped.mask, measures, SETTINGS, full=checkpoint)
    (window, *_) = text.sequences
    expected = Reference(checkpoint, checkpoint.mask, [Window(window)], dtype="float32").under(MASK)
    assert found.quality.divergence.kl.value == pytest.approx(expected.kl.value, rel=1e-4)
    assert evaluate_checkpoint(stripped, stripped.mask, measures, SETTINGS)[0].quality.divergence is None


def test_one_engine_answers_in_full_and_is_measured_under_a_mask(checkpoint, text, monkeypatch):
    started = []

    @contextmanager
    def counted(*args, **kwargs):
        started.append(args)
        with running(*args, **kwargs) as engine:
            yield engine

    for module in ("masked_engines", "evaluate"):
        monkeypatch.setattr(f"llmdrop_vllm.evaluation.{module}.running", counted)
    measures = Measures(text, CONTEXT, divergence_tokens=200, divergence_on="own answers")
    settings = replace(SETTINGS, max_model_len=512)
    one, _ = evaluate_checkpoint(checkpoint, MASK, measures, settings)
    assert len(started) == 1
    two, _ = evaluate_checkpoint(checkpoint, MASK, measures, settings, full=checkpoint)
    assert len(started) == 3
    assert one.quality.divergence == two.quality.divergence
    assert one.quality.perplexity.value == pytest.approx(two.quality.perplexity.value, rel=1e-5)


def test_a_checkpoint_with_windows_is_compared_with_the_full_model(checkpoint, tmp_path):
    """Its own config has windows, and the full model is asked without them."""
    windows = DropMask(12, windows=[(layer, 1) for layer in range(0, 12, 2)])
    write_checkpoint(plan_surgery(checkpoint, windows), tmp_path / "windowed")
    windowed = Checkpoint.open(tmp_path / "windowed")
    text, context = load_text(checkpoint, "held-out", context=400, windows=2)
    measures = Measures(text, context, divergence_tokens=2 * context)
    settings = replace(SETTINGS, max_model_len=context + 1)
    assert windowed.mask == windows
    found, _ = evaluate_checkpoint(windowed, windows, measures, settings)
    full, _ = evaluate_checkpoint(windowed, DropMask(12), measures, settings)
    plain, _ = evaluate_checkpoint(checkpoint, DropMask(12), measures, settings)
    assert found.quality.divergence.kl.value > 0.01
    assert full.quality.divergence.kl.value == 0
    assert full.quality.perplexity.value == pytest.approx(plain.quality.perplexity.value, rel=1e-5)
    assert found.quality.perplexity.value > 1.01 * plain.quality.perplexity.value


def test_windows_are_built_into_an_engine_that_switches(checkpoint):
    windows = DropMask(12, windows=((3, 24), (5, 24)))
    with running(checkpoint, windows, replace(SETTINGS, switching=True), harness=False) as engine:
        engine.put_on(replace(windows, attention=(3, 7)))
        engine.put_on(windows)
        with pytest.raises(InputError, match="windows cannot be switched"):
            engine.put_on(DropMask(12))


def test_another_model_is_not_taken_for_the_full_one(checkpoint, text, tmp_path):
    other = Checkpoint.open(write_tiny(tmp_path / "other", TINY_LLAMA))
    with pytest.raises(CheckpointError, match="8 layers, vocabulary 256.* is not the full model of .*12 layers"):
        evaluate_checkpoint(checkpoint, MASK, Measures(text, CONTEXT), SETTINGS, full=other)


def test_speeds_in_turns_have_a_value_per_round_and_engine(checkpoint):
    workload = SpeedWorkload(requests=2, prompt_tokens=32, output_tokens=8)
    with (
        running(checkpoint, DropMask(12), SETTINGS, harness=False) as full,
        running(checkpoint, MASK, SETTINGS, harness=False) as masked,
    ):
        found = speeds_in_turns(((masked, MASK), (full, DropMask(12))), workload)
    assert [len(each.prefill_tokens_per_s) for each in found] == [3, 3]
    assert min(rate for each in found for rate in (*each.prefill_tokens_per_s, *each.decode_tokens_per_s)) > 0


def test_two_engines_at_once_each_compute_their_own_as_transformers_does(checkpoint, text, logprobs):
    with running(checkpoint, DropMask(12), SETTINGS, harness=False) as full:
        for _ in range(2):  # the second one after the first has ended
            with running(checkpoint, MASK, SETTINGS, harness=False) as masked:
                for which, engine in enumerate((full, masked)):
                    found = engine.negative_log_likelihoods(text.sequences)
                    assert found == pytest.approx(naive_nll(logprobs[which], text).tolist(), abs=1e-4)


def test_text_is_cut_into_windows_of_the_context(checkpoint):
    found, context = load_text(checkpoint, "held-out", context=None, windows=None)
    assert (context, len(found.sequences)) == (512, 32)
    assert {len(window) for window in found.sequences} == {512}
    longest, _ = load_text(checkpoint, "held-out", context=1023, windows=None)
    assert len(longest.sequences) == 32  # one token of the model's 1,024 is to come


def test_short_text_gives_the_windows_that_it_has(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("word " * 200)
    found, _ = load_text(checkpoint, str(tmp_path / "text.txt"), context=64, windows=None)
    assert 1 <= len(found.sequences) < 32


@pytest.mark.parametrize(
    ("content", "context", "windows", "message"),
    [
        ("short text", 64, None, "holds 0 sequences of 64 tokens"),
        ("word " * 100, 64, 50, r"50 asked; give more data, or ask for \d+, or for shorter ones"),
        ("word " * 100, 1024, None, "--context is 1024; expected at most 1023"),
    ],
)
def test_text_that_does_not_suffice_is_refused(checkpoint, tmp_path, content, context, windows, message):
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        load_text(checkpoint, str(tmp_path / "text.txt"), context=context, windows=windows)


def test_token_ids_of_different_lengths_are_refused(checkpoint, tmp_path):
    (tmp_path / "ids.json").write_text("[[1, 2, 3], [1, 2]]")
    with pytest.raises(DataError, match="different lengths"):
        load_text(checkpoint, str(tmp_path / "ids.json"), context=None, windows=None)


def test_speed_is_measured_with_prompts_that_no_cache_holds(checkpoint):
    """The same prompts are sent twice, and longer ones than a block of the KV cache."""
    settings, found = EngineSettings(dtype="float32", max_model_len=512, switching=True), []
    prompts = np.random.default_rng(0).integers(5, 500, (2, 300)).tolist()
    with running(checkpoint, DropMask(12), settings, harness=False) as engine:
        generate = engine.llm.generate

        def kept(*args, **kwargs):
            found.extend(generate(*args, **kwargs))
            return found

        engine.llm.generate = kept
        for tokens in (1, 2):
            engine.seconds(prompts, tokens)
        assert [each.num_cached_tokens for each in found] == [0, 0, 0, 0]
        kept([{"prompt_token_ids": prompts[0]}])
        assert found[-1].num_cached_tokens > 0  # the engine does cache
