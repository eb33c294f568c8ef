"""Without a mask everything is stock vLLM's; with one, every way to say it gives the same model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmdrop_vllm import DropMask
from tests.engines import engine, greedy, kv_tokens
from tests.serving.engine_process import run_job
from tests.tiny import TINY_LLAMA, golden, write_checkpoint

PROMPT = [*range(3, 60)]
DROPPED_LINE = (
    "attention dropped in 3 of 8 layers [2,5-6], MLP in 1 [7]; KV cache 2,560 bytes/token, 62% of the full model"
)
MASK = DropMask(8, attention=(6, 5, 2), mlp=(7,))


def outputs(path, **options):
    with engine(path, **options) as llm:
        return greedy(llm, PROMPT), kv_tokens(llm)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("full"), TINY_LLAMA)


@pytest.fixture(scope="module")
def dropped_outputs(tmp_path_factory):
    return outputs(write_checkpoint(tmp_path_factory.mktemp("dropped"), TINY_LLAMA | MASK.to_config()))


@pytest.mark.processes
def test_a_checkpoint_without_a_mask_is_served_as_stock_vllm_serves_it(full):
    """Bit for bit, with the plugin and without it."""
    job = {"model": full, "prompt": PROMPT, "enforce_eager": True, "tell_class": True}
    ours = run_job({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, **job)
    stock = run_job({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": ""}, **job)
    assert "llmdrop_vllm" in ours["model_class"]
    assert "llmdrop_vllm" not in stock["model_class"]
    assert ours["logprobs"] == stock["logprobs"]
    assert (ours["tokens"], ours["kv_tokens"]) == (stock["tokens"], stock["kv_tokens"])


@pytest.mark.processes
def test_an_engine_survives_that_its_first_prompt_is_of_one_token(full):
    """On CPUs with AMX, stock vLLM 0.32 ends with an illegal instruction unless a longer one came before."""
    job = {"model": full, "prompt": [3], "enforce_eager": True, "dtype": "bfloat16"}
    assert len(run_job({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, **job)["tokens"]) == 12


def test_kv_capacity_grows_by_layers_over_remaining_layers(full, dropped_outputs):
    (_, capacity), (_, full_capacity) = dropped_outputs, outputs(full)
    block = 128
    assert capacity == full_capacity // block * 8 // 5 * block


@pytest.mark.parametrize("dialect", ["llm-drop-booleans", "transformers", "nemotron-nas"])
def test_every_dialect_serves_the_same_model(dialect, tmp_path, dropped_outputs):
    write_checkpoint(tmp_path, TINY_LLAMA | MASK.to_config(dialect), strip=True)
    assert outputs(tmp_path) == dropped_outputs


@pytest.mark.parametrize("dialect", ["runtime", "transformers"])
def test_a_mask_can_be_given_at_run_time(dialect, full, dropped_outputs):
    assert outputs(full, hf_overrides=MASK.to_config(dialect)) == dropped_outputs


def test_explicit_names_serve_the_same_model(tmp_path, dropped_outputs):
    config = TINY_LLAMA | MASK.to_config() | {"architectures": ["DroppedLlamaForCausalLM"]}
    assert outputs(write_checkpoint(tmp_path, config)) == dropped_outputs


@pytest.mark.processes
def test_an_engine_without_the_plugin_refuses_explicit_names(tmp_path):
    config = TINY_LLAMA | MASK.to_config() | {"architectures": ["DroppedLlamaForCausalLM"]}
    write_checkpoint(tmp_path, config)
    with pytest.raises(AssertionError, match="DroppedLlamaForCausalLM'?\\]? are not supported"):
        run_job({"VLLM_PLUGINS": ""}, model=tmp_path, prompt=PROMPT)


def test_a_published_checkpoint_runs_none_of_its_remote_code(tmp_path):
    """LLM-Drop checkpoints carry `auto_map`; its module is never imported, and no --trust-remote-code is asked for."""
    expected = golden("mistral_joint_bools")
    auto_map = {"AutoConfig": "configuration_dropped_mistral.MistralConfig"}
    write_checkpoint(tmp_path, expected["config"] | {"auto_map": auto_map}, seed=expected["seed"])
    (tmp_path / "configuration_dropped_mistral.py").write_text("raise SystemExit('remote code was run')\n")
    with engine(tmp_path) as llm:
        tokens, _, _ = greedy(llm, expected["prompt_token_ids"])
    assert tokens == expected["greedy_token_ids"]


def test_what_was_dropped_is_logged_in_one_line(tmp_path):
    config = TINY_LLAMA | MASK.to_config()
    write_checkpoint(tmp_path, config, strip=True)
    # Where vLLM does not set up logging, Python's default hides everything below a warning.
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CONFIGURE_LOGGING": "0"}
    log = run_job(env, model=tmp_path, prompt=PROMPT, enforce_eager=True)["log"]
    assert log.count(DROPPED_LINE) == 1


def test_registering_is_light_and_can_be_repeated():
    script = (
        "import sys, time; start = time.process_time()\n"
        "import llmdrop_vllm\n"
        "for _ in range(3): llmdrop_vllm.register()\n"
        "elapsed = time.process_time() - start\n"
        "print(elapsed * 1000, *(name in sys.modules for name in ('torch', 'vllm', 'transformers')))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(5)
    ]
    results = [run.stdout.split() for run in runs]
    assert all(result[1:] == ["False"] * 3 for result in results)
    assert min(float(result[0]) for result in results) < 50


def test_without_an_engine_the_extras_are_named(tmp_path):
    """In an interpreter that sees this package and no vLLM."""
    root = str(Path(__file__).parents[2])
    script = f"import sys; sys.path.insert(0, {root!r}); import llmdrop_vllm; llmdrop_vllm.register()"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'llmdrop-vllm[cuda]'" in done.stderr
    assert "llmdrop-vllm[cpu]" in done.stderr
    assert json.dumps(done.stdout) == '""'
